"""What a run is predicted to cost: operations, evaluations, memory, devices, what fits."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_networks import SAMPLE_SHAPE, ImageNetwork, image_inputs
from torch import Generator

import mfd_fast.ops  # noqa: F401  (registers the operators)
from mfd_fast import CopiedBackbone, cli
from mfd_fast.backbones.lanes import AUX, TEACHER, TEACHER_UNCOND
from mfd_fast.cost import Trace, device_named, estimate, trace_cycle
from mfd_fast.cost.cycle import (
    DRAWS,
    MOMENT_BYTES,
    MetaDistiller,
    _trace_steps,
    adapter_share,
    expected_evaluations,
    weighted,
)
from mfd_fast.cost.devices import COMPILED, DEVICES, EAGER, REPLAYED, assumed
from mfd_fast.cost.operators import MEMORY_BOUND, PRODUCTS
from mfd_fast.cost.phases import Phase, Span, phase_of
from mfd_fast.cost.plans import cycle_of, memory_of
from mfd_fast.cost.shapes import shapes_of
from mfd_fast.cost.table import duration, text
from mfd_fast.distill.config import DistillConfig
from mfd_fast.distill.distiller import Distiller
from mfd_fast.distill.objectives import make_objective
from mfd_fast.models import preset
from mfd_fast.testing.counting import torchs_counter


def operations_of(network, *args):
    with torch.no_grad(), Trace() as trace:
        network(*args)
    return trace.work[""].flops


@pytest.fixture(scope="module")
def sana():
    return shapes_of(preset("sana-1.6b"))


def test_operations_of_one_sana_evaluation(sana):
    network = sana.backbone.network
    x = torch.empty(1, 32, 32, 32, dtype=torch.bfloat16, device="meta")
    t, cond = torch.empty(1, device="meta"), sana.cond(1)
    with torch.no_grad():
        network(x, t, cond)  # makes the table of times
    assert abs(operations_of(network, x, t, cond) / 2.97e12 - 1) < 0.01


def test_operations_of_one_occfm_evaluation():
    """The specified network, and the engine's, which computes less for the same result."""
    from bench.updates.occfm_reference import velocity
    from mfd_fast.models.occfm import OccfmConfig
    from mfd_fast.models.occfm.network import OccfmNetwork

    config = OccfmConfig()
    with torch.device("meta"):
        network = OccfmNetwork(config)
        window = torch.empty(1, config.frames, *config.latent_shape)
        t, steps = torch.empty(1), torch.empty(1, config.frames, 2)
        future = torch.empty(1, *config.sample_shape)
    whole = operations_of(lambda: velocity(network, window, t, steps))
    assert abs(whole / 291.7e9 - 1) < 0.01
    cond = {"history": window[:, : config.history], "trajectory": steps}
    assert 0.95 * whole < operations_of(network, future, t, cond) < whole


def test_operations_are_those_of_diffusers_by_torchs_counter():
    """Another network for the same function, another counter."""
    pytest.importorskip("diffusers")
    from sana_models import call_theirs, inputs, make_ours, make_theirs

    theirs = make_theirs()
    ours, (x, t, cond) = make_ours(theirs), inputs(2)
    del cond["mask"]
    with torch.no_grad(), torchs_counter() as counter:
        call_theirs(theirs, x, t, cond)
    assert operations_of(ours, x, t, cond) == counter.get_total_flops()


def test_a_cycle_is_the_sum_of_its_phases_by_torchs_counter():
    """Real updates on the CPU with their own draws, against phases traced without storage."""
    config = preset("digits")
    distill = replace(config.distill, aux_updates=2)
    model = shapes_of(config)
    batch, tables = 5, []
    predicted = trace_cycle(model, distill, batch)

    config = replace(config, train=replace(config.train, device="cpu", batch_size=batch))
    from mfd_fast.cli.cost import built

    distiller, next_cond = built(replace(config, distill=distill))
    draw = distiller._draw_table
    distiller._draw_table = lambda cond: tables.append(draw(cond)) or tables[-1]
    with torchs_counter() as counter:
        for update in range(3):
            distiller.step(next_cond(update))
    steps = _trace_steps(MetaDistiller(model, distill), model.cond(batch), 1.0, distill)
    expected = sum(work.flops for name, work in predicted.phases.items() if "integrate" not in name)
    expected += weighted(steps, Counter(tables[0].active)).flops
    assert counter.get_total_flops() == expected
    assert predicted.total.flops == pytest.approx(sum(w.flops for w in predicted.phases.values()))


