"""Renders the tables of README and quick start from the committed result files alone."""

import re
from collections.abc import Callable, Mapping

from bench.pages.families import SHORT, cell
from bench.results import markdown, read
from mfd_fast.models.digits.evaluate import COLUMNS
from mfd_fast.run.environment import ROOT

README = ROOT / "README.md"
QUICKSTART = ROOT / "docs/quickstart.md"
RUNS = {  # preset -> what the README calls it
    "sana-1.6b": "SANA 1.6B, 1024 x 1024",
    "flux2-klein-4b": "FLUX.2 klein 4B, 1024 x 1024",
    "occfm": "OccFM, the paper's run",
}


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


def runs_table() -> str:
    """What three whole runs would cost on two cards."""
    result = read("runs_estimate.json")
    gpus = list(result["config"]["gpus"])
    rows = [
        [f"{RUNS[row['preset']]} (`{row['preset']}`)", str(row["steps"]),
         f"{row['updates']:,} x {row['batch']}", *(cell(row[gpu]) for gpu in gpus)]
        for row in result["rows"]
    ]  # fmt: skip
    cards = [SHORT[gpu] for gpu in gpus]
    caption = (
        "**Predicted**: memory and hours of the preset's whole run, text encoding and decoding not "
        "counted; n keeps all activations, c recomputes what is cheap, b whole blocks. "
        "`python -m bench runs --out bench/results`."
    )
    head = ["run", "steps", "student updates x batch", *cards]
    return f"{markdown(head, rows)}\n\n{caption}"


TABLES = {"runs": runs_table}
OF_QUICKSTART = {"digits": digits_table}


def render(text: str, tables: Mapping[str, Callable[[], str]] = TABLES) -> str:
    """A page's text with every table between its markers made anew."""
    for name, make in tables.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end table -->)", re.DOTALL)
        assert pattern.search(text), f"the page has no markers for the {name} table"
        table = make()
        text = pattern.sub(lambda m, table=table: f"{m[1]}{table}\n{m[2]}", text)
    return text
