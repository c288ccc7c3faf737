"""Result tables as Markdown that also reads as plain text."""

from collections.abc import Sequence
from typing import Any


def markdown_table(rows: Sequence[dict[str, Any]], columns: Sequence[tuple[str, str, str]]) -> str:
    """An aligned Markdown table.

    Args:
        rows: one dict a line; None is shown as ``-``.
        columns: (title, key of the row, format); the first to the left, the others to the right.
    """
    cells = [[title for title, _, _ in columns]]
    for row in rows:
        values = [(row[key], form) for _, key, form in columns]
        cells.append(["-" if value is None else format(value, form) for value, form in values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(_aligned(line, widths)) + " |" for line in cells]
    rule = "|".join(
        "-" * (width + 2) if i == 0 else "-" * (width + 1) + ":" for i, width in enumerate(widths)
    )
    lines.insert(1, f"|{rule}|")
    return "\n".join(lines)


def _aligned(cells: list[str], widths: list[int]) -> list[str]:
    """Names to the left, numbers to the right."""
    first, *others = zip(cells, widths, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
