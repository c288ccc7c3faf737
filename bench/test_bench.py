"""``pytest bench --benchmark-only``: small cases of the operators' benchmarks, and whole updates.

The updates are those of digits and of a tiny SANA, the variants of ``bench.bench_step`` that this
install has and that share a process; on a GPU of SANA 1.6B too.
"""

import gc
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

from bench.harness import Case, verify
from bench.step_loops import make_updates, variants_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODELS = ("digits", "sana-tiny", *(("sana-1.6b",) if DEVICE == "cuda" else ()))
# No small cases: text encoder and pictures, compilation; operators are chosen once a process.
LEFT_OUT = ("published", "literal compiled", "prepared")
ROUNDS = {"cpu": 3, "cuda": 10}
WARMUP = {"cpu": 1, "cuda": 5}  # updates that are not counted; on a GPU graphs are captured in them


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


def _updates() -> Iterator:
    for model in MODELS:
        for variant in variants_of(model, DEVICE):
            if variant not in LEFT_OUT:
                for role in ("aux", "student"):
                    name = f"{model}-{variant}-{role}".replace(" ", "_")
                    yield pytest.param(model, variant, role, id=name)


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


@pytest.mark.parametrize(("model", "variant", "role"), list(_updates()))
def test_update(benchmark, model: str, variant: str, role: str):
    gc.collect()  # of the update before: a SANA 1.6B is gigabytes, and its closures are cycles
    torch.manual_seed(0)
    update = make_updates(model, variant, DEVICE)[role]

    def call() -> None:
        update()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=ROUNDS[DEVICE], warmup_rounds=WARMUP[DEVICE])
