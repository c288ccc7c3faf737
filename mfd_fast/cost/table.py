"""An estimate as the text that ``mfd-fast estimate`` prints."""

import math

from mfd_fast.backbones.float8 import MIN_OUTPUTS
from mfd_fast.cost.cycle import evaluations_of_lane, forward_evaluations, is_interval
from mfd_fast.cost.devices import Device, Efficiency, Host
from mfd_fast.cost.estimate import Estimate
from mfd_fast.cost.operators import FAMILIES
from mfd_fast.cost.phases import Phase, Span
from mfd_fast.cost.plans import Profile
from mfd_fast.cost.trace import Work
from mfd_fast.run.config import with_fast

GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# Name, seconds, and up to how many of them it is taken.
UNITS = (("s", 1, 120), ("min", 60, 120), ("h", 3600, 72), ("days", 86400, float("inf")))
MOST_BATCH = 1000  # a larger one is no limit to anybody
OVERHEAD = "Not counted: text encoding, decoding and writing images, evaluation, reading data."


def text(run: Estimate, *, scaling: bool = False) -> str:
    """One screen: device, time by phase, what would change it, memory, what fits, the run.

    scaling: the work by family of operators and the table of more GPUs too.
    """
    parts = [_device(run), _phases(run)]
    parts += [_evaluations(run)] if is_interval(run.config.distill) else []
    parts += [_choices(run)] if run.choices else []
    parts += [f"{_memory(run)}\n{_fit(run)}"]
    parts += [_bases(run)] if run.bases else []
    parts += [_families(run), _scaling(run)] if scaling else []
    return "\n\n".join([*parts, f"{_run(run)}\n{OVERHEAD}"])


def _device(run: Estimate) -> str:
    device, used = run.device, run.efficiency
    batch, together = run.cycle.batch, f" (train.batch_size {run.cycle.batch * run.gpus})"
    lines = [
        f"{run.config.preset} on {run.gpus} x {device.name}, batch {batch} on each"
        f"{together if run.gpus > 1 else ''}; all seconds are predicted",
        f"rates       {device.bf16_tflops:.4g} TFLOP/s 16-bit, {device.fp32_tflops:.4g} "
        f"float32, {device.bandwidth / 1e9:.4g} GB/s ({device.source})",
        f"efficiency  {_efficiency(used)} ({used.source})",
    ]
    if run.config.train.float8:
        lines.append(_float8(device, used))
    if not used.phases:
        lines.append(f"launches    {_microseconds(used.host)} an operator, {used.host.how}")
    return "\n".join(lines)


def _float8(device: Device, used: Efficiency) -> str:
    """Quantising moves 3 bytes a term, N outputs save N operations of it at the 16-bit rate."""
    rate = used.shares.get("product", 1.0) * device.bf16_tflops * 1e12
    pays = 3 * rate / (device.bandwidth * used.bandwidth)
    return (
        f"float8      1.0-1.5x of a cycle, not measured on a GPU; pays from {pays:.0f} outputs of "
        f"a product here, and those below {MIN_OUTPUTS} are left alone"
    )


def _efficiency(used: Efficiency) -> str:
    if used.phases:
        roles = [name for name in used.phases if "/" not in name]
        return "of the rates " + ", ".join(
            f"{used.phases[name].share:.0%} in updates of the {name}" for name in roles
        )
    shares = "".join(f"{name} {share:.0%}, " for name, share in used.shares.items())
    return f"{shares}bandwidth {used.bandwidth:.0%}"


def _microseconds(host: Host) -> str:
    return f"{_range(Span(host.low, host.high).times(1e6), '.2g')} us"


def _range(span: Span, form: str = ".4g") -> str:
    """Both ends, or one number where they look the same."""
    low, high = (_number(end, form) for end in span)
    return low if low == high else f"{low}-{high}"


def _number(value: float, form: str) -> str:
    """In the format, without an exponent where it is large."""
    text = f"{value:{form}}"
    return f"{value:,.0f}" if "e+" in text else text


def _gigabytes(size: float) -> str:
    return _number(size / 1e9, ".3g")


def duration(span: Span) -> str:
    """Seconds in the unit that a person would take."""
    name, size, _ = next(unit for unit in UNITS if span.high < unit[2] * unit[1])
    return f"{_range(span.times(1 / size), '.3g')} {name}"


