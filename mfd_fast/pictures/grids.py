"""Pictures of a run as PNG files: samples side by side, and the curves of training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfd_fast.files.whole import written

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError(
        "pictures need matplotlib, which is not installed; run: pip install 'mfd-fast[digits]'"
    ) from error

DPI = 150
INK = "#1f2933"
FAINT = "#9aa5b1"
GRID = "#e4e7eb"
BORDER = 1  # pixels between two images, before scaling

# Rows of one name wrap after this many images.
MAX_COLUMNS = 20
CELL_INCHES = 0.42
LABEL_INCHES = 1.75
LETTER_INCHES = 0.105  # of a title or a label, the widest on average
GROUP_GAP_INCHES = 0.12

# Curves: key of the history, title of the panel, colour.
CURVES = (
    ("aux_loss", "auxiliary loss (may rise: its student moves)", "#2b6cb0"),
    ("student_loss", "student loss (surrogate: no measure)", "#c05621"),
    ("distance", r"distance $\|u_T - u_A\|_2$: judge by this", "#2f855a"),
)
SMOOTHING_SHARE = 0.03  # the smoothed line averages over about this share of the rows,
SMOOTHED_ROWS = 5  # and over this many at least; fewer than twice as many have no such line
FEW_ROWS = 30  # are drawn as points too


def sample_grid(rows: Mapping[str, Tensor], path: str | Path, title: str) -> None:
    """One labelled group of images per name, all in the same columns, as a PNG.

    Args:
        rows: name -> images ``[n, C, H, W]`` in [-1, 1] (clamped), C = 1 or 3, all of one C, H, W.
        path: the PNG; its folder is made if it is missing.
        title: one line above the picture.

    Raises:
        ValueError: no rows, or images of another shape.
    """
    groups = {name: _montage(images, name) for name, images in rows.items()}
    if len({group.shape[1:] for group in groups.values()}) != 1:
        shapes = {name: list(images.shape) for name, images in rows.items()}
        raise ValueError(
            f"sample_grid: expected rows of equally many images of one size; got {shapes}"
        )
    first = next(iter(rows.values()))
    num_lines = [-(-images.shape[0] // MAX_COLUMNS) for images in rows.values()]
    columns = min(first.shape[0], MAX_COLUMNS)
    label = max(LABEL_INCHES, LETTER_INCHES * max(map(len, rows)))
    width = max(label + columns * CELL_INCHES, LETTER_INCHES * len(title)) + 0.2
    height = 0.45 + sum(num_lines) * CELL_INCHES + GROUP_GAP_INCHES * len(rows)
    gap = GROUP_GAP_INCHES * len(rows) / (sum(num_lines) * CELL_INCHES)  # in mean axis heights
    figure = new_figure(width, height)
    axes = figure.subplots(
        len(rows), 1, squeeze=False, gridspec_kw={"height_ratios": num_lines, "hspace": gap}
    )[:, 0]
    figure.subplots_adjust(
        left=label / width,
        right=(label + columns * CELL_INCHES) / width,
        top=1 - 0.4 / height,
        bottom=0.05 / height,
    )
    for axis, (name, group) in zip(axes, groups.items(), strict=True):
        axis.imshow(group.numpy(), interpolation="nearest")
        axis.set_axis_off()
        axis.text(-0.012, 0.5, name, transform=axis.transAxes, ha="right", va="center", color=INK)
    figure.suptitle(title, x=0.1 / width, y=1 - 0.1 / height, ha="left", va="top", color=INK)
    write_png(figure, path)


def _montage(images: Tensor, name: str) -> Tensor:
    """``[n, C, H, W]`` in [-1, 1] to one picture ``[rows * (H + 1), columns * (W + 1), 3]``."""
    if images.ndim != 4 or images.shape[0] == 0 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"sample_grid: {name} must be images of shape [n, 1 or 3, H, W]; "
            f"got {list(images.shape)}"
        )
    images = (images.detach().cpu().float().clamp(-1, 1) + 1) / 2
    columns = min(images.shape[0], MAX_COLUMNS)
    missing = -images.shape[0] % columns
    images = torch.nn.functional.pad(images, (0, BORDER, 0, BORDER), value=1.0)
    images = torch.cat((images, images.new_ones(missing, *images.shape[1:])))
    lines = images.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)  # rows H columns W C
    return lines.flatten(2, 3).flatten(0, 1).expand(-1, -1, 3)


def training_curves(history: list[dict[str, Any]], path: str | Path) -> None:
    """Losses and mean-flow distance against the student's updates, as a PNG.

    Args:
        history: the trainer's rows: ``update`` and any of ``aux_loss``, ``student_loss``,
            ``distance``; a row may lack a key.
        path: the PNG; its folder is made if it is missing.

    See :func:`draw_curve`.

    Raises:
        ValueError: no row has any of the keys.
    """
    curves = [
        (title, colour, points)
        for key, title, colour in CURVES
        if (points := [(row["update"], row[key]) for row in history if key in row])
    ]
    if not curves:
        raise ValueError(
            f"training_curves: expected rows with some of {[key for key, _, _ in CURVES]}; "
            f"got {len(history)} rows with {sorted({key for row in history for key in row})}"
        )
    figure = new_figure(4.0 * len(curves), 3.0)
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for axis, (title, colour, points) in zip(axes, curves, strict=True):
        draw_curve(axis, points, title, colour)
        axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    write_png(figure, path)


def draw_curve(axis: Any, points: list[tuple], title: str, colour: str) -> None:
    """One run's (update, value): points of few rows, a faint line of many under their average."""
    updates, values = zip(*points, strict=True) if points else ((), ())
    is_few, is_smoothed = len(values) <= FEW_ROWS, len(values) >= 2 * SMOOTHED_ROWS
    axis.plot(
        *(updates, values, "o-" if is_few else "-"),
        color=colour, alpha=0.35 if is_smoothed else 1.0, linewidth=0.9, markersize=3,
        label="each logged row",
    )  # fmt: skip
    if is_smoothed:
        axis.plot(updates, smoothed(values), color=colour, linewidth=1.8, label="moving average")
    axis.set_title(title, fontsize=10, color=INK, loc="left")
    axis.set_xlabel("student updates", fontsize=9, color=INK)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    plain_axis(axis)


def smoothed(values: tuple[float, ...]) -> list[float]:
    """Exponential moving average without the bias of its start; values that are not finite keep
    the average.
    """
    decay = 1.0 - 1.0 / max(SMOOTHED_ROWS, SMOOTHING_SHARE * len(values))
    average, weight, line = 0.0, 0.0, []
    for value in values:
        if value - value == 0.0:
            average = decay * average + (1 - decay) * value
            weight = decay * weight + (1 - decay)
        line.append(average / weight if weight else float("nan"))
    return line


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def plain_axis(axis: Any) -> None:
    """A faint grid behind the data, lines to the left and below only."""
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8, colors=INK)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)


def write_png(figure: Figure, path: str | Path) -> None:
    """Write the figure; its folder is made if it is missing."""
    with written(path) as partial:
        figure.savefig(partial)
