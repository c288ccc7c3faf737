"""Forecasts of occupancy beside each other, from above: one PNG, or a moving GIF."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from mfd_fast.files.whole import written
from mfd_fast.models.occfm.birds_eye import COLOURS, birds_eye_view, shown_classes
from mfd_fast.models.occfm.data.classes import FRAME_SECONDS
from mfd_fast.pictures.grids import INK, new_figure, write_png

CELL_INCHES = 1.75  # of the PNG: six cells and the row labels are 1,800 pixels
LABEL_INCHES = 1.5
PANEL_INCHES = 2.6  # of the GIF
GAP_INCHES = 0.06
TITLE_INCHES = 0.75
LEGEND_INCHES = 0.85
LEGEND_COLUMN_INCHES = 1.5
OFFICIAL_SIZE = 200  # voxels of 0.4 m
EGO = {"marker": "^", "markersize": 7, "color": "#111111", "markeredgecolor": "white"}


def forecast_grid(
    rows: Mapping[str, Tensor], path: str | Path, title: str, *, seen: Tensor | None = None
) -> None:
    """One row of pictures per name, one column per future frame, as a PNG.

    Args:
        rows: name -> class ids uint8 ``[frames, X, Y, Z]`` of one window, in the ego frame of each
            frame; all of one shape.  Truth first.
        path: the PNG; its folder is made if it is missing.
        title: one line above the picture.
        seen: the last frame of the history, ``[X, Y, Z]``: a column before the others.

    Raises:
        ValueError: no rows, or rows of different shapes.
    """
    grids = _checked(rows, "forecast_grid")
    frames, before = len(next(iter(grids.values()))), int(seen is not None)
    width = LABEL_INCHES + (before + frames) * CELL_INCHES
    height = TITLE_INCHES + len(grids) * CELL_INCHES + LEGEND_INCHES
    figure = new_figure(width, height)
    axes = figure.subplots(len(grids), before + frames, squeeze=False)
    _place(figure, width, height, left=LABEL_INCHES, cell=CELL_INCHES)
    for line, (name, row) in zip(axes, grids.items(), strict=True):
        line[0].text(-0.08, 0.5, name, transform=line[0].transAxes, ha="right", va="center",
                     color=INK, fontsize=13)  # fmt: skip
        first = [] if seen is None else [seen.cpu().numpy()]
        for axis, grid in zip(line, [*first, *row], strict=True):
            _draw(axis, grid)
    for i, axis in enumerate(axes[0]):
        axis.set_title(_seconds(i - before), fontsize=13, color=INK)
    _scale_bar(axes[-1, -1], next(iter(grids.values())).shape[2])
    figure.suptitle(title, x=0.15 / width, y=1 - 0.12 / height, ha="left", va="top", color=INK,
                    fontsize=14)  # fmt: skip
    _legend(figure, list(grids.values()))
    write_png(figure, path)


def _scale_bar(axis, size: int) -> None:
    """A quarter of the grid, in metres where it is that of Occ3D-nuScenes."""
    length = size // 4
    text = f"{length * 0.4:g} m" if size == OFFICIAL_SIZE else f"{length} voxels"
    right, low = size * 0.95, size * 0.93
    axis.plot((right - length, right), (low, low), color="#111111", lw=2, solid_capstyle="butt")
    box = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1}
    axis.text(right - length / 2, low - size * 0.03, text, ha="center", va="bottom", fontsize=8,
              color="#111111", bbox=box)  # fmt: skip


def forecast_animation(rows: Mapping[str, Tensor], path: str | Path) -> None:
    """The rows of :func:`forecast_grid` side by side, one future frame after the other, as a GIF.

    It runs at the speed of the data and starts over for ever.
    """
    from PIL import Image

    grids = _checked(rows, "forecast_animation")
    frames = len(next(iter(grids.values())))
    pictures = []
    for i in range(frames):
        picture = Image.fromarray(_panels(grids, i))
        pictures.append(picture.quantize(dither=Image.Dither.NONE))
    with written(path) as partial:
        pictures[0].save(
            partial,
            save_all=True,
            append_images=pictures[1:],
            duration=int(1000 * FRAME_SECONDS),
            loop=0,
        )


def _panels(grids: dict[str, np.ndarray], frame: int) -> np.ndarray:
    """RGB uint8 of all rows at one future frame."""
    width = GAP_INCHES + len(grids) * (PANEL_INCHES + GAP_INCHES)
    height = TITLE_INCHES + PANEL_INCHES + LEGEND_INCHES
    figure = new_figure(width, height)
    axes = figure.subplots(1, len(grids), squeeze=False)[0]
    _place(figure, width, height, left=GAP_INCHES, cell=PANEL_INCHES)
    for axis, (name, row) in zip(axes, grids.items(), strict=True):
        _draw(axis, row[frame])
        axis.set_title(name.replace("\n", " "), fontsize=12, color=INK)
    figure.suptitle(_seconds(frame), x=0.1 / width, y=1 - 0.1 / height, ha="left", va="top",
                    color=INK, fontsize=14, weight="bold")  # fmt: skip
    _legend(figure, list(grids.values()))
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[:, :, :3].copy()


def _checked(rows: Mapping[str, Tensor], caller: str) -> dict[str, np.ndarray]:
    shapes = {name: list(row.shape) for name, row in rows.items()}
    if not rows or len({tuple(shape) for shape in shapes.values()}) > 1:
        raise ValueError(f"{caller}: expected rows of one shape [frames, X, Y, Z], got {shapes}")
    if any(len(shape) != 4 for shape in shapes.values()):
        raise ValueError(f"{caller}: expected class ids [frames, X, Y, Z], got {shapes}")
    return {name: row.cpu().numpy() for name, row in rows.items()}


def _draw(axis, grid: np.ndarray) -> None:
    axis.imshow(birds_eye_view(grid), interpolation="nearest", resample=True)
    axis.plot(grid.shape[1] / 2 - 0.5, grid.shape[0] / 2 - 0.5, **EGO)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color("#9aa5b1")


def _place(figure, width: float, height: float, *, left: float, cell: float) -> None:
    figure.subplots_adjust(
        left=left / width,
        right=1 - GAP_INCHES / width,
        top=1 - TITLE_INCHES / height,
        bottom=LEGEND_INCHES / height,
        wspace=GAP_INCHES / cell,
        hspace=GAP_INCHES / cell,
    )


def _legend(figure, grids: list[np.ndarray]) -> None:
    """The classes that the pictures show."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    ego = Line2D([], [], linestyle="none", label="ego car, heading up", **EGO)
    patches = [
        Patch(facecolor=COLOURS[name], edgecolor="#9aa5b1", linewidth=0.5,
              label=name.replace("_", " "))
        for name in shown_classes(*grids)
    ]  # fmt: skip
    figure.legend(
        handles=[*patches, ego],
        loc="lower center",
        ncols=int(figure.get_figwidth() / LEGEND_COLUMN_INCHES),
        frameon=False,
        fontsize=10.5,
        handlelength=1.1,
        columnspacing=1.3,
        labelcolor=INK,
    )


def _seconds(frame: int) -> str:
    return f"+{(frame + 1) * FRAME_SECONDS:.1f} s" if frame >= 0 else "seen last"
