"""LoRA on the auxiliary rows of SANA's fused q, k, v: in place, and forward + backward."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, Operator
from mfd_fast.ops import segmented_lora, segmented_lora_

TOKENS, WIDTH, TARGETS, RANK = 1024, 2240, 3, 64
SCALE = 1.0
# (name, lanes of a sample, samples): teacher with and without condition and the auxiliary, whose
# rows alone have the adapter; one lane: the training roles.
SHAPES = [("sana-1024 x1", 1, 1), ("sana-1024 x3", 3, 1), ("sana-1024 x12", 3, 4)]


def delta(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """PEFT's layers of the only adapter, target by target."""
    parts = [F.linear(F.linear(x, a[0, g]), b[0, g]) * SCALE for g in range(a.shape[1])]
    return torch.cat(parts, dim=-1)


def eager(y: Tensor, x: Tensor, a: Tensor, b: Tensor, rows: Tensor, lanes: int) -> Tensor:
    """What PEFT adds, on the last lane of every sample; that lane is known on the host."""
    if x.requires_grad:
        return y + delta(x, a, b)
    return y[lanes - 1 :: lanes].add_(delta(x[lanes - 1 :: lanes], a, b))


def ours(y: Tensor, x: Tensor, a: Tensor, b: Tensor, rows: Tensor, lanes: int) -> Tensor:
    if x.requires_grad:
        return segmented_lora(y, x, a, b, rows, SCALE)
    return segmented_lora_(y, x, a, b, rows, SCALE)[lanes - 1 :: lanes]


def inputs(lanes: int, samples: int, tokens: int, dtype: torch.dtype, device: str) -> tuple:
    count = lanes * samples
    y = torch.randn(count, tokens, TARGETS * WIDTH, device=device).to(dtype)
    x = torch.randn(count, tokens, WIDTH, device=device).to(dtype)
    a = (torch.randn(1, TARGETS, RANK, WIDTH, device=device) / WIDTH**0.5).to(dtype)
    b = (torch.randn(1, TARGETS, WIDTH, RANK, device=device) / RANK**0.5).to(dtype)
    rows = torch.tensor(([-1] * (lanes - 1) + [0]) * samples, dtype=torch.int32, device=device)
    return y, x, a, b, rows, lanes, y


def cases(device: str, smoke: bool) -> Iterator[Case]:
    shapes = SHAPES[:2] if device == "cpu" else SHAPES
    tokens = 32 if smoke else TOKENS
    wide, narrow = TARGETS * WIDTH, TARGETS * RANK
    forward, whole = WIDTH + 2 * narrow + 2 * wide, 5 * WIDTH + 6 * narrow + 4 * wide
    dtypes = torch.float32, torch.bfloat16
    for (name, lanes, samples), dtype in product(shapes[:1] if smoke else shapes, dtypes):
        for train in (False, True) if lanes == 1 else (False,):
            yield Case(
                name,
                dtype,
                partial(inputs, lanes, samples, tokens, dtype, device),
                bytes_moved=samples * tokens * (whole if train else forward) * dtype.itemsize,
                flops=samples * (3 if train else 1) * 4 * tokens * WIDTH * narrow,
                train=train,
            )


OPERATOR = Operator(cases, eager, ours, trained=("x", "a", "b"), suffix=" + backward")