def test_expected_evaluations_of_uniform_pairs():
    """P(t - r > d) = (1 - d)^2, so E[N] = sum over k of (1 - k h)^2."""
    config = DistillConfig(time_distribution="uniform", step_size=0.02)
    rows = 4
    counts = expected_evaluations(config, rows)
    drawn = sum(n * count for n, count in counts.items()) / rows
    tail = [(1 - k * 0.02) ** 2 for k in range(50)]
    mean = sum(tail)
    variance = sum((2 * k + 1) * p for k, p in enumerate(tail)) - mean**2
    assert abs(drawn - mean) < 4 * math.sqrt(variance / DRAWS)


def test_expected_evaluations_follow_the_runs_own_draws():
    config = DistillConfig(equal_fraction=1.0)
    assert expected_evaluations(config, 3) == {3: pytest.approx(1.0)}
    halved = DistillConfig(max_interval=0.02, min_interval=0.011, step_size=0.01)
    table = make_objective(halved).draw(7, Generator().manual_seed(1))
    assert set(table.active) == {7} and len(table.active) == 2
    assert expected_evaluations(halved, 7) == {7: pytest.approx(2.0)}


def test_rows_without_an_adapter_are_not_charged(sana):
    lanes = (TEACHER, TEACHER_UNCOND, AUX)
    assert adapter_share(sana.backbone, lanes) == 1 / 3
    assert adapter_share(shapes_of(preset("digits")).backbone, lanes) == 1.0


def test_every_operator_of_ours_has_a_cost():
    ours = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("mfd_fast::")
    }
    dispatched = {name for name in ours if not name.endswith("_cuda")}
    assert dispatched <= PRODUCTS.keys() | MEMORY_BOUND


@pytest.mark.parametrize("kind", ["adamw"])
def test_state_of_an_optimizer(kind):
    from mfd_fast.distill.config import OptimConfig
    from mfd_fast.distill.optim import make_optimizer

    parameter = torch.nn.Parameter(torch.zeros(1000))
    parameter.grad = torch.zeros(1000)
    optimizer = make_optimizer([parameter], OptimConfig(kind=kind))
    optimizer.step()
    state = [x for x in optimizer.state[parameter].values() if x.shape == parameter.shape]
    assert sum(x.nbytes for x in state) == 1000 * MOMENT_BYTES[kind]


@pytest.fixture(scope="module")
def digits_estimate():
    device = device_named("card", bf16_tflops=100.0, bandwidth=1e12, memory=1.1e9)
    config = preset("digits")
    config = replace(config, train=replace(config.train, capture="off"))
    return estimate(config, device, assumed(is_captured=False), gpus=4), config, device


def test_the_largest_batch_is_the_largest(digits_estimate):
    run, config, device = digits_estimate
    assert run.largest_batch > config.train.batch_size
    for batch, fits in ((run.largest_batch, True), (run.largest_batch + 2, False)):
        cycle = trace_cycle(shapes_of(config), config.distill, batch)
        assert (
            sum(memory_of(cycle, is_captured=False, has_context=True).values()) <= device.memory
        ) == fits


def test_the_smallest_profile_needs_less_than_the_fastest(digits_estimate):
    run, _, _ = digits_estimate
    assert run.cheapest.seconds <= run.smallest.seconds
    assert run.smallest.bytes < sum(run.memory.values())
    assert run.smallest.optimizer == "adamw8bit" and run.smallest.activation != "none"


def test_communication_grows_with_the_gpus_and_is_in_the_run(digits_estimate):
    run, config, _ = digits_estimate
    waits = [run.communication(n) for n in (1, 2, 4, 8, 16, 512)]
    assert waits[0] == 0 and waits == sorted(waits)
    for end in ("low", "high"):
        cycle = getattr(run.cycle_seconds, end) + run.communication(4)
        assert getattr(run.seconds, end) == pytest.approx(config.train.updates * cycle)
    with pytest.raises(ValueError, match="number of GPUs must be >= 1, got 0"):
        estimate(config, run.device, run.efficiency, gpus=0)


