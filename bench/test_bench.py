"""``pytest bench --benchmark-only``: the small case of every benchmark through pytest-benchmark."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

from bench.harness import Case, verify

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _params() -> Iterator:
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        module = import_module(f"bench.{path.stem}")
        if not hasattr(module, "cases"):
            continue
        for case in module.cases(DEVICE, True):
            for impl in case.impls:
                if not impl.startswith("compile"):
                    name = f"{module.OP}-{case.shape}-{case.dtype}-{impl}".replace(" ", "_")
                    yield pytest.param(case, impl, id=name)


@pytest.mark.parametrize(("case", "impl"), list(_params()))
def test_bench(benchmark, case: Case, impl: str):
    keep = {"eager": case.impls["eager"], impl: case.impls[impl]}
    verify(Case(**{**vars(case), "impls": keep}))
    args = case.inputs()

    def call() -> None:
        case.impls[impl](*args)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info["bytes_moved"] = case.bytes_moved
    benchmark(call)
