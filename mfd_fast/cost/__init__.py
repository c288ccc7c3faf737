"""What a run costs before it starts: operations, bytes, memory and time, from a trace of shapes."""

from mfd_fast.cost.cycle import CycleCost, trace_cycle
from mfd_fast.cost.devices import DEVICES, Device, Efficiency, device_named, this_machine
from mfd_fast.cost.estimate import Estimate, estimate
from mfd_fast.cost.shapes import shapes_of
from mfd_fast.cost.trace import Trace, Work

__all__ = [
    "DEVICES",
    "CycleCost",
    "Device",
    "Efficiency",
    "Estimate",
    "Trace",
    "Work",
    "device_named",
    "estimate",
    "shapes_of",
    "this_machine",
    "trace_cycle",
]
