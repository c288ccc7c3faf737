"""All benchmarks of this machine, compared with the committed results of the same device.

    mfd-fast bench --out FOLDER [--smoke] [--only REGEX of names]

Operators, whole updates of digits and SANA, SANA's literal loop, OccFM's network and decoder, and
the device's roofs; on a GPU the updates are those of SANA 1.6B.  ``--smoke``: small shapes and few
variants, to see that all of it runs.  Leaves one JSON a benchmark; ``bench.suite_page`` makes the
report.
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"
OPERATOR = "main(OP, cases)"  # how the benchmark of an operator ends


@dataclass(frozen=True)
class Benchmark:
    """One command of the suite: ``python -m bench.MODULE --out FILE ARGUMENTS``.

    needs: packages without which it is skipped by name.
    """

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        """The packages it needs that are not installed."""
        return [package for package in self.needs if find_spec(package) is None]


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


OPERATORS = Columns(("shape", "dtype", "impl"), ("us",))
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


@dataclass(frozen=True)
class Comparison:
    """One row measured now beside the committed one; ``ratio`` above 1 is slower than then."""

    op: str
    case: tuple[Any, ...]
    now: float
    then: float
    is_rate: bool
    is_ours: bool

    @property
    def ratio(self) -> float:
        return self.then / self.now if self.is_rate else self.now / self.then


def suite(device: str, *, smoke: bool) -> list[Benchmark]:
    """Every benchmark for ``device`` ("cuda" or "cpu"), in the order in which it runs."""
    quick = ("--smoke",) if smoke else ()
    operators = [
        Benchmark(path.stem.removeprefix("bench_"), path.stem, quick)
        for path in sorted((ROOT / "bench").glob("bench_*.py"))
        if OPERATOR in path.read_text()
    ]
    large = "sana-1.6b" if device == "cuda" else "sana-mini"
    size = "tiny" if smoke else large.removeprefix("sana-")
    literal = ("--size", size, "--device", device, *(("--repeats", "2") if smoke else ()))
    return [
        *operators,
        *(
            Benchmark(f"step-{model}", "bench_step", ("--model", model, *quick))
            for model in ("digits", "sana-tiny" if smoke else large)
        ),
        Benchmark("sana-literal", "bench_sana", literal, needs=("diffusers", "peft")),
        Benchmark("occfm-network", "bench_occfm", quick),
        Benchmark("occfm-decoder", "bench_occfm_decoder", quick),
        Benchmark("roofline", "roofline"),
    ]


def benchmarks(only: str = "", *, smoke: bool = False) -> list[Benchmark]:
    """Those of this machine whose name the regex finds; ``ValueError`` if it finds none.

    A line on stdout names what is skipped for a missing package.
    """
    every = suite("cuda" if torch.cuda.is_available() else "cpu", smoke=smoke)
    try:
        found = [one for one in every if re.search(only, one.name)]
    except re.error as error:
        raise ValueError(f"--only must be a regular expression, got {only!r}: {error}") from None
    if not found:
        names = [one.name for one in every]
        raise ValueError(f"--only {only!r} finds no benchmark; there is {names}")
    for one in found:
        if one.missing:
            print(f"skipped: {one.name} (needs {' and '.join(one.missing)}, not installed)")
    able = [one for one in found if not one.missing]
    if not able:
        packages = " ".join(found[0].missing)
        raise ValueError(f"nothing is left to run; install what it needs: pip install {packages}")
    return able


def run(chosen: list[Benchmark], folder: Path) -> tuple[list[Path], list[str]]:
    """Each in a process of its own; the files that they left, and a sentence for each that failed.

    A benchmark that fails keeps what it had measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files, failed = [], []
    for one in chosen:
        path = folder / f"{one.name}.json"
        command = [sys.executable, "-m", f"bench.{one.module}", "--out", str(path), *one.arguments]
        print(f"== {one.name}", flush=True)
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        if status:
            failed.append(f"{one.name} (bench.{one.module}) failed with status {status}")
        if path.exists():
            files.append(path)
    return files, failed


def columns_of(result: dict) -> Columns:
    """How to read the rows of a result."""
    return COLUMNS.get(result["op"], OPERATORS)


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
        Comparison(
            result["op"],
            case_of(row, columns),
            time_of(row, columns)[1],
            before[case_of(row, columns)],
            columns.is_rate,
            is_ours(row),
        )
        for row in result["rows"]
        if case_of(row, columns) in before
    ]


def _committed(result: dict, columns: Columns) -> list[dict]:
    """Committed results that ``result`` may be compared with."""
    found = []
    for path in RESULTS.glob("*.json"):
        old = json.loads(path.read_text())
        same = all(old.get(key) == result[key] for key in ("op", "device", "threads"))
        if same and all(old["config"].get(k) == result["config"].get(k) for k in columns.config):
            found.append(old)
    return found


def summary(results: list[dict]) -> str:
    """How fast this machine is against the committed results, in one line."""
    rows = [row for result in results for row in compare(result)]
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
