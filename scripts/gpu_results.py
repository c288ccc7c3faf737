"""The result file of scripts/gpu_check.sh.

    python scripts/gpu_results.py collect WORK RESULTS.json    # stages and benchmarks of one run
    python scripts/gpu_results.py unpack RESULTS.json FOLDER   # one file per benchmark

``unpack`` names the files after operator and device: interpolate_nvidia_h100_80gb_hbm3.json.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.record import table, write


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
        device = re.sub(r"\W+", "_", bench["device"].lower()).strip("_")
        rows = bench.pop("rows")
        write(folder / f"{name}_{device}.json", bench, rows)
        print(folder / f"{name}_{device}.json")


if __name__ == "__main__":
    action = {"collect": collect, "unpack": unpack}[sys.argv[1]]
    action(Path(sys.argv[2]), Path(sys.argv[3]))
