"""What ``bench.suite`` measured, for people: ``report.html`` and ``comparison.png``.

Operators as bars of their speed-up over eager PyTorch, everything else as tables.
"""

import base64
import json
from dataclasses import dataclass
from html import escape
from pathlib import Path

from bench.suite import COLUMNS, Comparison, case_of, columns_of, compare, summary, time_of
from bench.waterfall import ROLES, reference, variants

STYLE = (
    "body{font:15px sans-serif;margin:2em}td,th{padding:2px 10px;text-align:right}"
    "td:first-child{text-align:left}"
)
ROW_INCHES, HEAD_INCHES, WIDTH = 0.22, 0.75, 10.0


@dataclass(frozen=True)
class Table:
    """Cells of text."""

    title: str
    head: list[str]
    rows: list[list[str]]


def report(files: list[Path], folder: Path) -> str:
    """Write page and picture of result files into ``folder``; the summary in one line."""
    results = [json.loads(path.read_text()) for path in files]
    picture = folder / "comparison.png"
    draw(results, picture)
    line, first = summary(results), results[0]
    encoded = base64.b64encode(picture.read_bytes()).decode()
    parts = [
        "<!doctype html><meta charset=utf-8><title>mfd-fast bench</title>",
        f"<style>{STYLE}</style>",
        f"<h1>mfd-fast bench</h1><p>{escape(first['device'])}, {first['threads']} threads, torch "
        f"{escape(first['torch'])}, commit {escape(first['commit'])}, {escape(first['date'])}</p>",
        f"<p>{escape(line)}</p><img src='data:image/png;base64,{encoded}' style='max-width:100%'>",
        *(_html(table_of(result)) for result in results),
    ]
    (folder / "report.html").write_text("\n".join(parts))
    return line


def table_of(result: dict) -> Table:
    """Every row of a result, with the committed one's time where there is one."""
    then = {row.case: row for row in compare(result)}
    if result["op"] == "step":
        return _waterfall(result, then)
    columns, is_operator = columns_of(result), is_of_operator(result)
    head, rows = [], []
    for row in result["rows"]:
        unit, value = time_of(row, columns)
        case = case_of(row, columns)
        known = {name: str(cell) for name, cell in zip(columns.case, case, strict=True) if cell}
        known[unit] = f"{value:.4g}"
        if speed_up := row.get("speedup", row.get("ratio")):
            known["speed-up"] = f"{speed_up:.2f}x"
        if is_operator:
            known["of copy"] = f"{row['copy_fraction']:.0%}"
        known |= _against(then.get(case))
        head += [name for name in known if name not in head]
        rows.append(known)
    return Table(
        result["op"].replace("_", " "), head, [[row.get(name, "") for name in head] for row in rows]
    )


def is_of_operator(result: dict) -> bool:
    """Whether the result is of one operator."""
    return result["op"] not in COLUMNS


def _against(old: Comparison | None) -> dict[str, str]:
    return {} if old is None else {"committed": f"{old.then:.4g}", "now / then": f"{old.ratio:.2f}"}


def _waterfall(result: dict, then: dict[tuple, Comparison]) -> Table:
    """Both roles of every variant on a line: milliseconds a sample, against the literal loop."""
    by_variant = variants(result)
    first = reference(by_variant)
    rows = []
    for variant, roles in by_variant.items():
        cells = [variant, str(roles["student"]["batch"])]
        for role in ROLES:
            seconds, of_first = _a_sample(roles[role]), _a_sample(first[role])
            old = then.get(case_of(roles[role], columns_of(result)))
            cells += [f"{1e3 * seconds:.4g}", f"{of_first / seconds:.2f}x"]
            cells.append("" if old is None else f"{old.ratio:.2f}")
        rows.append(cells)
    head = ["variant", "batch"]
    for role in ROLES:
        head += [f"{role} ms a sample", "speed-up", "now / then"]
    return Table(f"whole updates, {result['config']['model']}", head, rows)


def _a_sample(row: dict) -> float:
    return row["seconds"] / row["batch"]


def _html(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}" for name in table.head)
    lines = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}' for cell in row)}</tr>" for row in table.rows
    )
    return f"<h2>{escape(table.title)}</h2><table><tr>{head}</tr>{lines}</table>"


def draw(results: list[dict], path: Path) -> None:
    """Bars for the operators, a table for each other result, one below the other."""
    from mfd_fast.pictures.grids import new_figure, write_png

    bars = [
        (f"{result['op']}, {row['shape']} {row['dtype']}", row["speedup"])
        for result in results
        if is_of_operator(result)
        for row in result["rows"]
        if row["impl"] == "ours"
    ]
    tables = [table_of(result) for result in results if not is_of_operator(result)]
    sizes = [len(bars)] if bars else []
    sizes += [len(table.rows) + 1 for table in tables]
    heights = [HEAD_INCHES + ROW_INCHES * size for size in sizes]
    figure = new_figure(WIDTH, sum(heights))
    top = sum(heights)
    for number, (size, height) in enumerate(zip(sizes, heights, strict=True)):
        top -= height
        low, tall = (top + 0.3) / sum(heights), ROW_INCHES * size / sum(heights)
        if bars and number == 0:
            _draw_bars(figure.add_axes((0.36, low, 0.6, tall)), bars)
        else:
            axis = figure.add_axes((0.03, low, 0.94, tall))
            _draw_table(axis, tables[number - bool(bars)])
    write_png(figure, path)


def _draw_bars(axis, bars: list[tuple[str, float]]) -> None:
    from mfd_fast.pictures.grids import INK, plain_axis

    plain_axis(axis)
    names, values = zip(*bars, strict=True)
    axis.bar_label(axis.barh(names, values, color="#2b6cb0"), fmt="%.2f", fontsize=7, padding=2)
    axis.axvline(1.0, color=INK, lw=0.8)
    axis.set_xlim(0, 1.1 * max(values))
    axis.set_ylim(len(bars) - 0.5, -0.5)
    axis.tick_params(labelsize=7)
    axis.set_title("speed-up over eager PyTorch", fontsize=10, loc="left")


def _draw_table(axis, table: Table) -> None:
    from mfd_fast.pictures.grids import GRID, INK

    axis.set_axis_off()
    axis.set_title(table.title, fontsize=10, loc="left", color=INK)
    drawn = axis.table(table.rows, colLabels=table.head, bbox=(0, 0, 1, 1), edges="horizontal")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(7)
    for (_, column), cell in drawn.get_celld().items():
        cell.set_edgecolor(GRID)
        cell.get_text().set_ha("left" if column == 0 else "right")
        cell.PAD = 0.02
