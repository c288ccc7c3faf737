"""ReLU linear attention on views of SANA's fused q, k, v, forward and forward + backward."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, Operator
from mfd_fast.ops import linear_attention

HEADS, WIDTH = 70, 32
# (name, rows, tokens): SANA 512px has 256 tokens, 1024px 1,024, 2048px 4,096.
SHAPES = [
    ("sana-1024 x1", 1, 1024),
    ("sana-1024 x3", 3, 1024),
    ("sana-1024 x12", 12, 1024),
    ("sana-512 x12", 12, 256),
    ("sana-2048 x3", 3, 4096),
]


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """diffusers' processor between its projections, which give contiguous q, k and v."""
    dtype, heads = q.dtype, q.shape[2]
    q, k, v = (x.flatten(2).transpose(1, 2).unflatten(1, (heads, -1)) for x in (q, k, v))
    q, k = F.relu(q), F.relu(k.transpose(2, 3))
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    scores = torch.matmul(F.pad(v, (0, 0, 0, 1), mode="constant", value=1.0), k)
    out = torch.matmul(scores, q)
    out = out[:, :, :-1] / (out[:, :, -1:] + 1e-15)
    return out.flatten(1, 2).transpose(1, 2).to(dtype)


def inputs(rows: int, tokens: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    fused = torch.randn(rows, tokens, 3 * HEADS * WIDTH, device=device).to(dtype)
    grad = torch.randn(rows, tokens, HEADS * WIDTH, device=device).to(dtype)
    return *fused.view(rows, tokens, 3, HEADS, WIDTH).unbind(2), grad


def cases(device: str, smoke: bool) -> Iterator[Case]:
    shapes = SHAPES[:2] if device == "cpu" else SHAPES  # eager's others take a second a call
    shapes = [("sana-512 x1", 1, 256)] if smoke else shapes
    dtypes = torch.float32, torch.bfloat16
    for (name, rows, tokens), dtype, train in product(shapes, dtypes, (False, True)):
        elements = rows * tokens * HEADS * WIDTH
        yield Case(
            name,
            dtype,
            partial(inputs, rows, tokens, dtype, device),
            bytes_moved=(11 if train else 4) * elements * dtype.itemsize,
            flops=(14 if train else 4) * elements * WIDTH,
            train=train,
        )


OPERATOR = Operator(cases, eager, linear_attention, trained=("q", "k", "v"), suffix=" + backward")
