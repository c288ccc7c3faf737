"""OccFM's attention over 12 frames of every pixel, forward and forward + backward, fp32 and fp16.

python -m bench.bench_short_attention [--smoke] [--out FILE.json]

The product is fused, [N, 12, 3, H, D].  The DiT blocks merge row-major without a bias, the older
attention has the bias and the normal merge.  "eager" is the formula, "eager-sdpa" torch's own (its
backward on the CPU is less accurate than the rule allows, so it is timed forward only).
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, main
from mfd_fast.ops import short_attention_qkv

OP = "short_attention"
FRAMES, HEADS = 12, 8
# (name, rows of a sample, head width, has bias): the fine level, its last block, the coarse level,
# and the attention with a bias.
SHAPES = [
    ("dit 50x50x128", 2500, 16, False),
    ("dit 50x50x64", 2500, 8, False),
    ("dit 25x25x256", 625, 32, False),
    ("biased 50x50x256", 2500, 32, True),
]


def _merge(out: Tensor, bias: Tensor | None) -> Tensor:
    """``[N, H, T, D]`` -> ``[N, T, H D]``: row-major in the DiT blocks, which have no bias."""
    rows, heads, tokens, width = out.shape
    return (out if bias is None else out.transpose(1, 2)).reshape(rows, tokens, heads * width)


def eager(qkv: Tensor, bias: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    scores = q.shape[-1] ** -0.5 * (q @ k.mT)
    weights = torch.softmax(scores if bias is None else scores + bias, dim=-1).to(v.dtype)
    return _merge(weights @ v, bias)


def sdpa(qkv: Tensor, bias: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    mask = None if bias is None else bias.to(q.dtype)
    return _merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), bias)


def ours(qkv: Tensor, bias: Tensor | None) -> Tensor:
    return short_attention_qkv(qkv, bias=bias, merge="row_major" if bias is None else "normal")


def step(forward: Callable, qkv: Tensor, bias: Tensor | None, grad: Tensor) -> Tensor:
    """The gradient to the fused product."""
    return torch.autograd.grad(forward(qkv, bias), qkv, grad)[0]


def _inputs(
    rows: int, width: int, has_bias: bool, dtype: torch.dtype, device: str, train: bool
) -> tuple:
    qkv = torch.randn(rows, FRAMES, 3, HEADS, width, device=device).to(dtype)
    bias = torch.randn(FRAMES, FRAMES, HEADS, device=device).permute(2, 0, 1) if has_bias else None
    grad = torch.randn(rows, FRAMES, HEADS * width, device=device).to(dtype)
    return (qkv.requires_grad_(train), bias, grad) if train else (qkv, bias)


def cases(device: str, smoke: bool) -> Iterator[Case]:
    forwards = {
        "eager": eager,
        "eager-sdpa": sdpa,
        "compile": torch.compile(eager, dynamic=False),
        "ours": ours,
    }
    # Eight samples take eager torch seconds on a CPU and say nothing new there.
    for batch in (1, 8) if device == "cuda" and not smoke else (1,):
        for name, rows, width, has_bias in SHAPES[-1:] if smoke else SHAPES:
            rows = 9 if smoke else rows * batch
            for dtype in (torch.float32, torch.float16):
                for train in (False, True):
                    impls = {n: f for n, f in forwards.items() if not (train and f is sdpa)}
                    elements = rows * FRAMES * HEADS * width
                    yield Case(
                        shape=f"occfm {name} x{batch}" + (" train" if train else ""),
                        dtype=str(dtype).removeprefix("torch."),
                        impls={n: partial(step, f) if train else f for n, f in impls.items()},
                        inputs=partial(_inputs, rows, width, has_bias, dtype, device, train),
                        bytes_moved=(11 if train else 4) * elements * dtype.itemsize,
                        flops=(14 if train else 4) * elements * FRAMES,
                        exact=partial(step, eager) if train else eager,
                    )


if __name__ == "__main__":
    raise SystemExit(main(OP, cases))
