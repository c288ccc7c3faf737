"""What a result file says: the machine, the software, the rows; and the table a person reads."""

import json
import os
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None


def commit() -> str:
    """The commit, "-dirty" if the tree differs from it; MFD_COMMIT where there is no repository."""
    head = _output("git", "rev-parse", "--short=12", "HEAD")
    if head is None:
        return os.environ.get("MFD_COMMIT", "unknown")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return head + ("-dirty" if changed else "")


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def header(op: str, device: str, config: dict) -> dict:
    """Everything but the rows."""
    import torch

    from mfd_fast._ext import build_info

    is_cuda = torch.device(device).type == "cuda"
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "op": op,
        "device": torch.cuda.get_device_name() if is_cuda else _cpu_name(),
        "driver": driver.splitlines()[0] if is_cuda and driver else None,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "extension": build_info(),
        "config": config,
    }


def write(path: Path, head: dict, rows: list[dict]) -> None:
    """One JSON document, one row per line, so that a difference can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    text = json.dumps(head, indent=1)
    path.write_text(f'{text[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')


def table(rows: list[dict], *, with_header: bool = True) -> str:
    """The rows as aligned text."""
    lines = []
    if with_header:
        lines.append(
            f"{'shape':<30} {'dtype':<9} {'impl':<12} {'us':>10} {'p10-p90':>19} "
            f"{'GB/s':>8} {'x eager':>8} {'of copy':>8}"
        )
    for row in rows:
        spread = f"{row['us_p10']:.1f}-{row['us_p90']:.1f}"
        lines.append(
            f"{row['shape']:<30} {row['dtype']:<9} {row['impl']:<12} {row['us']:>10.1f} "
            f"{spread:>19} {row['gb_s']:>8.1f} {row['speedup']:>7.2f}x {row['copy_fraction']:>7.1%}"
        )
    return "\n".join(lines)
