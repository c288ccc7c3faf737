"""What the objectives that MFD is compared with are predicted to cost, against real updates."""

import math
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

from mfd_fast import cli
from mfd_fast.baselines.distiller import ComparisonDistiller
from mfd_fast.baselines.objectives import COMPARED, needs_of
from mfd_fast.baselines.second_time import with_second_time
from mfd_fast.cli.cost import built
from mfd_fast.cost import Trace, trace_cycle
from mfd_fast.cost.compared import STUDENT_UPDATES, followed_draws, trace_compared
from mfd_fast.cost.measured import measured_phases
from mfd_fast.cost.shapes import shapes_of
from mfd_fast.models import preset
from mfd_fast.models.cifar10.unet import UNet, UNetConfig, save_unet
from mfd_fast.testing.counting import torchs_counter

ALONE = ("cd", "ayf", "meanflow", "imm", "reflow")  # train the student alone
BATCH, CYCLES = 8, 2


def digits(objective, **distill):
    """The digits preset on the CPU, by another objective and in small updates."""
    config = preset("digits")
    train = replace(config.train, device="cpu", batch_size=BATCH)
    distill = {"objective": objective, "aux_updates": 2, **distill}
    return replace(config, distill=replace(config.distill, **distill), train=train)


def cycles_of(config, distiller, next_cond, cycles=CYCLES):
    per_cycle = config.student_updates + ("aux" in distiller.roles) * config.aux_updates
    for update in range(cycles * per_cycle):
        distiller.step(next_cond(update))


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        *((name, {}) for name in COMPARED),
        ("dmd2", {"student_steps": 3, "micro_batches": 2}),
        ("dmd2", {"guidance": 1.0, "student_updates": 2}),
        ("senseflow", {"student_steps": 3, "micro_batches": 2, "solver": "heun"}),
        ("cd", {"step_size": 0.03, "ema_decay": 0.0}),
    ],
)
def test_operations_are_those_of_real_updates_by_torchs_counter(objective, settings):
    """The first cycles of a run on the CPU, against shapes and the draws that were followed."""
    config = digits(objective, **settings)
    predicted = trace_compared(shapes_of(config), config.distill, BATCH, cycles=CYCLES)
    distiller, next_cond = built(config)
    with torchs_counter() as counter:
        cycles_of(config.distill, distiller, next_cond)
    assert counter.get_total_flops() == predicted.total.flops * CYCLES
    assert predicted.gradients.keys() == set(distiller.roles)


@pytest.mark.parametrize("objective", ["senseflow", "meanflow", "reflow"])
def test_operations_of_a_unet_are_those_of_real_updates(objective, tmp_path):
    sizes = UNetConfig(image_size=8, width=32, multipliers=(1, 2), attention_levels=(1,))
    path = tmp_path / "teacher.safetensors"
    save_unet(UNet(sizes), path)
    config = preset("cifar10")
    distill = replace(config.distill, objective=objective, aux_updates=1, step_size=0.25)
    config = replace(config, teacher=str(path), distill=distill)
    config = replace(config, train=replace(config.train, device="cpu"))
    predicted = trace_compared(shapes_of(config), distill, BATCH, cycles=CYCLES)

    from mfd_fast.models.cifar10.task import Cifar10Task

    distiller = ComparisonDistiller(Cifar10Task(config).backbone(), distill)
    cond = torch.empty(BATCH, 0)
    if needs_of(distill).uses_data:
        cond = (torch.zeros(BATCH, 3, 8, 8), cond)
    with torchs_counter() as counter:
        cycles_of(distill, distiller, lambda _: cond)
    assert counter.get_total_flops() == predicted.total.flops * CYCLES


# What a trace without storage sees otherwise: copies to the device, rows in their own order, the
# slope of SiLU in parts.
OTHERWISE = {"_to_copy", "arange", "clone", "zeros", "silu_backward", "sigmoid", "mul", "add",
             "sub_", "fill_"}  # fmt: skip


@pytest.mark.parametrize("objective", COMPARED)
def test_operators_and_memory_are_those_of_a_trace_of_real_updates(objective):
    """What only moves memory too, phase by phase; a loop may hold a batch of samples besides."""
    config = digits(objective)
    predicted = trace_compared(shapes_of(config), config.distill, BATCH, cycles=CYCLES)
    distiller, next_cond = built(config)
    cycles_of(config.distill, distiller, next_cond, cycles=1)  # makes gradients and AdamW's state
    distiller.host_generator.manual_seed(config.distill.seed)
    conds = [next_cond(update) for update in range(3 * CYCLES)]
    with Trace() as trace:
        distiller.phase = trace.phase
        cycles_of(config.distill, distiller, conds.__getitem__)
    assert {name for name in trace.work if name} == predicted.phases.keys()
    for name, work in predicted.phases.items():
        if name.endswith("/optimizer"):
            assert work.by_family()["optimizer"].num_ops == (2 if "aux" in name else 1)
            continue
        held = predicted.memory.peak[name] - trace.memory.peak[name]
        assert abs(held) <= BATCH * 64 * 4
        if name.endswith("/backward"):
            assert work.num_ops * CYCLES == trace.work[name].num_ops
            assert work.bytes * CYCLES == trace.work[name].bytes
        if name.endswith("/forward"):
            ours, theirs = calls_by_name(work), calls_by_name(trace.work[name])
            differ = {op for op in ours | theirs if round(ours[op] * CYCLES, 6) != theirs[op]}
            assert differ <= OTHERWISE


