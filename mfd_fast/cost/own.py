"""What a machine of one's own can do, measured once by ``mfd-fast calibrate`` and kept.

Rates of a large matmul and a large copy, and the host's seconds an operator: a cycle of a SANA so
small that launching is all that it takes, from Python and, on a GPU, as CUDA graphs.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mfd_fast.cost.devices import (
    ASSUMED_SHARES,
    COMPILED,
    EAGER,
    REPLAYED,
    Device,
    Efficiency,
    Host,
    this_machine,
)
from mfd_fast.cost.measured import is_board, measured_phases
from mfd_fast.cost.trace import Trace
from mfd_fast.distill.distiller import Distiller
from mfd_fast.files.plain import read_json
from mfd_fast.files.whole import write_text

CYCLES = 10  # timed, after those in which graphs are captured
WARMUPS = 5  # cycles

Make = Callable[[str], tuple[Distiller, Any]]  # "off" or "on" -> a small distiller, its condition


def folder() -> Path:
    """Where calibrations of this user lie."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "mfd_fast" / "calibration"


def measure(make: Make) -> Path:
    """Measure the device at hand; returns the file that says what was found."""
    device = this_machine()
    launches = {EAGER.how: launch_seconds(make, "off")}
    if device.is_gpu:
        launches[REPLAYED.how] = launch_seconds(make, "on")
    path = folder() / f"{re.sub(r'[^a-z0-9]+', '-', device.name.lower()).strip('-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"device": asdict(device), "launches": launches}, indent=1))
    return path


def launch_seconds(make: Make, capture: str) -> float:
    """Seconds an operator of a small network; the operators are those of its eager cycle."""
    eager, cond = make("off")
    eager.step(cond)
    with Trace() as trace:
        for _ in range(eager.cycle_length):
            eager.step(cond)
    operators = sum(work.num_ops for work in trace.work.values())
    distiller, cond = make(capture)
    for _ in range(WARMUPS * distiller.cycle_length):
        distiller.step(cond)
    return sum(measured_phases(distiller, lambda n: cond, cycles=CYCLES).values()) / operators


def read(path: Path) -> tuple[Device, dict[str, float]]:
    """A device as it was measured, and how it launches -> seconds an operator."""
    found = read_json(path)
    return Device(**found["device"]), found["launches"]


def known(named: Device, *, is_captured: bool) -> tuple[Device, Efficiency] | None:
    """The device as it was measured here, and how it launches; None if it was not.

    named: a data sheet, whose name has to be in the measured one's, or this machine.
    """
    for path in sorted(folder().glob("*.json")):
        device, launches = read(path)
        how = REPLAYED.how if is_captured else EAGER.how
        if how not in launches or not _is_of(named.name, device):
            continue
        hosts = tuple(
            host if host == COMPILED else Host(launches[host.how], launches[host.how], host.how)
            for host in (EAGER, COMPILED, REPLAYED)
            if host == COMPILED or host.how in launches
        )
        host = next(host for host in hosts if host.how == how)
        shares = dict.fromkeys(ASSUMED_SHARES, 1.0)
        source = f"of what large operators reach; measured here, {path}"
        device = replace(device, watts=named.watts, link=named.link, source=f"measured, {path}")
        return device, Efficiency(shares, 1.0, host, source, hosts=hosts)
    return None


def _is_of(name: str, device: Device) -> bool:
    return name == device.name or (device.is_gpu and is_board(name, device.name))
