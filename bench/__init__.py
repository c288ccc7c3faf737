"""Benchmarks: ``python -m bench [NAME ...]``, or small ones by ``pytest bench``."""
