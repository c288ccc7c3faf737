"""The benchmarks, by name; without a name all that this machine is compared by.

    python -m bench                                    # operators, whole updates, OccFM, the roofs
    python -m bench step_sana_mini --out bench/results # step_sana_mini_cpu.json
    python -m bench "step_.*" --smoke                  # names are regular expressions

One runs in this process, several in a process each.  Results are compared with the committed ones
of the same device; with ``--out`` a file NAME_DEVICE.json each is left there (rows that the file
has of the same commit stay), and of several a page, report.html.
"""

import argparse
import json
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from bench.results import record, short, summary
from bench.running import BenchmarkError, Options
from mfd_fast.cost.devices import here
from mfd_fast.run.environment import ROOT

OPERATORS = sorted(path.stem for path in (ROOT / "bench/ops").glob("[a-z]*.py"))
MODELS = ("digits", "sana-tiny", "sana-mini", "sana-1.6b", "occfm-tiny", "occfm-mini", "occfm")
PRESETS = ("digits", "sana-tiny", "sana-600m", "sana-1.6b")


@dataclass(frozen=True)
class Benchmark:
    """``MODULE.benchmark(options, *subject)`` gives "op", settings, and rows in batches.

    needs: packages without which it is skipped by name.
    file: of its result, if not NAME_DEVICE.json; such a prediction depends on no device.
    """

    name: str
    module: str
    subject: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    file: str = ""

    @property
    def missing(self) -> list[str]:
        """The packages it needs that are not installed."""
        return [package for package in self.needs if find_spec(package) is None]

    def path(self, options: Options) -> Path | None:
        """Where its result goes."""
        if options.out is None:
            return None
        device = short(torch.cuda.get_device_name()) if options.device == "cuda" else "cpu"
        return options.out / (self.file or f"{self.name}_{device}.json")


def named(prefix: str, module: str, subjects: tuple[str, ...]) -> list[Benchmark]:
    """One benchmark a model: ``step_sana_1_6b`` is ``step`` of "sana-1.6b"."""
    return [Benchmark(f"{prefix}_{re.sub(r'[-.]', '_', one)}", module, (one,)) for one in subjects]


DIFFUSERS = ("diffusers", "peft")
ALL = [
    *(Benchmark(op, "bench.harness", (op,)) for op in OPERATORS),
    *named("step", "bench.updates.step", MODELS),
    Benchmark("sana_literal", "bench.updates.sana_literal", needs=DIFFUSERS),
    Benchmark("occfm_network", "bench.updates.occfm_network"),
    Benchmark("occfm_decoder", "bench.updates.occfm_decoder"),
    Benchmark("roofline", "bench.predict.roofline"),
    Benchmark("float8_error", "bench.updates.float8_error"),
    *named("estimate", "bench.predict.cycles", PRESETS),
    *named("profile", "bench.predict.cycles", PRESETS),
    Benchmark("predicted_memory", "bench.predict.predicted_memory"),
    Benchmark("base_memory", "bench.predict.base_memory", needs=(*DIFFUSERS, "bitsandbytes")),
    Benchmark("predicted_time", "bench.predict.predicted_time"),
    Benchmark("families", "bench.predict.families", needs=DIFFUSERS, file="families_estimate.json"),
    Benchmark("constants", "bench.predict.constants", needs=DIFFUSERS, file="constants.json"),
    Benchmark("runs", "bench.predict.runs", needs=DIFFUSERS, file="runs_estimate.json"),
    Benchmark("published", "bench.predict.published", needs=DIFFUSERS, file="published.json"),
    Benchmark("published_cost", "bench.predict.published_cost", needs=DIFFUSERS,
              file="published_cost.json"),
    Benchmark("objectives_cost", "bench.predict.objectives_cost", needs=DIFFUSERS,
              file="objectives_cost.json"),
    Benchmark("table4", "bench.predict.table4", file="table4_estimate.json"),
    Benchmark("text_multiple", "bench.predict.text_multiple", file="text_multiple_estimate.json"),
]  # fmt: skip


