"""Where the time of an update goes: by phase, by operator, on any device."""

from mfd_fast.profiling.timer import PhaseTimer

__all__ = ["PhaseTimer"]