def test_captured_runs_keep_two_pools(digits_estimate):
    run, _, _ = digits_estimate
    memory = memory_of(run.cycle, is_captured=True, has_context=True)
    pools = [size for name, size in memory.items() if name.startswith("graph pool")]
    plain = memory_of(run.cycle, is_captured=False, has_context=True)["activations"]
    assert len(pools) == 2 and max(pools) <= plain < sum(pools)
    on_a_cpu = memory_of(run.cycle, is_captured=True, has_context=False)
    assert "CUDA context" in memory and "CUDA context" not in on_a_cpu


def test_a_phase_takes_what_the_slower_of_host_and_device_takes(digits_estimate):
    run, _, device = digits_estimate
    fast = replace(device, bf16_tflops=1e9, fp32_tflops=1e9, bandwidth=1e21)
    slow = replace(device, bandwidth=1e6)
    for work in run.cycle.phases.values():
        hosts = {}
        for host in (EAGER, COMPILED, REPLAYED):
            used = replace(assumed(is_captured=False), host=host)
            hosts[host] = phase_of(work, fast, used)
            assert hosts[host].seconds == (work.num_ops * host.low, work.num_ops * host.high)
            assert hosts[host].bound == "host"
            busy = phase_of(work, slow, used)
            assert busy.seconds == (busy.device, busy.device) and busy.bound == "device"
        assert hosts[EAGER].seconds > hosts[COMPILED].seconds > hosts[REPLAYED].seconds
    assert Phase(Span(1.0, 3.0), 2.0).bound == "either"
    assert Phase(Span(1.0, 3.0), 2.0).seconds == (2.0, 3.0)
    assert Phase(Span(1.0, 1.0), 2.0, is_sum=True).seconds == (3.0, 3.0)


def test_what_capture_brings_lies_in_the_published_range_of_a_launch():
    """SANA at batch 1 on an H100: the least and the most are the two ends' own."""
    config = preset("sana-1.6b")
    run = estimate(config, device_named("h100"), assumed(is_captured=True))
    eager = next(choice for choice in run.choices if choice.how == "--train.capture off")
    ends = [
        sum(max(work.num_ops * us * 1e-6, run.phases[name].device) for name, work in parts)
        for parts in [run.cycle.phases.items()]
        for us in (31, 42)
    ]
    assert eager.seconds == pytest.approx(ends)
    gain = eager.seconds.low / run.cycle_seconds.low
    assert gain > 1.3 and run.cycle_seconds.low == run.cycle_seconds.high
    printed = text(run)
    assert len(printed.splitlines()) <= 40 and "512" not in printed
    assert "a sample" in printed and "all-reduce" in text(run, scaling=True)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(95.0, "95 s"), (1830.0, "30.5 min"), (10000.0, "2.78 h"), (864000.0, "10 days")],
)
def test_a_duration_is_in_the_unit_that_one_would_say(seconds, shown):
    assert duration(Span(seconds, seconds)) == shown
    assert duration(Span(seconds / 2, seconds)).startswith(f"{float(shown.split()[0]) / 2:.3g}-")


def test_phases_without_a_listener_cost_nothing_and_leave_no_trace():
    distiller = Distiller(
        CopiedBackbone(ImageNetwork(), sample_shape=SAMPLE_SHAPE),
        DistillConfig(guidance=1.0, step_size=0.5),
    )
    assert distiller.phase("aux/generate") is distiller.phase("student/backward")
    distiller.student_step(image_inputs(2)[2])


def test_estimate_from_the_command_line(capsys):
    assert cli.main(["estimate", "digits", "--gpu", "a100", "--gpus", "8", "--batch", "32"]) == 0
    printed = capsys.readouterr().out
    for words in ("batch 32 on each", "assumed, not measured on a GPU", "vendor data sheet",
                 "student/integrate", "It fits in 80 GB", "GPU hours", "predicted"):  # fmt: skip
        assert words in printed
    assert cli.main(["estimate", "digits", "--gpu", "a100", "--scaling"]) == 0
    printed = capsys.readouterr().out
    assert len([line for line in printed.splitlines() if line.startswith("512 ")]) == 1


def test_an_estimate_has_the_evaluations_of_a_cycle_as_set_and_with_fast(capsys):
    """The sums of both columns; a run that is fast already has the same number twice."""
    sums = []
    for words in ([], ["--fast"]):
        assert cli.main(["estimate", "digits", *words]) == 0
        printed = capsys.readouterr().out.partition("evaluations a sample")[2].splitlines()
        rows = [line.split() for line in printed[1:6]]
        values = torch.tensor([[float(x) for x in row[1:]] for row in rows])
        assert (values[:4].sum(0) - values[4]).abs().max() < 0.05 * 4  # of rounded ones
        sums.append(values[4].tolist())
    assert sums[0][1] < 0.62 * sums[0][0] and sums[1] == [sums[0][1]] * 2


