"""``mfd-fast profile``: phases, families, memory; free when nobody listens."""

import json
import time
from pathlib import Path

import pytest
import torch
from small_networks import SAMPLE_SHAPE, ImageNetwork, image_inputs

from mfd_fast import CopiedBackbone, cli
from mfd_fast.cost.profile import OUTSIDE, family, profile_cycles, summary
from mfd_fast.distill.config import DistillConfig
from mfd_fast.distill.distiller import Distiller
from mfd_fast.distill.phases import PhaseTimer, no_phase

PHASES = [
    *("aux/generate", "aux/forward", "aux/backward", "aux/optimizer"),
    *("student/generate", "student/integrate", "student/backward", "student/optimizer"),
]


def make_distiller():
    backbone = CopiedBackbone(ImageNetwork(), sample_shape=SAMPLE_SHAPE)
    return Distiller(backbone, DistillConfig(guidance=1.0, step_size=0.2, aux_updates=2))


def test_a_profile_of_the_phases(tmp_path):
    distiller = make_distiller()
    cond = image_inputs(2)[2]
    seen = []
    result = profile_cycles(
        distiller, lambda n: seen.append(n) or cond, tmp_path / "trace.json", cycles=2
    )
    assert seen == list(range(5 * 3))  # warm-up, two timed, one profiled, one for the memory
    assert list(result.phases) == PHASES == list(result.families)
    assert all(seconds > 0 for seconds in result.phases.values())
    assert result.families["student/integrate"]["product"] > 0
    assert result.families["aux/optimizer"]["optimizer"] > 0
    assert all(parts[OUTSIDE] > 0 for parts in result.families.values())
    assert "aten::mm" in result.operators or "aten::addmm" in result.operators
    assert result.memory.keys() >= set(PHASES)
    assert max(result.memory.values()) > 2 * 8 * 16 * 4  # at least the states
    assert distiller.phase is no_phase

    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {f"phase {name}" for name in PHASES} <= {event.get("name") for event in events}
    for name in PHASES:
        assert name in summary(result)
    with pytest.raises(ValueError, match="number of cycles must be >= 1, got 0"):
        profile_cycles(distiller, lambda n: cond, tmp_path / "other.json", cycles=0)


def test_listening_changes_no_number():
    """The same updates, bit for bit, with and without a listener."""
    states = []
    for listens in (False, True):
        torch.manual_seed(0)
        distiller = make_distiller()
        if listens:
            distiller.phase = PhaseTimer("cpu").phase
        cond = image_inputs(3)[2]
        metrics = [distiller.step(cond) for _ in range(3)]
        states.append([value for row in metrics for value in row.values()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_phases_cost_less_than_two_percent_when_nobody_listens():
    distiller, cond = make_distiller(), image_inputs(2)[2]
    entered = []
    distiller.phase = lambda name: entered.append(name) or no_phase(name)
    start = time.process_time()
    for _ in range(3):
        distiller.step(cond)
    cycle = time.process_time() - start

    repeats = 1000
    start = time.process_time()
    for _ in range(repeats):
        for name in entered:
            with no_phase(name):
                pass
    assert (time.process_time() - start) / repeats < 0.02 * cycle


def test_the_timer_names_a_phase_inside_another():
    timer = PhaseTimer("cpu")
    with timer.phase("outer"):
        with timer.phase("inner"):
            time.sleep(0.01)
        with timer.phase("inner"):
            pass
    seconds = timer.seconds()
    assert [len(seconds[name]) for name in ("outer", "outer > inner")] == [1, 2]
    assert seconds["outer"][0] >= sum(seconds["outer > inner"]) >= 0.01


def test_families_of_operators_as_the_profiler_names_them():
    names = ("aten::addmm", "aten::mkldnn_convolution", "mfd_fast::segmented_lora_", "aten::add",
             "aten::_fused_adamw_", "aten::_scaled_dot_product_flash_attention")  # fmt: skip
    expected = ["product", "convolution", "adapter", "memory", "optimizer", "attention"]
    assert [family(name) for name in names] == expected


def test_profile_from_the_command_line(tmp_path, capsys):
    folder = tmp_path / "profile"
    argv = ["profile", "digits", "--out", str(folder), "--cycles", "1", "--batch", "2",
            "--distill.aux-updates", "1", "--distill.step-size", "0.5"]  # fmt: skip
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    assert "student/integrate" in printed and "between operators" in printed
    assert {path.name for path in Path(folder).iterdir()} == {"trace.json"}
    assert cli.main(argv) == 2
    assert "holds a profile already; choose another folder" in capsys.readouterr().err
