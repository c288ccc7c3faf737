"""Renders the README's tables from the committed result files, and nothing else."""

import json
import re
from collections.abc import Iterable

from bench.pages import families
from bench.results import RESULTS, markdown, read
from mfd_fast.models.digits.evaluate import COLUMNS
from mfd_fast.run.environment import ROOT

README = ROOT / "README.md"


def digits_table() -> str:
    """Teacher and both students of ``mfd-fast distill digits``."""
    columns = COLUMNS[1:]  # the first is the name
    runs = {name: read(f"digits_{name}_cpu.json") for name in ("mfd", "vsd")}
    rows = []
    for row in runs["mfd"]["table"]:
        name = row["name"].replace("student", "student by MFD")
        rows.append([name] + [format(row[key], form) for _, key, form in columns])
    student = next(row for row in runs["vsd"]["table"] if row["name"].startswith("student"))
    name = student["name"].replace("student", "student by VSD")
    rows.append([name] + [format(student[key], form) for _, key, form in columns])
    facts = runs["mfd"]["environment"]
    seconds = ", ".join(f"{name.upper()} {run['seconds']:.0f} s" for name, run in runs.items())
    updates = runs["mfd"]["updates"]
    caption = (
        f"`mfd-fast distill digits` with each objective: {updates['student']} student and "
        f"{updates['aux']} auxiliary updates; training took {seconds} on {facts['device']}, "
        f"{facts['threads']} threads, torch {facts['torch']}, commit {facts['commit']}."
    )
    return f"{markdown(['sampler', *(c[0] for c in columns)], rows)}\n\n{caption}"


def operator_table() -> str:
    """Every compiled CPU operator against eager PyTorch at its first large fp32 shape."""
    rows, facts = [], None
    for path in sorted(RESULTS.glob("*_cpu.json")):
        result = json.loads(path.read_text())
        if not (ROOT / f"csrc/cpu/{result.get('op')}.h").is_file():
            continue  # a study, or an operator whose CPU implementation is the reference
        facts = facts or result
        for row in result["rows"]:
            if row["impl"] != "ours" or row["dtype"] != "float32":
                continue
            eager = next(
                r["us"]
                for r in result["rows"]
                if r["impl"] == "eager" and (r["shape"], r["dtype"]) == (row["shape"], row["dtype"])
            )
            spread = f"{row['us']:.0f} ({row['us_p10']:.0f}-{row['us_p90']:.0f})"
            rows.append(
                [f"`{result['op']}`, {row['shape']}", f"{eager:.0f}", spread,
                 f"{row['speedup']:.2f}x", f"{row['copy_fraction']:.0%}"]
            )  # fmt: skip
    head = ["operator, shape, fp32", "eager us", "ours us (p10-p90)", "speed-up", "of copy"]
    caption = (
        f"`python -m bench NAME --out bench/results` on {facts['device']}, "
        f"{facts['threads']} threads, torch {facts['torch']}."
    )
    return f"{markdown(head, rows)}\n\n{caption}"


TABLES = {"digits": digits_table, "operators": operator_table, "families": families.table}


def render(text: str, tables: Iterable[str] = TABLES) -> str:
    """A page's text with every one of its tables between its markers made anew."""
    for name in tables:
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end table -->)", re.DOTALL)
        assert pattern.search(text), f"there are no markers for the {name} table"
        table = TABLES[name]()
        text = pattern.sub(lambda m, table=table: f"{m[1]}{table}\n{m[2]}", text)
    return text
