"""An estimate as the text that ``mfd-fast estimate`` prints."""

from mfd_fast.cost.cycle import is_interval
from mfd_fast.cost.devices import Efficiency
from mfd_fast.cost.estimate import Estimate, Profile
from mfd_fast.cost.measured import uncalibrated
from mfd_fast.cost.operators import FAMILIES

GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
OVERHEAD = "Not counted: text encoding, decoding and writing images, evaluation, reading data."


def text(run: Estimate) -> str:
    """Everything: device, work and time by phase, memory, what fits, the run, more GPUs."""
    parts = [_device(run), _phases(run), _families(run), _memory(run), _fit(run), _run(run)]
    return "\n\n".join([*parts, _scaling(run), OVERHEAD])


def _device(run: Estimate) -> str:
    device, used = run.device, run.efficiency
    batch, together = run.cycle.batch, f" (train.batch_size {run.cycle.batch * run.gpus})"
    return "\n".join(
        [
            f"{run.config.preset} on {run.gpus} x {device.name}, batch {batch} on each"
            f"{together if run.gpus > 1 else ''}",
            f"rates       {device.bf16_tflops:.4g} TFLOP/s 16-bit, {device.fp32_tflops:.4g} "
            f"float32, {device.bandwidth / 1e9:.4g} GB/s ({device.source})",
            f"efficiency  {_efficiency(used)} ({used.source}{uncalibrated(used)})",
        ]
    )


def _efficiency(used: Efficiency) -> str:
    if used.phases:
        roles = [name for name in used.phases if "/" not in name]
        return "of the rates " + ", ".join(
            f"{used.phases[name].share:.0%} in updates of the {name}" for name in roles
        )
    shares = "".join(f"{name} {share:.0%}, " for name, share in used.shares.items())
    least = f"at least {used.host_seconds * 1e6:.2g} us an operator"
    return f"{shares}bandwidth {used.bandwidth:.0%}, {least}"


def _phases(run: Estimate) -> str:
    rows = [
        _phase_row(name, work, run.seconds[name], run.cycle_seconds)
        for name, work in run.cycle.phases.items()
    ]
    rows.append(_phase_row("cycle", run.cycle.total, run.cycle_seconds, run.cycle_seconds))
    table = aligned(["phase", "TFLOP", "GB", "operators", "ms", "share"], rows)
    return f"{_cycle(run)}\n{table}"


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


def _phase_row(name, work, seconds, total) -> list[str]:
    return [name, f"{work.flops / 1e12:.4g}", f"{work.bytes / 1e9:.4g}", f"{work.num_ops:.0f}",
            f"{seconds * 1e3:.4g}", f"{seconds / total:.1%}"]  # fmt: skip


def _families(run: Estimate) -> str:
    parts = run.cycle.total.by_family()
    rows = [
        [name, f"{parts[name].flops / 1e12:.4g}", f"{parts[name].bytes / 1e9:.4g}"]
        for name in FAMILIES
        if name in parts
    ]
    return aligned(["operators", "TFLOP", "GB"], rows)


def _memory(run: Estimate) -> str:
    rows = [[name, f"{size / 1e9:.3f}"] for name, size in run.memory.items() if size]
    total = sum(run.memory.values())
    table = aligned(["memory", "GB"], [*rows, ["sum", f"{total / 1e9:.3f}"]])
    others = run.config.beside_the_updates().items()
    return table + "".join(f"\nonly between updates: {name} {x / 1e9:.3f} GB" for name, x in others)


def _fit(run: Estimate) -> str:
    limit, total = run.device.memory, sum(run.memory.values())
    if total <= limit:
        verdict = f"It fits in {limit / 1e9:.4g} GB; the largest batch that does: "
        verdict += f"{run.largest_batch} (this profile)."
    else:
        verdict = f"It does not fit: {(total - limit) / 1e9:.3g} GB more than the "
        verdict += f"{limit / 1e9:.4g} GB there are. Largest batch that fits: {run.largest_batch}."
    if run.cheapest is not None:
        return f"{verdict}\nFastest profile that fits at this batch: {_profile(run.cheapest)}."
    fewer = "lower --train.batch-size, or " if run.cycle.batch > 1 else ""
    return (
        f"{verdict}\nNo profile fits at this batch; the smallest, {_profile(run.smallest)}, needs "
        f"{(run.smallest.bytes - limit) / 1e9:.3g} GB more: {fewer}take a larger GPU."
    )


def _profile(profile: Profile) -> str:
    return (
        f"--train.activation {profile.activation} with {profile.optimizer} "
        f"({profile.bytes / 1e9:.3g} GB, {profile.seconds * 1e3:.4g} ms a cycle)"
    )


def _run(run: Estimate) -> str:
    energy = f", at most {run.kilowatt_hours:.3g} kWh" if run.device.watts else ""
    return (
        f"The run: {run.config.train.updates} student updates, {run.cycles:.0f} cycles, "
        f"{run.hours:.3g} h, {run.hours * run.gpus:.3g} GPU hours{energy}."
    )


def _scaling(run: Estimate) -> str:
    if not is_interval(run.config.distill):
        return f"{run.config.distill.objective} trains in one process, on one GPU."
    rows, samples = [], run.cycle.batch * run.config.distill.student_updates
    for gpus in GPUS:
        waiting = run.communication(gpus)
        total = run.cycle_seconds + waiting
        rows.append([str(gpus), f"{waiting * 1e3:.3g}", f"{waiting / total:.1%}",
                     f"{gpus * samples / total:.4g}"])  # fmt: skip
    head = ["GPUs", "all-reduce ms a cycle", "share", "student samples/s"]
    student = run.cycle.gradients["student"] / 1e6
    caption = f"Gradients of one role, {student:.4g} MB, summed once an update (assumed links)"
    return f"{caption}\n{aligned(head, rows)}"


def side_by_side(run: Estimate, measured: dict[str, float]) -> str:
    """Predicted and measured milliseconds of a cycle by phase."""
    rows = [
        _compared(name, run.seconds.get(name, 0.0), seconds) for name, seconds in measured.items()
    ]
    rows.append(_compared("cycle", run.cycle_seconds, sum(measured.values())))
    return aligned(["phase", "predicted ms", "measured ms", "predicted / measured"], rows)


def _compared(name: str, predicted: float, measured: float) -> list[str]:
    return [name, f"{predicted * 1e3:.4g}", f"{measured * 1e3:.4g}", f"{predicted / measured:.2f}"]


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
