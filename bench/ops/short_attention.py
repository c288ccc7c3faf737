"""OccFM's attention over 12 frames of every pixel, forward and forward + backward, fp32 and fp16.

The product is fused, [N, 12, 3, H, D].  The DiT blocks merge row-major without a bias, the older
attention has the bias and the normal merge.  "eager" is the formula, "eager-sdpa" torch's own (its
backward on the CPU is less accurate than the rule allows, so it is timed forward only).
"""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, Operator
from mfd_fast.ops import short_attention_qkv

FRAMES, HEADS = 12, 8
# (name, rows of a sample, head width, has bias): the fine level, its last block, the coarse level,
# and the attention with a bias.
SHAPES = [
    ("dit 50x50x128", 2500, 16, False),
    ("dit 50x50x64", 2500, 8, False),
    ("dit 25x25x256", 625, 32, False),
    ("biased 50x50x256", 2500, 32, True),
]


def merge(out: Tensor, bias: Tensor | None) -> Tensor:
    """``[N, H, T, D]`` -> ``[N, T, H D]``: row-major in the DiT blocks, which have no bias."""
    rows, heads, tokens, width = out.shape
    return (out if bias is None else out.transpose(1, 2)).reshape(rows, tokens, heads * width)


def eager(qkv: Tensor, bias: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    scores = q.shape[-1] ** -0.5 * (q @ k.mT)
    weights = torch.softmax(scores if bias is None else scores + bias, dim=-1).to(v.dtype)
    return merge(weights @ v, bias)


def sdpa(qkv: Tensor, bias: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    mask = None if bias is None else bias.to(q.dtype)
    return merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), bias)


def ours(qkv: Tensor, bias: Tensor | None) -> Tensor:
    return short_attention_qkv(qkv, bias=bias, merge="row_major" if bias is None else "normal")


def inputs(rows: int, width: int, has_bias: bool, dtype: torch.dtype, device: str) -> tuple:
    qkv = torch.randn(rows, FRAMES, 3, HEADS, width, device=device).to(dtype)
    bias = torch.randn(FRAMES, FRAMES, HEADS, device=device).permute(2, 0, 1) if has_bias else None
    return qkv, bias, torch.randn(rows, FRAMES, HEADS * width, device=device).to(dtype)


def cases(device: str, smoke: bool) -> Iterator[Case]:
    # Eight samples take eager torch seconds on a CPU and say nothing new there.
    batches = (1, 8) if device == "cuda" and not smoke else (1,)
    shapes, dtypes = SHAPES[-1:] if smoke else SHAPES, (torch.float32, torch.float16)
    for batch, shape, dtype, train in product(batches, shapes, dtypes, (False, True)):
        name, rows, width, has_bias = shape
        rows = 9 if smoke else rows * batch
        elements = rows * FRAMES * HEADS * width
        yield Case(
            f"occfm {name} x{batch}",
            dtype,
            partial(inputs, rows, width, has_bias, dtype, device),
            bytes_moved=(11 if train else 4) * elements * dtype.itemsize,
            flops=(14 if train else 4) * elements * FRAMES,
            train=train,
        )


OPERATOR = Operator(cases, eager, ours, trained=("qkv",), others={"eager-sdpa": sdpa})