def test_the_text_says_by_how_much_a_run_does_not_fit(digits_estimate):
    run, _, device = digits_estimate
    total, least = sum(run.memory.values()), run.smallest.bytes
    small = replace(run, device=replace(device, memory=least - 2e6), cheapest=None, largest_batch=3)
    printed = text(small)
    assert f"does not fit: {(total - least + 2e6) / 1e9:.3g} GB more than" in printed
    assert "Largest batch that fits: 3." in printed
    assert "needs 0.002 GB more: lower --train.batch-size" in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpu", "h10"], "unknown GPU 'h10'.*did you mean 'h100'.*--peak-tflops"),
        (["--gpu", "mine", "--peak-tflops", "10"], "unknown GPU 'mine'.*rtx-pro-6000"),
        (["--gpu", "a100", "--memory", "-3"], "must be > 0"),
        (["--gpus", "0"], "--gpus must be >= 1"),
        (["--batch", "-1"], "--batch must be >= 1"),
    ],
)
def test_a_wrong_estimate_is_one_sentence(argv, message, capsys):
    import re

    assert cli.main(["estimate", "digits", *argv]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and len(error.strip().splitlines()) == 1


def test_predicted_memory_is_what_a_process_needed():
    """The RSS of a process of its own; the other cases are in the committed file."""
    from bench.predict.predicted_memory import CASES, row

    measured = row("occfm-tiny", CASES["occfm-tiny"][1])
    assert abs(measured["ratio"] - 1) < 0.15, measured
    path = Path(__file__).parents[2] / "bench/results/predicted_memory_cpu.json"
    rows = json.loads(path.read_text())["rows"]
    assert {row["case"] for row in rows} == set(CASES)
    assert all(abs(row["ratio"] - 1) < 0.15 for row in rows)


def test_known_devices_are_whole():
    for name in DEVICES:
        device = device_named(name)
        assert device.bf16_tflops > device.fp32_tflops > 0 and device.watts > 0
        assert 1e9 < device.link < device.bandwidth and device.memory >= 24e9


@pytest.mark.parametrize("activation", ["none", "cheap", "block"])
def test_few_blocks_of_sana_counted_are_the_whole_network(activation):
    config = preset("sana-1.6b")
    short = replace(config.distill, aux_updates=1, student_steps=1, step_size=0.5)
    config = replace(config, distill=short, train=replace(config.train, activation=activation))
    counted, whole = cycle_of(config, 1), trace_cycle(shapes_of(config), short, 1)
    for name, work in whole.phases.items():
        ours = counted.phases[name]
        for key in ("flops", "bytes", "num_ops"):
            assert getattr(ours, key) == pytest.approx(getattr(work, key), rel=1e-6), (name, key)
    assert counted.memory.peak == whole.memory.peak and counted.gradients == whole.gradients
    assert counted.persistent == pytest.approx(whole.persistent, rel=1e-6, abs=1000)


def test_float8_does_the_same_work_at_twice_the_rate():
    config = preset("sana-1.6b")
    short = replace(config.distill, aux_updates=1, student_steps=1, step_size=0.5)
    config = replace(config, distill=short)
    plain, rounded = (
        cycle_of(replace(config, train=replace(config.train, float8=is_on)), 1)
        for is_on in (False, True)
    )
    assert rounded.total.flops == plain.total.flops
    copies = rounded.persistent["tables"] - plain.persistent["tables"]
    assert 0.35 < copies / plain.persistent["weights"] < 0.5  # a byte for most of 2-byte weights
    device, efficiency = device_named("h100"), assumed(is_captured=True)
    run = estimate(replace(config, train=replace(config.train, float8=True)), device, efficiency)
    assert "1.0-1.5x of a cycle, not measured" in text(run) and "from 709 outputs" in text(run)
    for phase, is_faster in (("student/integrate", True), ("student/generate", False)):
        ratio = (
            phase_of(rounded.phases[phase], device, efficiency).device
            / phase_of(plain.phases[phase], device, efficiency).device
        )
        assert 0.5 < ratio < 0.8 if is_faster else ratio == 1.0
