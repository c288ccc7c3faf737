"""What scripts/gpu_check.sh left in a folder.

    python -m scripts.gpu_results OUT                  # every row, to read
    python -m scripts.gpu_results OUT bench/results    # as files to commit

Rows of a file that is there already are kept if it is of the same commit, device and settings: that
is how several runs make one result.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.results import save, table

STEP_COLUMNS = (
    *("variant", "update", "seconds", "cycles_per_hour"),
    *("peak_mb", "nvml_mb", "launches", "waits"),
)


def results_in(folder: Path) -> Iterator[tuple[str, dict]]:
    """File name and content of every benchmark in a folder."""
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        if "rows" in result:
            yield path.name, result


def show(folder: Path) -> None:
    """Every row, a whole update by what is asked of it first."""
    for name, result in results_in(folder):
        rows = result["rows"]
        if result["op"] == "step":
            rows = [{key: row[key] for key in STEP_COLUMNS} for row in rows]
        print(f"\n{name} on {result['device']}", table(rows), sep="\n")


def place(folder: Path, target: Path) -> None:
    """Write every benchmark as it is committed, each row on a line."""
    for name, result in results_in(folder):
        save(target / name, result, result.pop("rows"))
        print(target / name)


if __name__ == "__main__":
    folder, *target = map(Path, sys.argv[1:])
    place(folder, *target) if target else show(folder)
