"""The pictures of the studies: one style, a row of panels."""

from collections.abc import Sequence
from pathlib import Path

from mfd_fast.pictures.grids import INK, new_figure, plain_axis, write_png

BLUE, ORANGE, GREEN, GREY = "#2b6cb0", "#c05621", "#2f855a", "#9aa5b1"
COLOURS = (BLUE, ORANGE, GREEN, "#6b46c1", "#b83280", GREY)


class Figure:
    """A row of ``columns`` panels under one title; draw on ``axes``, then ``save``."""

    def __init__(self, *, columns: int, title: str, height: float = 3.4):
        self.figure = new_figure(max(4.2 * columns, 6.0), height)
        self.axes = list(self.figure.subplots(1, columns, squeeze=False)[0])
        self.figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")

    def save(self, path: Path) -> None:
        """Lay out and write the PNG."""
        for axis in self.axes:
            plain_axis(axis)
        self.figure.tight_layout(rect=(0, 0, 1, 0.98))
        write_png(self.figure, path)


def titled(axis, title: str, x: str = "", y: str = "") -> None:
    """The panel's title and the names of its axes."""
    axis.set_title(title, fontsize=10, color=INK, loc="left")
    axis.set_xlabel(x, fontsize=9, color=INK)
    axis.set_ylabel(y, fontsize=9, color=INK)


def bars(
    axis, names: Sequence[str], values: Sequence[float], spread: Sequence[float], title: str
) -> None:
    """Horizontal bars with a whisker of one standard deviation; the first name on top, in blue."""
    colours = [BLUE if name == "mfd" else GREY for name in names]
    axis.barh(range(len(names)), values, xerr=spread, color=colours, ecolor=INK, capsize=2)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    titled(axis, title)
