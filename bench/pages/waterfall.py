"""A result of ``bench.updates.step`` as tables and as a picture: seconds by phase and variant."""

import json
from pathlib import Path

from bench.results import markdown

ROLES = ("aux", "student")
REFERENCE = ("literal", "sequential")  # what ratios are to: the first of these that was measured
# Parts of an update in the order they run; ``finish`` and ``update`` are whole graphs.
COLOURS = {
    "encode": "#718096",
    "generate": "#2b6cb0",
    "forward": "#2c7a7b",
    "integrate": "#c05621",
    "backward": "#6b46c1",
    "optimizer": "#b83280",
    "image": "#d69e2e",
    "finish": "#6b46c1",
    "update": "#2b6cb0",
    "rest": "#cbd5e0",
}
# Columns of the second table: title, key, scale, format; left out where no row has a number.
DETAILS = (
    ("of matmul throughput", "product_share", 100, "{:.0f}%"),
    ("GFLOP", "gflop", 1, "{:.1f}"),
    ("operators", "operators", 1, "{:d}"),
    ("host reads", "host_reads", 1, "{:d}"),
    ("launches", "launches", 1, "{:d}"),
    ("waits", "waits", 1, "{:d}"),
    ("peak MB", "peak_mb", 1, "{:.0f}"),
    ("NVML MB", "nvml_mb", 1, "{:.0f}"),
    ("J an update", "joules", 1, "{:.1f}"),
)
# Each of these is the one above and one thing more; every other row of ours is one change to the
# last of them.
CUMULATIVE = ("sequential", "lane-packed", "prepared", "fused", "captured")
Variants = dict[str, dict[str, dict]]


def variants(result: dict) -> Variants:
    """variant -> role -> row, in the order of the file."""
    by_variant: Variants = {}
    for row in result["rows"]:
        by_variant.setdefault(row["variant"], {})[row["update"]] = row
    return by_variant


def reference(by_variant: Variants) -> dict[str, dict]:
    """The roles that ratios are to."""
    names = [name for name in REFERENCE if name in by_variant]
    return by_variant[names[0]] if names else next(iter(by_variant.values()))


def parts(row: dict) -> dict[str, float]:
    """Part of the update -> seconds a sample; ``rest`` is in no phase."""
    times = {
        name.split("/")[1]: phase["seconds"]
        for name, phase in row["phases"].items()
        if " > " not in name
    }
    times["rest"] = max(0.0, row["seconds"] - sum(times.values()))
    return {name: seconds / row["batch"] for name, seconds in times.items()}


def times_table(result: dict) -> str:
    """:func:`times` as Markdown."""
    return markdown(*times(result))


def times(result: dict) -> tuple[list[str], list[list[str]]]:
    """Head and rows: milliseconds a sample of both roles, the student's parts, cycles an hour."""
    by_variant = variants(result)
    first = reference(by_variant)
    names = [
        name for name in COLOURS if any(name in parts(r["student"]) for r in by_variant.values())
    ]
    names.remove("rest")
    rows = []
    for variant, roles in by_variant.items():
        cells = [variant, str(roles["student"]["batch"])]
        for role in ROLES:
            seconds = roles[role]["seconds_per_sample"]
            cells += [_spread(roles[role]), f"{first[role]['seconds_per_sample'] / seconds:.2f}x"]
        taken = parts(roles["student"])
        cells += [_short(1e3 * taken[name]) if name in taken else "" for name in names]
        samples = roles["student"]["cycles_per_hour"] * roles["student"]["batch"]
        rows.append([*cells, f"{samples:,.0f}"])
    head = ["variant", "batch", "aux ms (p10-p90)", "ratio", "student ms (p10-p90)", "ratio"]
    return [*head, *names, "cycles/h x batch"], rows


