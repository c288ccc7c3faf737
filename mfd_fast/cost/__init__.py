"""What a run costs before it starts: operations, bytes, memory and time, from a trace of shapes."""

from mfd_fast.cost.cycle import CycleCost, MetaModel, trace_cycle
from mfd_fast.cost.devices import DEVICES, Device, Efficiency, device_named, this_machine
from mfd_fast.cost.estimate import Estimate, estimate
from mfd_fast.cost.trace import Trace, Work

__all__ = [
    "DEVICES",
    "CycleCost",
    "Device",
    "Efficiency",
    "Estimate",
    "MetaModel",
    "Trace",
    "Work",
    "device_named",
    "estimate",
    "this_machine",
    "trace_cycle",
]
