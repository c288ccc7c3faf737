"""``pytest bench --benchmark-only``: small cases of the operators, and whole updates.

The updates are those of digits and of a tiny SANA, the variants that this install has and that
share a process; on a GPU of SANA 1.6B too.
"""

import gc
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module

import pytest
import torch

from bench.__main__ import OPERATORS
from bench.harness import verify
from bench.running import Options
from bench.updates.variants import make_loop, variants_of
from mfd_fast.cost.devices import here

OPTIONS = Options(here(), smoke=True)
MODELS = ("digits", "sana-tiny", *(("sana-1.6b",) if OPTIONS.device == "cuda" else ()))
# No small cases: text encoder and pictures, compilation; operators are chosen once a process.
LEFT_OUT = ("published", "literal compiled", "literal regional", "prepared")
ROUNDS = {"cpu": 3, "cuda": 10}
WARMUP = {"cpu": 1, "cuda": 5}  # updates that are not counted; on a GPU graphs are captured in them


def _cases() -> Iterator:
    for name in OPERATORS:
        operator = import_module(f"bench.ops.{name}").OPERATOR
        for case in operator.cases(OPTIONS.device, True):
            impls = operator.implementations(name, case, OPTIONS)
            for impl, run in impls.items():
                words = "-".join((name, *operator.name_of(case).values(), impl)).replace(" ", "_")
                inputs, kept = partial(operator.inputs, case), {"eager": impls["eager"], impl: run}
                check = partial(verify, kept, inputs, operator.exact_of(case), words)
                yield pytest.param(run, inputs, check, id=words)


def _updates() -> Iterator:
    for model in MODELS:
        for variant in variants_of(model, OPTIONS.device):
            for role in () if variant in LEFT_OUT else ("aux", "student"):
                name = f"{model}-{variant}-{role}".replace(" ", "_")
                yield pytest.param(model, variant, role, id=name)


def _waited(run: Callable, *args: object) -> None:
    run(*args)
    if OPTIONS.device == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize(("run", "inputs", "check"), list(_cases()))
def test_bench(benchmark, run: Callable, inputs: Callable, check: Callable):
    check()
    benchmark(_waited, run, *inputs())


@pytest.mark.parametrize(("model", "variant", "role"), list(_updates()))
def test_update(benchmark, model: str, variant: str, role: str):
    gc.collect()  # of the update before: a SANA 1.6B is gigabytes, and its closures are cycles
    torch.manual_seed(0)
    loop, device = make_loop(model, variant, OPTIONS.device), OPTIONS.device
    update = partial(_waited, loop.updates[role])
    benchmark.pedantic(update, rounds=ROUNDS[device], warmup_rounds=WARMUP[device])
