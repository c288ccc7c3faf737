"""Loss, distance and gradient from the two end states (planes of one state buffer)."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from bench.harness import LATENTS, Case, Operator
from mfd_fast.ops import mfd_loss_from_ends, reference


def eager(x: Tensor, teacher: Tensor, aux: Tensor, span: Tensor, weight: Tensor) -> tuple:
    """In float32 like the operator, or in float64."""
    wide = (y.to(torch.promote_types(x.dtype, torch.float32)) for y in (x, teacher, aux))
    loss, distance, grad = reference.mfd_loss(*wide, span, weight)
    return loss, distance, grad.to(x.dtype)


def inputs(batch: int, n: int, dtype: torch.dtype, device: str) -> tuple:
    states = torch.randn(batch, 2, n, device=device)
    x = torch.randn(batch, n, device=device) + states[:, 1] - states[:, 0]
    states = states.to(dtype)
    span = 0.1 + torch.rand(batch, device=device)
    return x.to(dtype), states[:, 0], states[:, 1], span, torch.rand(batch, device=device)


def cases(device: str, smoke: bool) -> Iterator[Case]:
    shapes = LATENTS[:1] if smoke else LATENTS
    for (name, batch, n), dtype in product(shapes, (torch.float32, torch.bfloat16)):
        make = partial(inputs, batch, n, dtype, device)
        yield Case(name, dtype, make, 4 * batch * n * dtype.itemsize)


OPERATOR = Operator(cases, eager, mfd_loss_from_ends, device_call=lambda run, *inputs: run(*inputs))
