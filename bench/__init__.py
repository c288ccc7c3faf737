"""Benchmarks, one file per operator: ``python -m bench.bench_<operator>`` or ``pytest bench``."""