def suite(device: str, *, smoke: bool) -> list[str]:
    """What runs without a name, in this order."""
    large = "step_sana_1_6b" if device == "cuda" else "step_sana_mini"
    steps = ["step_digits", "step_sana_tiny" if smoke else large]
    return [*OPERATORS, *steps, "sana_literal", "occfm_network", "occfm_decoder", "roofline"]


def chosen(names: list[str], options: Options) -> list[Benchmark]:
    """Benchmarks that the names find; ``ValueError`` if a name finds none, or none can run.

    A line on stdout names what is skipped for a missing package.
    """
    known = {one.name: one for one in ALL}
    found: dict[str, Benchmark] = {}
    for name in names or suite(options.device, smoke=options.smoke):
        try:
            new = {key: one for key, one in known.items() if re.fullmatch(name, key)}
        except re.error as error:
            raise ValueError(f"{name!r} must be a regular expression: {error}") from None
        if not new:
            raise ValueError(f"{name!r} finds no benchmark; there is {list(known)}")
        found |= new
    for one in found.values():
        if one.missing:
            print(f"skipped: {one.name} (needs {' and '.join(one.missing)}, not installed)")
    able = [one for one in found.values() if not one.missing]
    if not able:
        packages = " ".join(next(iter(found.values())).missing)
        raise ValueError(f"nothing is left to run; install what it needs: pip install {packages}")
    return able


def run_here(one: Benchmark, options: Options) -> None:
    """In this process; ``BenchmarkError`` if some of it failed."""
    subject = (one.name.split("_")[0], *one.subject) if "cycles" in one.module else one.subject
    benchmark = import_module(one.module).benchmark
    device = replace(options, device="cpu") if one.file else options
    record(benchmark(device, *subject), device, one.path(options))


def run_each(benchmarks: list[Benchmark], options: Options) -> tuple[list[Path], list[str]]:
    """Each in a process of its own; the files that they left, and a sentence for each that failed.

    A benchmark that fails keeps what it had measured, and stops no other.
    """
    files, failed = [], []
    for one in benchmarks:
        print(f"== {one.name}", flush=True)
        command = [sys.executable, "-m", "bench", one.name, *arguments(options)]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        if status:
            failed.append(f"{one.name} failed with status {status}")
        path = one.path(options)
        if path and path.exists():
            files.append(path)
    return files, failed


def arguments(options: Options) -> list[str]:
    """The options as they were typed."""
    words = ["--device", options.device, "--only", options.only, "--repeats", str(options.repeats)]
    words += ["--smoke"] if options.smoke else []
    words += [] if options.with_compile else ["--no-compile"]
    return words + (["--out", str(options.out)] if options.out else [])


def run(names: list[str], options: Options) -> str:
    """Run the benchmarks; how they compare with the committed results, in one line.

    Raises:
        ValueError: names that find nothing, a folder that holds a report, a benchmark that failed.
    """
    benchmarks = chosen(names, options)
    if len(benchmarks) == 1:
        run_here(benchmarks[0], options)
        return ""
    report = options.out and options.out / "report.html"
    if report and report.exists():
        raise ValueError(f"{options.out} holds a report already; choose another folder with --out")
    files, failed = run_each(benchmarks, options)
    line = ""
    if files:
        from bench.pages.suite import write_page

        results = [json.loads(path.read_text()) for path in files]
        line = f"{summary(results)}\n{report}"
        write_page(results, report)
    if failed:
        raise BenchmarkError("\n".join(filter(None, [line, f"{'; '.join(failed)}: see above"])))
    return line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="none: the suite of this machine")
    parser.add_argument("--smoke", action="store_true", help="small shapes, few variants: it runs")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="leave a JSON each there")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=here())
    parser.add_argument("--only", default="", help="a regex: only cases whose name it finds")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--repeats", type=int, default=0, help="timed updates or cycles of a row")
    args = parser.parse_args(argv)
    out = args.out and args.out.resolve()
    options = Options(args.device, args.smoke, args.only, not args.no_compile, args.repeats, out)
    try:
        if line := run(args.names, options):
            print(line)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1 if isinstance(error, BenchmarkError) else 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
