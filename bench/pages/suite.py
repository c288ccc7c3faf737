"""What ``python -m bench`` measured, for people: one page, with the committed results beside it."""

from html import escape
from pathlib import Path

from bench.pages import waterfall
from bench.results import case_of, cells, columns_of, compare, is_timed, summary, time_of

STYLE = (
    "body{font:15px sans-serif;margin:2em}td,th{padding:2px 10px;text-align:right}"
    "td:first-child{text-align:left}meter{width:12em}"
)
Table = tuple[list[str], list[list[str]]]  # head, rows


def write_page(results: list[dict], path: Path) -> None:
    """Every result as a table, speed-ups as bars, the comparison in one line above them."""
    first = results[0]
    facts = (first["device"], f"{first['threads']} threads", f"torch {first['torch']}")
    parts = [
        "<!doctype html><meta charset=utf-8><title>mfd-fast bench</title>",
        f"<style>{STYLE}</style><h1>mfd-fast bench</h1>",
        f"<p>{escape(', '.join(facts))}, commit {first['commit']}, {first['date']}</p>",
        f"<p>{escape(summary(results))}</p>",
    ]
    for result in results:
        if result["op"] == "step":
            title = f"whole updates, {result['config']['model']}"
            parts += [f"<h2>{title}</h2>", _html(*waterfall.times(result))]
        else:
            title = result["op"].replace("_", " ")
            parts.append(f"<h2>{title}</h2>")
        parts.append(_html(*table_of(result)))
    path.write_text("\n".join(parts))


def table_of(result: dict) -> Table:
    """Every row of a result, with the committed one's time where there is one."""
    if not is_timed(result):
        return cells(result["rows"])
    columns, then = columns_of(result), {row.case: row for row in compare(result)}
    head: list[str] = []
    rows = []
    for row in result["rows"]:
        unit, value = time_of(row, columns)
        case = case_of(row, columns)
        known = {name: str(cell) for name, cell in zip(columns.case, case, strict=True) if cell}
        known[unit] = f"{value:.4g}"
        if speed_up := row.get("speedup", row.get("ratio")):
            known["speed-up"] = f"{speed_up:.2f}x"
        if "copy_fraction" in row:
            known["of copy"] = f"{row['copy_fraction']:.0%}"
        if old := then.get(case):
            known |= {"committed": f"{old.then:.4g}", "now / then": f"{old.ratio:.2f}"}
        head += [name for name in known if name not in head]
        rows.append(known)
    return head, [[row.get(name, "") for name in head] for row in rows]


def _html(head: list[str], rows: list[list[str]]) -> str:
    names = "".join(f"<th>{escape(name)}" for name in head)
    lines = "".join(f"<tr>{''.join(map(_cell, row, head))}</tr>" for row in rows)
    return f"<table><tr>{names}</tr>{lines}</table>"


def _cell(text: str, column: str) -> str:
    if column == "speed-up" and text:
        return f"<td><meter max=5 value={text.rstrip('x')}></meter> {text}"
    return f"<td>{escape(text)}"
