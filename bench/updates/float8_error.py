"""What float8 does to the velocities: error of the mean velocities from noise to data.

``velocity_error`` (relative L2, Euler, h = .02, guidance 4.5) of a bfloat16 network
with and without e4m3: the trained digits teacher, and a SANA with random weights.  ``smallest`` are
the terms and outputs of the smallest matmul that is taken; the rule that pays at 1.6B takes the
fewest of so small a network.  On a CPU the same e4m3 numbers are multiplied in float32.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.running import Options
from bench.updates import networks
from mfd_fast import DistillConfig, Distiller, SharedBackbone
from mfd_fast.backbones.adapters import AdapterBank
from mfd_fast.backbones.float8 import MIN_OUTPUTS, MIN_SIDE, use_float8
from mfd_fast.models import preset
from mfd_fast.models.digits.task import DigitsTask
from mfd_fast.run.float8_error import velocity_error

SAMPLES = 8  # of digits; of SANA one


def digits(device: str) -> tuple[SharedBackbone, Any]:
    """The packaged teacher with adapters, and labels."""
    task = DigitsTask(preset("digits"))
    copies = task.backbone()
    network = copies.teacher.to(device, torch.bfloat16)
    backbone = SharedBackbone(
        network,
        adapters=AdapterBank(network, targets=("qkv",)),
        sample_shape=copies.sample_shape,
        null_cond=copies.null_cond,
    )
    return backbone, task.conditions()(0)[:SAMPLES].to(device)


def sana(device: str) -> tuple[SharedBackbone, Any]:
    """Random weights and a random prompt; the unconditional lane reads zeros."""
    model = networks.make_sana("mini", device, torch.bfloat16)
    cond = {name: torch.randn_like(x) if name == "text" else x for name, x in model.cond(1).items()}
    model.backbone.null_cond = lambda cond: {**cond, "text": torch.zeros_like(cond["text"])}
    return model.backbone, cond


# model, smallest terms and outputs
CASES: tuple[tuple[str, Callable[[str], tuple[SharedBackbone, Any]], int, int], ...] = (
    ("digits, trained", digits, 64, 64),
    ("sana-mini, random", sana, MIN_SIDE, MIN_OUTPUTS),
    ("sana-mini, random", sana, MIN_SIDE, 512),
)


def row(name: str, make: Callable, side: int, outputs: int, device: str) -> dict:
    """One case."""
    torch.manual_seed(0)
    backbone, cond = make(device)
    products = use_float8(backbone, min_side=side, min_outputs=outputs)
    errors = velocity_error(Distiller(backbone, DistillConfig(step_size=0.02)), cond)
    smallest = {"terms": side, "outputs": outputs}
    return {
        "model": name,
        "smallest": smallest,
        "weights": len(products.copies),
        **{role: float(f"{error:.4g}") for role, error in errors.items()},
    }


def benchmark(options: Options) -> tuple[str, dict, Iterator[list[dict]]]:
    batches = ([row(*case, options.device)] for case in CASES if options.wants(case[0]))
    return "float8_error", {"dtype": "bfloat16"}, batches
