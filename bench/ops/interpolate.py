"""Noising and flow-matching target, fp32 and bf16: latents of SANA 1024px and of OccFM."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from bench.harness import LATENTS, Case, Operator
from mfd_fast.ops import interpolate_with_target, reference


def inputs(batch: int, n: int, dtype: torch.dtype, device: str) -> tuple:
    x0, noise = torch.randn(2, batch, n, device=device).to(dtype).unbind(0)
    return x0, noise, torch.rand(batch, device=device)


def cases(device: str, smoke: bool) -> Iterator[Case]:
    shapes = LATENTS[:1] if smoke else LATENTS
    for (name, batch, n), dtype in product(shapes, (torch.float32, torch.bfloat16)):
        make = partial(inputs, batch, n, dtype, device)
        yield Case(name, dtype, make, 4 * batch * n * dtype.itemsize)


OPERATOR = Operator(
    cases,
    reference.interpolate,
    interpolate_with_target,
    device_call=lambda run, x0, noise, t: run(x0, noise, t, True),
)
