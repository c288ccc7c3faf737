"""A profile as a picture: seconds by phase and operator family, and the memory over a cycle."""

from pathlib import Path

from mfd_fast.cost.profile import OUTSIDE, Profile
from mfd_fast.pictures.grids import FAINT, INK, new_figure, plain_axis, write_png

COLOURS = {
    "product": "#2b6cb0",
    "convolution": "#2f855a",
    "attention": "#c05621",
    "adapter": "#6b46c1",
    "memory": "#d69e2e",
    "optimizer": "#b83280",
    OUTSIDE: "#cbd5e0",
}


def profile_picture(result: Profile, path: str | Path) -> None:
    """Two panels as a PNG; the shares of the families are scaled to the unprofiled seconds."""
    figure = new_figure(11.0, 4.4)
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [3, 2]})
    _phases(left, result)
    _memory(right, result)
    figure.tight_layout()
    write_png(figure, path)


def _phases(axis, result: Profile) -> None:
    names = list(result.phases)
    reached = dict.fromkeys(names, 0.0)
    for family, colour in COLOURS.items():
        widths = [1e3 * _part(result, name, family) for name in names]
        if not any(widths):
            continue
        lefts = [reached[name] for name in names]
        axis.barh(names, widths, left=lefts, color=colour, label=family)
        reached = {name: reached[name] + w for name, w in zip(names, widths, strict=True)}
    longest = max(reached.values())
    for name, value in reached.items():
        axis.text(value + 0.01 * longest, name, f"{value:.1f}", va="center", fontsize=8, color=INK)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12 * longest)
    axis.set_title(
        f"milliseconds of one cycle on {result.device}", fontsize=10, color=INK, loc="left"
    )
    axis.legend(fontsize=8, frameon=False, loc="best")
    plain_axis(axis)


def _part(result: Profile, phase: str, family: str) -> float:
    parts = result.families.get(phase, {})
    whole = sum(parts.values())
    return result.phases[phase] * parts.get(family, 0.0) / whole if whole else 0.0


def _memory(axis, result: Profile) -> None:
    sizes = [size / 1e6 for _, size in result.memory]
    axis.plot(sizes, color=COLOURS["product"], linewidth=1.0)
    axis.fill_between(range(len(sizes)), sizes, color=COLOURS["product"], alpha=0.15)
    student = [i for i, (phase, _) in enumerate(result.memory) if phase.startswith("student/")]
    if student:
        axis.axvspan(student[0], student[-1], color=FAINT, alpha=0.2, label="student update")
        axis.legend(fontsize=8, frameon=False, loc="upper left")
    axis.set_ylim(0, 1.15 * max(sizes, default=1.0))
    axis.set_xlabel("operators", fontsize=9, color=INK)
    axis.set_title("MB alive of what the cycle made", fontsize=10, color=INK, loc="left")
    plain_axis(axis)
