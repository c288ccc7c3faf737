"""Rows in e4m3: what enters SANA's large matmuls at 1024px, one sample and three lanes of it."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.harness import Case, Operator
from mfd_fast.ops import quantize_rows, reference

TOKENS = 1024
# (lanes, columns): the width, and the hidden width of the gated convolution.
SHAPES = [(1, 2240), (3, 2240), (3, 5600), (12, 2240)]


def eager(x: Tensor) -> tuple[Tensor, Tensor]:
    """The values as bytes, which can be compared on every device."""
    values, scale = reference.quantize_rows(x)
    return values.view(torch.uint8), scale


def ours(x: Tensor) -> tuple[Tensor, Tensor]:
    values, scale = quantize_rows(x)
    return values.view(torch.uint8), scale


def inputs(rows: int, columns: int, device: str) -> tuple[Tensor]:
    return (torch.randn(rows, columns, device=device).bfloat16(),)


def cases(device: str, smoke: bool) -> Iterator[Case]:
    for lanes, columns in SHAPES[:1] if smoke else SHAPES:
        rows = 16 if smoke else lanes * TOKENS
        name = "smoke" if smoke else f"sana-1024 x{lanes} {columns}"
        make = partial(inputs, rows, columns, device)
        yield Case(name, torch.bfloat16, make, 3 * rows * columns)


OPERATOR = Operator(cases, eager, ours, has_exact=False)  # in float64 it is another rounding
