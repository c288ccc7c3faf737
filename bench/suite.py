"""All benchmarks of this machine, compared with the committed results of the same device.

    mfd-fast bench --out FOLDER [--smoke] [--only REGEX]

Leaves one JSON a benchmark, ``report.html`` and ``comparison.png``.
"""

import base64
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"


@dataclass(frozen=True)
class Comparison:
    """One row measured now beside the committed one; ``ratio`` above 1 is slower than then."""

    op: str
    case: str
    now_us: float
    then_us: float

    @property
    def ratio(self) -> float:
        return self.now_us / self.then_us


def benchmarks(only: str = "") -> list[str]:
    """Names of the operators' benchmarks that the regex finds; ``ValueError`` if it finds none."""
    try:
        names = [
            path.stem.removeprefix("bench_")
            for path in sorted((ROOT / "bench").glob("bench_*.py"))
            if "harness" in path.read_text()
        ]
        found = [name for name in names if re.search(only, name)]
    except re.error as error:
        raise ValueError(f"--only must be a regular expression, got {only!r}: {error}") from None
    if not found:
        raise ValueError(f"--only {only!r} finds no benchmark; there is {names}")
    return found


def run(names: list[str], folder: Path, *, smoke: bool) -> list[Path]:
    """Every benchmark in a process of its own; their files.  ``ValueError`` if one fails."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name in names:
        path = folder / f"{name}.json"
        command = [sys.executable, "-m", f"bench.bench_{name}", "--out", str(path)]
        done = subprocess.run([*command, *(["--smoke"] if smoke else [])], cwd=ROOT, check=False)
        if done.returncode:
            raise ValueError(f"bench.bench_{name} failed with status {done.returncode}, see above")
        files.append(path)
    return files


def compare(result: dict) -> list[Comparison]:
    """Our rows that a committed file of the same operator, device and threads has too."""
    before = {}
    for path in RESULTS.glob(f"{result['op']}_*.json"):
        old = json.loads(path.read_text())
        same = all(old.get(key) == result[key] for key in ("op", "device", "threads"))
        if same:
            before |= {_key(row): row["us"] for row in old["rows"]}
    return [
        Comparison(result["op"], f"{row['shape']} {row['dtype']}", row["us"], before[_key(row)])
        for row in result["rows"]
        if row["impl"] == "ours" and _key(row) in before
    ]


def _key(row: dict) -> tuple[str, str, str]:
    return row["shape"], row["dtype"], row["impl"]


def report(files: list[Path], folder: Path) -> str:
    """Write the HTML page with its picture; the summary in one line."""
    results = [json.loads(path.read_text()) for path in files]
    compared = [row for result in results for row in compare(result)]
    picture = folder / "comparison.png"
    _draw(results, picture)
    if compared:
        middle = median(row.ratio for row in compared)
        summary = f"{len(compared)} cases have a committed result; median now / then {middle:.2f}"
    else:
        summary = "no committed result of this device and as many threads to compare with"
    encoded = base64.b64encode(picture.read_bytes()).decode()
    first = results[0]
    parts = [
        "<!doctype html><meta charset=utf-8><title>mfd-fast bench</title>",
        "<style>body{font:15px sans-serif;margin:2em}td,th{padding:2px 10px;text-align:right}"
        "td:first-child{text-align:left}</style>",
        f"<h1>mfd-fast bench</h1><p>{escape(first['device'])}, {first['threads']} threads, torch "
        f"{escape(first['torch'])}, commit {escape(first['commit'])}, {escape(first['date'])}</p>",
        f"<p>{escape(summary)}</p><img src='data:image/png;base64,{encoded}'>",
        *(_table(result) for result in results),
    ]
    (folder / "report.html").write_text("\n".join(parts))
    return summary


def _table(result: dict) -> str:
    then = {(row.op, row.case): row.then_us for row in compare(result)}
    lines = [
        "<tr><th>case<th>implementation<th>us<th>x eager<th>of copy<th>committed us</tr>",
    ]
    for row in result["rows"]:
        case = f"{row['shape']} {row['dtype']}"
        old = then.get((result["op"], case)) if row["impl"] == "ours" else None
        lines.append(
            f"<tr><td>{escape(case)}<td>{escape(row['impl'])}<td>{row['us']:.1f}"
            f"<td>{row['speedup']:.2f}<td>{row['copy_fraction']:.0%}"
            f"<td>{'' if old is None else f'{old:.1f}'}</tr>"
        )
    return f"<h2>{escape(result['op'])}</h2><table>{''.join(lines)}</table>"


def _draw(results: list[dict], path: Path) -> None:
    """Speed-up of ours over eager PyTorch, a bar a case."""
    from mfd_fast.report.pictures import INK, new_figure, write_png

    rows = [
        (f"{result['op']}, {row['shape']} {row['dtype']}", row["speedup"])
        for result in results
        for row in result["rows"]
        if row["impl"] == "ours"
    ]
    figure = new_figure(8.0, 0.22 * len(rows) + 1.2)
    axis = figure.subplots()
    names, values = zip(*rows, strict=True)
    axis.barh(names, values, color="#2b6cb0")
    axis.axvline(1.0, color=INK, lw=0.8)
    axis.invert_yaxis()
    axis.tick_params(labelsize=7)
    axis.set_title("speed-up over eager PyTorch", fontsize=10, loc="left")
    figure.tight_layout()
    write_png(figure, path)