def _phases(run: Estimate) -> str:
    rows = [
        _phase_row(name, work, run.phases[name], run.cycle_seconds)
        for name, work in run.cycle.phases.items()
    ]
    whole, work = run.cycle_seconds, run.cycle.total
    rows.append(["cycle", *_work(work), "", "", _range(whole.times(1e3)), "", "100%"])
    head = ["phase", "TFLOP", "GB", "operators", "host ms", "device ms", "ms", "bound", "share"]
    return f"{_cycle(run)}\n{aligned(head, rows)}"


def _work(work: Work) -> list[str]:
    sizes = (_number(value, ".4g") for value in (work.flops / 1e12, work.bytes / 1e9))
    return [*sizes, f"{work.num_ops:.0f}"]


def _phase_row(name: str, work: Work, phase: Phase, whole: Span) -> list[str]:
    host, seconds = _range(phase.host.times(1e3), ".3g"), phase.seconds
    working = _number(phase.device * 1e3, ".4g")
    return [name, *_work(work), host, working, _range(seconds.times(1e3)),
            phase.bound, f"{seconds.high / whole.high:.0%}"]  # fmt: skip


def _choices(run: Estimate) -> str:
    here = run.cycle_seconds.times(1 / run.cycle.batch)
    rows = [["as above", *_choice(here, here, sum(run.memory.values()))]]
    rows += [[choice.how, *_choice(choice.seconds, here, choice.bytes)] for choice in run.choices]
    return aligned(["a cycle, a sample", "ms", "of the above", "GB"], rows)


def _choice(seconds: Span, here: Span, size: float) -> list[str]:
    ratio = Span(*sorted((seconds.low / here.low, seconds.high / here.high)))
    return [_range(seconds.times(1e3)), f"{_range(ratio, '.2f')}x", _gigabytes(size)]


def _cycle(run: Estimate) -> str:
    distill, cycle = run.config.distill, run.cycle
    counts = {
        "aux": f"{distill.aux_updates} auxiliary",
        "student": f"{distill.student_updates} student",
    }
    updates = " and ".join(counts[role] for role in cycle.gradients)
    caption = f"one cycle of {distill.objective}: {updates} updates"
    if not cycle.evaluations:
        return caption
    times = " of (t, r)" if is_interval(distill) else ""
    return (
        f"{caption}; E[N] = {cycle.evaluations:.2f} evaluations a lane and sample, from the run's "
        f"own draws{times}"
    )


def _evaluations(run: Estimate) -> str:
    """Forward evaluations of a sample in a cycle by phase, as set and with --fast."""
    rows = run.cycle.batch // run.config.distill.micro_batches
    columns = [
        forward_evaluations(distill, evaluations_of_lane(distill, rows))
        for distill in (run.config.distill, with_fast(run.config).distill)
    ]
    table = [[phase, *(f"{column[phase]:.1f}" for column in columns)] for phase in columns[0]]
    table.append(["together", *(f"{sum(column.values()):.1f}" for column in columns)])
    return aligned(["evaluations a sample", "as set", "with --fast"], table)


def _families(run: Estimate) -> str:
    parts = run.cycle.total.by_family()
    rows = [
        [name, f"{parts[name].flops / 1e12:.4g}", f"{parts[name].bytes / 1e9:.4g}"]
        for name in FAMILIES
        if name in parts
    ]
    return aligned(["operators", "TFLOP", "GB"], rows)


def _memory(run: Estimate) -> str:
    parts = " + ".join(
        f"{name} {_gigabytes(size)}" for name, size in run.memory.items() if size > 5e6
    )
    said = f"memory      {_number(sum(run.memory.values()) / 1e9, '.4g')} GB: {parts}"
    if run.swap is not None:
        said += f"\non the host {len(run.swap.swapped)} blocks of the base, "
        said += f"{_gigabytes(run.swap.host_bytes)} GB, which every pass copies at "
        said += f"{run.device.pcie / 1e9:.3g} GB/s (assumed)"
    others = run.config.beside_the_updates().items()
    return said + "".join(f"\nonly between updates: {name} {x / 1e9:.3f} GB" for name, x in others)


