"""What scripts/gpu_check.sh left in a folder.

    python -m scripts.gpu_results OUT                  # every row, to read
    python -m scripts.gpu_results OUT bench/results    # as files to commit

Files are named after benchmark and device: glu_depthwise_h200.json, step_sana_1_6b_h200.json.  Rows
of a file that is there already are kept if it is of the same commit, device and settings: that is
how several runs make one result.
"""

import json
import re
import sys
from pathlib import Path

from bench.record import table, write
from bench.suite import case_of, columns_of

# Words of a device's name that are not its model.
BRANDS = ("nvidia", "geforce", "tesla", "quadro")
STEP_COLUMNS = (
    *("variant", "update", "seconds", "cycles_per_hour"),
    *("peak_mb", "nvml_mb", "launches", "waits"),
)
SAME = ("op", "device", "driver", "torch", "commit", "threads")


def results_in(folder: Path) -> list[dict]:
    """The benchmarks in a folder, by file name."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [result for result in found if "rows" in result]


def name_of(result: dict) -> str:
    """Of its file, without the device: the benchmark, and the model or preset it is of."""
    config = result["config"]
    subject = config.get("model") or config.get("preset")
    return re.sub(r"\W+", "_", "_".join(filter(None, (result["op"], subject))))


def show(folder: Path) -> None:
    """Every row, a whole update by what is asked of it first."""
    for result in results_in(folder):
        print(f"\n{name_of(result)} on {result['device']}")
        if "timing" in result["rows"][0]:
            print(table(result["rows"]))
            continue
        for row in result["rows"]:
            print({key: row[key] for key in STEP_COLUMNS} if result["op"] == "step" else row)


def place(folder: Path, target: Path) -> None:
    """Write every benchmark as it is committed, each row on a line."""
    for result in results_in(folder):
        put(name_of(result), result, target)


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
    folder, *target = map(Path, sys.argv[1:])
    place(folder, *target) if target else show(folder)
