"""Benchmarks, one file per operator: ``python -m bench.bench_<operator>`` or ``pytest bench``."""

import sys
from pathlib import Path

# tests/support/numerics.py holds the tolerance rule; nothing is timed that does not meet it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))
