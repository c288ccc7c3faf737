"""A distiller's state of an earlier version goes on bit for bit.

``tests/data/distiller_states.pt.gz``, written by commit fbe5645: objective -> ``before``, the
``state_dict()`` of :func:`make` after ``FIRST`` updates, and what it is after all ``UPDATES`` with
the ``compiled`` operators and with those of the ``reference``.  A sum has at most two terms, so
that the order of a machine's vectors does not matter.
"""

import gzip
from pathlib import Path

import pytest
import torch
from recorded_graph import RecordedGraph

from mfd_fast import CopiedBackbone, make_distiller
from mfd_fast.baselines.config import ComparisonConfig
from mfd_fast.distill.captured import CapturedDistiller
from mfd_fast.ops.extension import has_ext

STATES = Path(__file__).parents[1] / "data/distiller_states.pt.gz"
FIRST, UPDATES = 7, 24
SETTINGS = {
    "guidance": 2.0, "step_size": 0.3, "solver": "ab2", "equal_fraction": 0.25, "student_steps": 2,
    "aux_updates": 2, "micro_batches": 2, "ema_decay": 0.9, "loss_scale": 1024.0, "seed": 3,
}  # fmt: skip


class Elementwise(torch.nn.Module):
    """v = (w + c) x, and a buffer that training changes; x ``[B, 1]``."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((1, 1), 0.5))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, t, cond):
        self.calls += 1
        return (self.weight + cond) * x


def make(objective, config, make_distiller=make_distiller, **options):
    backbone = CopiedBackbone(Elementwise(), sample_shape=(1,), null_cond=torch.zeros_like)
    return make_distiller(backbone, config(objective=objective, **SETTINGS), **options)


def run(distiller, updates):
    """The numbered updates; one has a condition that is not finite."""
    for number in updates:
        cond = torch.tensor([[0.25], [-0.5]]) * (number % 3 - 1)
        distiller.step(torch.full_like(cond, float("nan")) if number == 4 else cond)
    return distiller.state_dict()


def leaves(tree):
    """Every value of a state, by its path."""
    if isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {(k, *path): v for k, value in items for path, v in leaves(value).items()}
    return {(): tree}


def captured(backbone, config):
    return CapturedDistiller(backbone, config, graph=RecordedGraph)


@pytest.mark.parametrize(
    ("objective", "maker"), [("mfd", make_distiller), ("mfd", captured), ("reflow", make_distiller)]
)
def test_a_state_of_an_earlier_version_goes_on_bit_for_bit(objective, maker):
    with gzip.open(STATES) as file:
        states = torch.load(file, weights_only=True)[objective]
    distiller = make(objective, ComparisonConfig, maker)
    distiller.load_state_dict(states["before"])
    assert distiller.num_updates == states["before"]["num_updates"]
    operators = "compiled" if has_ext() else "reference"
    expected, got = leaves(states[operators]), leaves(run(distiller, range(FIRST, UPDATES)))
    assert expected.keys() == got.keys()
    assert float(got["skipped",]) > 0
    for path, value in expected.items():
        same = torch.equal(value, got[path]) if torch.is_tensor(value) else value == got[path]
        assert same, path
