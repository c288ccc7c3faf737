"""Guidance that keeps a length, three lanes: Qwen-Image's tokens and Lumina 2's rows at 1024px."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.harness import Case, Operator
from mfd_fast.ops import reference, renormalised_guidance

SCALE = 4.0
SHAPES = [("qwen-image", (1, 3, 4096, 64)), ("lumina2", (1, 3, 16, 128, 128))]


def ours(v: Tensor) -> Tensor:
    return renormalised_guidance(v, SCALE)


def eager(v: Tensor) -> Tensor:
    return reference.renormalised_guidance(v, SCALE)


def inputs(shape: tuple, device: str) -> tuple[Tensor]:
    return (torch.randn(shape, device=device).bfloat16(),)


def cases(device: str, smoke: bool) -> Iterator[Case]:
    for name, shape in [("smoke", (1, 3, 8, 16))] if smoke else SHAPES:
        make = partial(inputs, shape, device)
        yield Case(name, torch.bfloat16, make, 4 * torch.Size(shape).numel())


OPERATOR = Operator(cases, eager, ours)
