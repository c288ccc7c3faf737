"""Result files: machine, software, settings, a row a line; joined, compared and printed."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.running import Options
from mfd_fast.cost.table import aligned
from mfd_fast.run.environment import ROOT, environment

RESULTS = ROOT / "bench/results"
# Words of a device's name that are not its model.
BRANDS = ("nvidia", "geforce", "tesla", "quadro")
SAME = ("op", "device", "driver", "torch", "commit", "threads")  # of results whose rows are joined


@dataclass(frozen=True)
class Columns:
    """Which columns of a result name a row, and which says how fast it was.

    case: name a row among those of its file.
    times: the first of them that a row has; ``is_rate``: more is faster.
    config: settings of the run that must agree before two files are compared.
    """

    case: tuple[str, ...]
    times: tuple[str, ...]
    config: tuple[str, ...] = ()
    is_rate: bool = False


OPERATORS = Columns(("shape", "dtype", "impl"), ("us",), config=("smoke",))
# "op" of a result -> its columns; every other result is an operator's.
COLUMNS = {
    "step": Columns(
        ("variant", "update", "batch"), ("seconds",), config=("model", "interval", "step")
    ),
    "sana_literal": Columns(("update", "impl"), ("seconds",), config=("size", "interval")),
    "occfm_network": Columns(("shape", "dtype", "impl"), ("ms",)),
    "occfm_decoder": Columns(("frames", "dtype", "impl"), ("ms",), config=("vae",)),
    "roofline": Columns(("kind", "dtype", "side"), ("gb_s", "tflop_s"), is_rate=True),
}
# Implementations and variants that are not this project's: they tell how the machine fares.
OTHERS = ("eager", "compile", "literal", "published")


def header(op: str, device: str, config: dict) -> dict:
    """Everything but the rows."""
    return {"op": op, **environment(device), "config": config}


def write(path: Path, head: dict, rows: list[dict]) -> None:
    """One JSON document, one row per line, so that a difference can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    text = json.dumps(head, indent=1)
    path.write_text(f'{text[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')


def read(name: str) -> dict:
    """A committed result file."""
    return json.loads((RESULTS / name).read_text())


def short(device: str) -> str:
    """``h100`` of "NVIDIA H100 80GB HBM3", ``rtx_4090`` of "NVIDIA GeForce RTX 4090"; ``cpu``."""
    words = re.findall(r"[a-z0-9]+", device.lower())
    if "nvidia" not in words:
        return "cpu"
    words = [word for word in words if word not in BRANDS]
    first = next((i for i, word in enumerate(words) if re.search(r"\d", word)), len(words) - 1)
    return "_".join(words[: first + 1])


def save(path: Path, head: dict, rows: list[dict]) -> None:
    """Write a result; rows that its file has already and these do not stay there.

    If it is of the same commit, device and settings: several runs make one result.  What is not
    compared row by row (a prediction) takes the file's place.
    """
    if path.is_file():
        rows = _joined(json.loads(path.read_text()), head, rows)
    write(path, head, rows)


def _joined(old: dict, head: dict, rows: list[dict]) -> list[dict]:
    """The rows of both, the new ones in the place of the old; only the new if it is other work."""
    columns = columns_of(head)
    is_same = all(old.get(key) == head.get(key) for key in SAME)
    if not is_same or not is_timed(old) or not _same_config(old, head, columns):
        return rows
    by_case = {case_of(row, columns): row for row in [*old["rows"], *rows]}
    if head["op"] != "step":
        return list(by_case.values())
    from bench.updates.variants import VARIANTS

    order = list(VARIANTS)
    return sorted(by_case.values(), key=lambda row: order.index(row["variant"]))


def _same_config(old: dict, new: dict, columns: Columns) -> bool:
    return all(old["config"].get(key) == new["config"].get(key) for key in columns.config)


def record(
    measured: tuple[str, dict, Iterator[list[dict]]], options: Options, path: Path | None
) -> None:
    """Print rows as they come; write them after each batch, so that what is cut off is kept."""
    op, config, batches = measured
    head, rows = header(op, options.device, config), []
    for new in batches:
        print(table(new), flush=True)
        rows += new
        if path:
            save(path, head, rows)
    if not rows:
        raise ValueError(f"--only {options.only!r} finds no case of {op}")


def table(rows: list[dict]) -> str:
    """What rows say in a word or a number, as aligned text; what they nest is in the file."""
    return aligned(*cells(rows))


def cells(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of a table of rows."""
    names = {name: None for row in rows for name, value in row.items() if _is_plain(value)}
    return list(names), [[_cell(row.get(name)) for name in names] for row in rows]


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return str(value) if _is_plain(value) else ""


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """An aligned Markdown table; every column but the first is right-aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    rule = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in [head, *rows]
    ]
    return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])


@dataclass(frozen=True)
class Comparison:
    """One row measured now beside the committed one; ``ratio`` above 1 is slower than then."""

    case: tuple[Any, ...]
    now: float
    then: float
    is_rate: bool
    is_ours: bool

    @property
    def ratio(self) -> float:
        return self.then / self.now if self.is_rate else self.now / self.then


def columns_of(result: dict) -> Columns:
    """How to read the rows of a result."""
    return COLUMNS.get(result["op"], OPERATORS)


def is_timed(result: dict) -> bool:
    """Whether the rows are cases with a time, to be joined and compared; else a prediction."""
    return all(columns_of(result).case[0] in row for row in result["rows"])


def case_of(row: dict, columns: Columns) -> tuple[Any, ...]:
    """The row's name in its file."""
    return tuple(row.get(name) for name in columns.case)


def time_of(row: dict, columns: Columns) -> tuple[str, float]:
    """The column that says how fast the row was, and its value."""
    name = next(name for name in columns.times if name in row)
    return name, row[name]


def is_ours(row: dict) -> bool:
    """Whether the row is an implementation of this project."""
    name = row.get("impl") or row.get("variant") or ""
    return bool(name) and not name.startswith(OTHERS)


def compare(result: dict) -> list[Comparison]:
    """The rows that the newest committed result of this operator, device and threads has too."""
    columns = columns_of(result)
    before: dict[tuple, float] = {}
    for old in sorted(_committed(result, columns), key=lambda old: old["date"]):
        before |= {case_of(row, columns): time_of(row, columns)[1] for row in old["rows"]}
    return [
        Comparison(case, time_of(row, columns)[1], before[case], columns.is_rate, is_ours(row))
        for row in result["rows"]
        if (case := case_of(row, columns)) in before
    ]


def _committed(result: dict, columns: Columns) -> list[dict]:
    """Committed results that ``result`` may be compared with."""
    found = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    keys = ("op", "device", "threads")
    alike = [old for old in found if all(old.get(key) == result[key] for key in keys)]
    return [old for old in alike if _same_config(old, result, columns)]


def summary(results: list[dict]) -> str:
    """How fast this machine is against the committed results, in one line."""
    rows = [row for result in filter(is_timed, results) for row in compare(result)]
    if not rows:
        return "no committed result of this device and as many threads to compare with"
    parts = [
        f"{name} {median(ratios):.2f}"
        for name, ours in (("this project's", True), ("others'", False))
        if (ratios := [row.ratio for row in rows if row.is_ours == ours])
    ]
    return (
        f"{len(rows)} rows have a committed result; median time now / then: {', '.join(parts)} "
        "(above 1: slower now)"
    )
