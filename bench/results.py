"""What a result file says: the machine, the software, the rows; and the table a person reads."""

import json
from pathlib import Path

from mfd_fast.run.environment import environment


def header(op: str, device: str, config: dict) -> dict:
    """Everything but the rows."""
    return {"op": op, **environment(device), "config": config}


def write(path: Path, head: dict, rows: list[dict]) -> None:
    """One JSON document, one row per line, so that a difference can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    text = json.dumps(head, indent=1)
    path.write_text(f'{text[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')


def table(rows: list[dict], *, with_header: bool = True) -> str:
    """The rows as aligned text."""
    lines = []
    if with_header:
        lines.append(
            f"{'shape':<30} {'dtype':<9} {'impl':<12} {'us':>10} {'p10-p90':>19} "
            f"{'GB/s':>8} {'x eager':>8} {'of copy':>8}"
        )
    for row in rows:
        spread = f"{row['us_p10']:.1f}-{row['us_p90']:.1f}"
        lines.append(
            f"{row['shape']:<30} {row['dtype']:<9} {row['impl']:<12} {row['us']:>10.1f} "
            f"{spread:>19} {row['gb_s']:>8.1f} {row['speedup']:>7.2f}x {row['copy_fraction']:>7.1%}"
        )
    return "\n".join(lines)
