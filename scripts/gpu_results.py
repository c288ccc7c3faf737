"""The result file of scripts/gpu_check.sh.

    python scripts/gpu_results.py collect WORK RESULTS.json    # stages and benchmarks of one run
    python scripts/gpu_results.py unpack RESULTS.json bench/results   # one file per benchmark
    python scripts/gpu_results.py place WORK bench/results     # the same for a run that goes on

Files are named after benchmark and device, as they are committed: interpolate_h100.json,
step_sana_1_6b_h100.json.  Rows of a file that is there already are kept if it is of the same
commit, device and settings: that is how several runs make one result.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.record import table, write
from bench.suite import case_of, columns_of

# Words of a device's name that are not its model.
BRANDS = ("nvidia", "geforce", "tesla", "quadro")
SAME = ("op", "device", "driver", "torch", "commit", "threads")


def collect(work: Path, results: Path) -> None:
    """One document: why it was skipped, or every stage's status and every benchmark's file."""
    report: dict = {"status": "passed", "stages": [], "bench": {}, "results": {}}
    skipped = work / "skipped"
    if skipped.exists():
        report["status"] = skipped.read_text().strip()
    stages = work / "stages.txt"
    for line in stages.read_text().splitlines() if stages.exists() else []:
        name, status, seconds = line.split()
        report["stages"].append({"name": name, "status": int(status), "seconds": int(seconds)})
        if status != "0":
            report["status"] = "failed"
    for path in sorted(work.glob("bench_*.json")):
        report["bench"][path.stem.removeprefix("bench_")] = json.loads(path.read_text())
    for path in sorted(work.glob("result_*.json")):
        report["results"][path.stem.removeprefix("result_")] = json.loads(path.read_text())
    results.write_text(json.dumps(report, indent=1) + "\n")
    show(report)


def show(report: dict) -> None:
    for name, bench in report["bench"].items():
        copy = bench["config"]["copy_gb_s"]
        print(f"\n{name} on {bench['device']}, copy {copy} GB/s")
        print(table(bench["rows"]))
    for name, result in report["results"].items():
        print(f"\n{name} on {result['device']}", *result["rows"], sep="\n")
    print()
    for stage in report["stages"]:
        verdict = {0: "ok", 124: "out of time", 127: "not found"}.get(stage["status"], "FAILED")
        print(f"{stage['name']:<24} {verdict:<12} {stage['seconds']:>4} s")
    print(f"gpu check: {report['status']}")


def unpack(results: Path, folder: Path) -> None:
    """Write the benchmarks of a result file one by one, each row on a line."""
    report = json.loads(results.read_text())
    for name, bench in (report["bench"] | report["results"]).items():
        put(name, bench, folder)


def place(work: Path, folder: Path) -> None:
    """Write what a run has measured so far as :func:`unpack` will."""
    for path in sorted(work.glob("result_*.json")):
        put(path.stem.removeprefix("result_"), json.loads(path.read_text()), folder)


def put(name: str, bench: dict, folder: Path) -> None:
    """One benchmark's file, with the rows that it has already and these do not."""
    path = folder / f"{name}_{short(bench['device'])}.json"
    rows = bench.pop("rows")
    if path.is_file():
        rows = joined(json.loads(path.read_text()), bench, rows)
    write(path, bench, rows)
    print(path)


def joined(old: dict, bench: dict, rows: list[dict]) -> list[dict]:
    """The rows of both, the new ones in the place of the old; only the new if it is other work."""
    columns, config = columns_of(bench), bench["config"]
    is_same = all(old.get(key) == bench.get(key) for key in SAME)
    if not is_same or any(old["config"].get(key) != config.get(key) for key in columns.config):
        return rows
    by_case = {case_of(row, columns): row for row in [*old["rows"], *rows]}
    if bench["op"] != "step":
        return list(by_case.values())
    from bench.step_loops import VARIANTS

    order = list(VARIANTS)
    return sorted(by_case.values(), key=lambda row: order.index(row["variant"]))


def short(device: str) -> str:
    """``h100`` of "NVIDIA H100 80GB HBM3", ``rtx_4090`` of "NVIDIA GeForce RTX 4090"; ``cpu``."""
    words = re.findall(r"[a-z0-9]+", device.lower())
    if "nvidia" not in words:
        return "cpu"
    words = [word for word in words if word not in BRANDS]
    first = next((i for i, word in enumerate(words) if re.search(r"\d", word)), len(words) - 1)
    return "_".join(words[: first + 1])


if __name__ == "__main__":
    action = {"collect": collect, "unpack": unpack, "place": place}[sys.argv[1]]
    action(Path(sys.argv[2]), Path(sys.argv[3]))