def _spread(row: dict) -> str:
    scale = 1e3 / row["batch"]
    low, high = (_short(scale * row[key]) for key in ("seconds_p10", "seconds_p90"))
    return f"{_short(1e3 * row['seconds_per_sample'])} ({low}-{high})"


def _short(number: float) -> str:
    return f"{number:.4g}" if number < 1000 else f"{number:,.0f}"


def details_table(result: dict) -> str:
    """What the student's update does and holds."""
    by_variant = variants(result)
    students = {name: roles["student"] for name, roles in by_variant.items()}
    known = [
        column for column in DETAILS if any(row[column[1]] is not None for row in students.values())
    ]
    rows = [
        [name, *(_cell(row[key], scale, form) for _, key, scale, form in known)]
        for name, row in students.items()
    ]
    return markdown(["student update", *(column[0] for column in known)], rows)


def _cell(value: float | None, scale: float, form: str) -> str:
    return "" if value is None else form.format(value if scale == 1 else scale * value)


def draw(path: Path, picture: Path) -> None:
    """A result as two panels of bars, stacked by phase."""
    from mfd_fast.pictures.grids import GRID, INK, new_figure, plain_axis, write_png

    result = json.loads(path.read_text())
    by_variant = variants(result)
    figure = new_figure(11.5, 0.34 * len(by_variant) + 1.6)
    shown = set()
    for axis, role in zip(figure.subplots(1, 2), ROLES, strict=True):
        reached = dict.fromkeys(by_variant, 0.0)
        for part, colour in COLOURS.items():
            widths = [1e3 * parts(roles[role]).get(part, 0.0) for roles in by_variant.values()]
            if not any(widths):
                continue
            label = None if part in shown else part
            shown.add(part)
            axis.barh(list(reached), widths, left=list(reached.values()), color=colour, label=label)
            reached = {n: x + w for (n, x), w in zip(reached.items(), widths, strict=True)}
        longest = max(reached.values())
        ends = [_ends(roles[role]) for roles in by_variant.values()]
        whiskers = [[n - low, high - n] for n, low, high in ends]
        axis.errorbar(
            [n for n, _, _ in ends], list(reached), xerr=list(zip(*whiskers, strict=True)),
            fmt="none", ecolor=INK, elinewidth=0.8, capsize=2.5,
        )  # fmt: skip
        for (name, value), (_, _, high) in zip(reached.items(), ends, strict=True):
            at = max(value, high) + 0.01 * longest
            axis.text(at, name, _short(value), va="center", fontsize=8, color=INK)
        axis.invert_yaxis()
        longest = max(longest, *(high for _, _, high in ends))
        axis.set_xlim(0, 1.16 * longest)
        _divide(axis, list(by_variant))
        axis.set_title(f"{role} update, ms a sample", fontsize=10, color=INK, loc="left")
        axis.grid(axis="x", color=GRID)
        axis.set_axisbelow(True)
        plain_axis(axis)
    title = f"{result['config']['model']}, {result['device']}, {result['threads']} thread(s); "
    last = [name for name in by_variant if name in CUMULATIVE][-1]
    title += (
        f"medians, whiskers p10 to p90; below the last dashed line each is one change to {last}"
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=9, color=INK)
    figure.legend(loc="lower center", ncols=len(shown), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    write_png(figure, picture)


def _ends(row: dict) -> tuple[float, float, float]:
    """Milliseconds a sample: median, p10, p90."""
    keys = ("seconds", "seconds_p10", "seconds_p90")
    median, low, high = (1e3 / row["batch"] * row[key] for key in keys)
    return median, min(low, median), max(high, median)


def _divide(axis, names: list[str]) -> None:
    """Lines where the rows stop being others', and where they stop adding up."""
    from mfd_fast.pictures.grids import INK

    adding = [i for i, name in enumerate(names) if name in CUMULATIVE]
    for place in {adding[0], adding[-1] + 1} - {0, len(names)}:
        axis.axhline(place - 0.5, color=INK, lw=0.8, ls="--")
