"""What ``python -m bench`` measured, for people: one page, with the committed results beside it."""

from html import escape
from pathlib import Path

from bench.pages import waterfall
from bench.results import case_of, cells, columns_of, compare, is_timed, summary, time_of
from mfd_fast.pictures import page

Table = tuple[list[str], list[list[str]]]  # head, rows


def write_page(results: list[dict], path: Path) -> None:
    """Every result as a table, the comparison in one line above them."""
    first = results[0]
    facts = (first["device"], f"{first['threads']} threads", f"torch {first['torch']}")
    parts = [
        f"<p>{escape(', '.join(facts))}, commit {first['commit']}, {first['date']}</p>",
        f"<p>{escape(summary(results))}</p>",
    ]
    for result in results:
        if result["op"] == "step":
            title = f"whole updates, {result['config']['model']}"
            parts += [f"<h2>{title}</h2>", page.table(*waterfall.times(result))]
        else:
            title = result["op"].replace("_", " ")
            parts.append(f"<h2>{title}</h2>")
        parts.append(page.table(*table_of(result)))
    page.write_page(path, "mfd-fast bench", parts)


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