def _fit(run: Estimate) -> str:
    limit, total = run.device.memory, sum(run.memory.values())
    if total <= limit:
        verdict = f"It fits in {limit / 1e9:.4g} GB; the largest batch that does: "
        verdict += f"{_batch(run.largest_batch)} (this profile)."
    else:
        verdict = f"It does not fit: {_gigabytes(total - limit)} GB more than the "
        verdict += f"{limit / 1e9:.4g} GB there are. Largest batch that fits: {run.largest_batch}."
    if run.cheapest is not None:
        return f"{verdict}\nFastest profile that fits at this batch: {_profile(run.cheapest)}."
    fewer = "lower --train.batch-size, or " if run.cycle.batch > 1 else ""
    return (
        f"{verdict}\nNo profile fits at this batch; the smallest, {_profile(run.smallest)}, needs "
        f"{_gigabytes(run.smallest.bytes - limit)} GB more: {fewer}take a larger GPU."
    )


def _batch(largest: int) -> str:
    return str(largest) if largest <= MOST_BATCH else f"more than {MOST_BATCH:,}"


def _bases(run: Estimate) -> str:
    """The best plan on every format of the frozen base."""
    rows = []
    for plan in run.bases:
        fits = plan.bytes <= run.device.memory
        host = plan.swap and _gigabytes(plan.swap.host_bytes)
        blocks = f"{len(plan.swap.swapped)}, {host}" if plan.swap else "0"
        way = [plan.activation, plan.optimizer, _gigabytes(plan.bytes), blocks]
        cost = [_range(plan.seconds.times(1e3)), plan.bound] if fits else ["does not fit", ""]
        rows.append([plan.base, *way, *cost])
    head = ["base", "activations", "optimizer", "GB", "host blocks, GB", "ms a cycle", "bound"]
    return aligned(head, rows)


def _flags(profile: Profile) -> str:
    """The options of a plan's base, as they are typed."""
    named = f"--base {profile.base} " if profile.base else ""
    if profile.swap is None or not profile.swap.swapped:
        return named
    return f"{named}--base-memory {math.ceil(profile.swap.resident / 1e7) / 100:g} "


def _profile(profile: Profile) -> str:
    return (
        f"{_flags(profile)}--train.activation {profile.activation} with {profile.optimizer} "
        f"({_gigabytes(profile.bytes)} GB, {_range(profile.seconds.times(1e3))} ms a cycle)"
    )


def _run(run: Estimate) -> str:
    energy = _number(run.kilowatt_hours, ".3g")
    energy = f", at most {energy} kWh" if run.device.watts else ""
    gpus = (
        f", {_range(run.seconds.times(run.gpus / 3600), '.3g')} GPU hours" if run.gpus > 1 else ""
    )
    hours = run.seconds.times(1000 / run.cycles / 3600)
    return (
        f"The run: {run.config.train.updates} student updates in {run.cycles:.0f} cycles: "
        f"{duration(run.seconds)}{gpus}{energy}.\n"
        f"1,000 cycles: {_range(hours, '.3g')} hours, predicted."
    )


def _scaling(run: Estimate) -> str:
    if not is_interval(run.config.distill):
        return f"{run.config.distill.objective} trains in one process, on one GPU."
    rows, samples = [], run.cycle.batch * run.config.distill.student_updates
    for gpus in GPUS:
        waiting = run.communication(gpus)
        whole = run.cycle_seconds.times(1.0, waiting)
        slow, fast = (gpus * samples / seconds for seconds in (whole.high, whole.low))
        rows.append([str(gpus), f"{waiting * 1e3:.3g}", f"{waiting / whole.low:.1%}",
                     _range(Span(slow, fast))])  # fmt: skip
    head = ["GPUs", "all-reduce ms a cycle", "share", "student samples/s"]
    student = run.cycle.gradients["student"] / 1e6
    caption = f"Gradients of one role, {student:.4g} MB, summed once an update (assumed links)"
    return f"{caption}\n{aligned(head, rows)}"


def side_by_side(run: Estimate, measured: dict[str, float]) -> str:
    """Predicted and measured milliseconds of a cycle by phase."""
    rows = [
        _compared(name, run.phases[name].seconds if name in run.phases else Span(0, 0), seconds)
        for name, seconds in measured.items()
    ]
    rows.append(_compared("cycle", run.cycle_seconds, sum(measured.values())))
    return aligned(["phase", "predicted ms", "measured ms", "predicted / measured"], rows)


def _compared(name: str, predicted: Span, measured: float) -> list[str]:
    ratio = _range(predicted.times(1 / measured), ".2f")
    return [name, _range(predicted.times(1e3)), f"{measured * 1e3:.4g}", ratio]


def aligned(head: list[str], rows: list[list[str]]) -> str:
    """A table as text; every column but the first is right-aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    )
