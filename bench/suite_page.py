"""What ``bench.suite`` measured, for people: ``report.html``, and ``comparison.png`` of operators.

Operators as bars of their speed-up over eager PyTorch, and everything as tables.
"""

import json
from dataclasses import dataclass
from html import escape
from pathlib import Path

from bench.suite import COLUMNS, Comparison, case_of, columns_of, compare, summary, time_of
from bench.waterfall import ROLES, reference, variants
from mfd_fast.pictures import page

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
    bars = [
        (f"{result['op']}, {row['shape']} {row['dtype']}", row["speedup"])
        for result in filter(is_of_operator, results)
        for row in result["rows"]
        if row["impl"] == "ours"
    ]
    line, first = summary(results), results[0]
    place = (
        f"{first['device']}, {first['threads']} threads, torch {first['torch']}, commit "
        f"{first['commit']}, {first['date']}"
    )
    parts = [f"<p>{escape(place)}</p><p>{escape(line)}</p>"]
    if bars:
        draw(bars, folder / "comparison.png")
        parts.append(page.figure(folder / "comparison.png"))
    for found in map(table_of, results):
        parts.append(f"<h2>{escape(found.title)}</h2>{page.table(found.head, found.rows)}")
    page.write_page(folder / "report.html", "mfd-fast bench", parts)
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


def draw(bars: list[tuple[str, float]], path: Path) -> None:
    """Speed-ups of operators by name, one below the other."""
    from mfd_fast.pictures.grids import INK, new_figure, plain_axis, write_png

    figure = new_figure(WIDTH, HEAD_INCHES + ROW_INCHES * len(bars))
    axis = figure.subplots()
    plain_axis(axis)
    names, values = zip(*bars, strict=True)
    axis.bar_label(axis.barh(names, values, color="#2b6cb0"), fmt="%.2f", fontsize=7, padding=2)
    axis.axvline(1.0, color=INK, lw=0.8)
    axis.set_xlim(0, 1.1 * max(values))
    axis.set_ylim(len(bars) - 0.5, -0.5)
    axis.tick_params(labelsize=7)
    axis.set_title("speed-up over eager PyTorch", fontsize=10, loc="left")
    figure.tight_layout()
    write_png(figure, path)
