"""What a result must say about where it was taken: device, driver, versions, commit, date."""

import os
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def environment(device: str) -> dict[str, Any]:
    """The facts of one measurement on ``device`` (``"cpu"``, ``"cuda"``), ready for JSON."""
    import torch

    from mfd_fast.ops.extension import build_info

    is_cuda = torch.device(device).type == "cuda"
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": torch.cuda.get_device_name() if is_cuda else cpu_name(),
        "driver": driver.splitlines()[0] if is_cuda and driver else None,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "extension": build_info(),
    }


def commit() -> str:
    """The commit, "-dirty" if the code differs from it; MFD_COMMIT where the package does not lie
    in a repository of its own.

    Results and pages made from them are not code: one run may write several.
    """
    head = _output("git", "rev-parse", "--short=12", "HEAD")
    top = _output("git", "rev-parse", "--show-toplevel")
    if head is None or top is None or not ROOT.samefile(top):  # installed inside a foreign one
        return os.environ.get("MFD_COMMIT", "unknown")
    code = ("--", ".", ":!bench/results", ":!docs", ":!*.md")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", *code)
    return head + ("-dirty" if changed else "")


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None


def cpu_name() -> str:
    """The processor's model, as Linux or Python names it."""
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


PEAK_MEMORY = {
    "cuda": "most bytes that torch's allocator took from the GPU: graph pools and cache included",
    "cpu": "most resident bytes of the process",
}


def peak_memory_counts(device: Any) -> str:
    """What :func:`peak_memory` counts there, for a result to say."""
    import torch

    return PEAK_MEMORY[torch.device(device).type]


def peak_memory(device: Any) -> int:
    """Most bytes so far, of ``PEAK_MEMORY``'s.

    Not ``max_memory_allocated``: what a graph computes with is allocated while it is captured, and
    counts as free when it is replayed.
    """
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    status = Path("/proc/self/status")
    if status.exists():  # a process made by a large one inherits its ru_maxrss
        lines = status.read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
