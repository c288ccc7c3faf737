"""LoRA on the auxiliary rows of SANA's fused q, k, v: in place, and forward + backward.

python -m bench.bench_segmented_lora [--smoke] [--out FILE.json]
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, main
from mfd_fast.ops import segmented_lora, segmented_lora_

OP = "segmented_lora"
TOKENS, WIDTH, TARGETS, RANK = 1024, 2240, 3, 64
SCALE = 1.0
# (name, lanes of a sample, samples): teacher with and without condition and the auxiliary, whose
# rows alone have the adapter; one lane: the training roles.
SHAPES = [("sana-1024 x1", 1, 1), ("sana-1024 x3", 3, 1), ("sana-1024 x12", 3, 4)]


def _delta(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """PEFT's layers of the only adapter, target by target."""
    parts = [F.linear(F.linear(x, a[0, g]), b[0, g]) * SCALE for g in range(a.shape[1])]
    return torch.cat(parts, dim=-1)


def eager(y: Tensor, x: Tensor, a: Tensor, b: Tensor, rows: Tensor, lanes: int) -> Tensor:
    """What PEFT adds, on the last lane of every sample; that lane is known on the host."""
    return y[lanes - 1 :: lanes].add_(_delta(x[lanes - 1 :: lanes], a, b))


def ours(y: Tensor, x: Tensor, a: Tensor, b: Tensor, rows: Tensor, lanes: int) -> Tensor:
    return segmented_lora_(y, x, a, b, rows, SCALE)[lanes - 1 :: lanes]


def eager_backward(y: Tensor, x: Tensor, a: Tensor, b: Tensor, rows: Tensor) -> tuple:
    out = y + _delta(x, a, b)
    return out, *torch.autograd.grad(out, (x, a, b), y)


def ours_backward(y: Tensor, x: Tensor, a: Tensor, b: Tensor, rows: Tensor) -> tuple:
    out = segmented_lora(y, x, a, b, rows, SCALE)
    return out, *torch.autograd.grad(out, (x, a, b), y)


def _inputs(
    lanes: int, samples: int, dtype: torch.dtype, device: str, needs_grad: bool
) -> tuple[Tensor, ...]:
    count = lanes * samples
    y = torch.randn(count, TOKENS, TARGETS * WIDTH, device=device).to(dtype)
    x = torch.randn(count, TOKENS, WIDTH, device=device).to(dtype)
    a = (torch.randn(1, TARGETS, RANK, WIDTH, device=device) / WIDTH**0.5).to(dtype)
    b = (torch.randn(1, TARGETS, WIDTH, RANK, device=device) / RANK**0.5).to(dtype)
    rows = torch.tensor(([-1] * (lanes - 1) + [0]) * samples, dtype=torch.int32, device=device)
    for tensor in (x, a, b):
        tensor.requires_grad_(needs_grad)
    return (y, x, a, b, rows) if needs_grad else (y, x, a, b, rows, lanes)


def _case(
    name: str, lanes: int, samples: int, dtype: torch.dtype, device: str, needs_grad: bool
) -> Case:
    reference = eager_backward if needs_grad else eager
    wide, narrow = TARGETS * WIDTH, TARGETS * RANK
    elements = TOKENS * (5 * WIDTH + 6 * narrow + 4 * wide) if needs_grad else TOKENS * (
        WIDTH + 2 * narrow + 2 * wide
    )  # fmt: skip
    return Case(
        shape=f"{name} + backward" if needs_grad else name,
        dtype=str(dtype).removeprefix("torch."),
        impls={
            "eager": reference,
            "compile": torch.compile(reference, dynamic=False),
            "ours": ours_backward if needs_grad else ours,
        },
        inputs=partial(_inputs, lanes, samples, dtype, device, needs_grad),
        bytes_moved=samples * elements * dtype.itemsize,
        flops=samples * (3 if needs_grad else 1) * 4 * TOKENS * WIDTH * narrow,
        exact=reference,
    )


def cases(device: str, smoke: bool) -> Iterator[Case]:
    shapes = SHAPES[:2] if device == "cpu" else SHAPES
    for name, lanes, samples in shapes[:1] if smoke else shapes:
        for dtype in (torch.float32, torch.bfloat16):
            yield _case(name, lanes, samples, dtype, device, needs_grad=False)
            if lanes == 1:
                yield _case(name, lanes, samples, dtype, device, needs_grad=True)


if __name__ == "__main__":
    raise SystemExit(main(OP, cases))