def calls_by_name(work):
    calls = Counter()
    for op, count in work.calls.items():
        calls[op.name] += count
    return calls


def drawn(objective, **distill):
    config = replace(preset("digits").distill, objective=objective, **distill)
    cycles = math.ceil(STUDENT_UPDATES / config.student_updates)
    return followed_draws(config, BATCH, cycles)


def test_the_expected_segment_is_the_middle_one():
    """dmd2 trains one of K steps, drawn uniformly: (K - 1) / 2 evaluations come before it."""
    steps = 4
    for role, draws in drawn("dmd2", student_steps=steps).items():
        before = {
            sum(who == "student" for who, _, _ in calls) - 1: kind.count
            for calls, kind in draws.kinds.items()
        }
        total = sum(before.values())
        assert total == STUDENT_UPDATES * (5 if role == "aux" else 1) and len(before) == steps
        mean = sum(k * count for k, count in before.items()) / total
        assert abs(mean - (steps - 1) / 2) < 4 * math.sqrt((steps**2 - 1) / 12 / total)


@pytest.mark.parametrize("objective", COMPARED)
def test_memory_that_stays_is_that_of_what_is_trained(objective):
    config = digits(objective, micro_batches=2)
    model = shapes_of(config)
    assert bool(model.backbone.parameters_of("aux")) == (objective not in ALONE)
    cycle = trace_cycle(model, config.distill, BATCH)
    distiller, next_cond = built(config)
    cycles_of(config.distill, distiller, next_cond, cycles=1)
    trained = [p for role in distiller.roles for p in distiller.parameters_of(role)]
    states = [x for opt in distiller.optimizers.values() for s in opt.state.values()
              for x in s.values() if x.ndim]  # fmt: skip
    known = {
        "trained weights": sum(p.nbytes for p in trained),
        "gradients": sum(p.grad.nbytes for p in trained),
        "optimizer": sum(x.nbytes for x in states),
        "average": sum(x.nbytes for x in distiller.ema),
    }
    assert {name: cycle.persistent[name] for name in known} == known
    assert ("aux" in cycle.gradients) == (objective not in ALONE)
    frozen = [*distiller.backbone.parameters(), *distiller.backbone.buffers()]
    own = {id(p) for p in trained}
    assert cycle.persistent["weights"] == sum(x.nbytes for x in frozen if id(x) not in own)


@pytest.mark.parametrize("objective", COMPARED)
def test_estimate_from_the_command_line(objective, capsys):
    words = ["estimate", "digits", "--objective", objective, "--batch", "8", "--scaling"]
    assert cli.main([*words, "--distill.step-size", "0.25"]) == 0
    printed = capsys.readouterr().out
    updates = "1 student" if objective in ALONE else "5 auxiliary and 1 student"
    assert f"one cycle of {objective}: {updates} updates" in printed
    assert ("aux/" in printed) == (objective not in ALONE)
    assert f"{objective} trains in one process, on one GPU." in printed
    assert ("E[N]" in printed) == (objective == "cd")


def test_measured_and_predicted_phases_of_a_cycle_have_the_same_names():
    config = digits("reflow", step_size=0.5)
    cycle = trace_cycle(shapes_of(config), config.distill, BATCH)
    distiller, next_cond = built(config)
    assert measured_phases(distiller, next_cond, cycles=2).keys() == cycle.phases.keys()
    assert distiller.num_updates == {"aux": 0, "student": 3}


def test_a_unet_without_a_file_has_the_sizes_of_its_training():
    config = preset("cifar10")
    config = replace(config, distill=replace(config.distill, objective="meanflow"))
    backbone, real = shapes_of(config).backbone, UNet(UNetConfig())
    for ours, theirs in (
        (backbone.teacher, real),
        (backbone.student, with_second_time(real)),
    ):
        assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    cycle = trace_cycle(shapes_of(config), config.distill, 1)
    assert cycle.gradients.keys() == {"student"} and cycle.total.flops > 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["digits", "--objective", "dmd"],
            "one of .*dmd2.*got 'dmd'; did you mean 'dmd2'",
        ),
        (["sana-tiny", "--objective", "dmd2"], "preset 'sana-tiny' trains adapters: take --obj"),
        (["occfm-tiny", "--objective", "imm"], "preset 'occfm-tiny' does not give: take --obj"),
        (
            ["digits", "--objective", "cd", "--train.capture", "on"],
            "set train.capture to auto",
        ),
        (["digits", "--objective", "cd", "--gpus", "2"], "trains in one process: drop --gpus"),
        (["digits", "--objective", "imm", "--batch", "6"], "multiple of it, got 6"),
        (["digits", "--objective", "dmd2", "--distill.micro-batches", "3"], "equal parts; got 64"),
        (
            ["digits", "--objective", "dmd2", "--distill.aux-draws-per-sample", "2"],
            "aux_draws_per_sample must be 1",
        ),
    ],
)
def test_what_cannot_be_estimated_is_one_sentence(argv, message, capsys):
    assert cli.main(["estimate", *argv]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and len(error.strip().splitlines()) == 1
