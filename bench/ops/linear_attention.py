"""ReLU linear attention on views of SANA's fused q, k, v, forward and forward + backward.

python -m bench.bench_linear_attention [--smoke] [--out FILE.json]
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, main
from mfd_fast.ops import linear_attention

OP = "linear_attention"
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


def with_backward(forward: Callable[..., Tensor]) -> Callable[..., tuple]:
    """out and the gradients of q, k and v, with out itself as the gradient of out."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out = forward(q, k, v)
        return out, *torch.autograd.grad(out, (q, k, v), out.detach())

    return run


def _inputs(
    rows: int, tokens: int, dtype: torch.dtype, device: str, needs_grad: bool
) -> tuple[Tensor, ...]:
    fused = torch.randn(rows, tokens, 3 * HEADS * WIDTH, device=device).to(dtype)
    views = fused.view(rows, tokens, 3, HEADS, WIDTH).unbind(2)
    return tuple(view.detach().requires_grad_(needs_grad) for view in views)


def _case(
    name: str, rows: int, tokens: int, dtype: torch.dtype, device: str, needs_grad: bool
) -> Case:
    compiled = torch.compile(eager, dynamic=False)
    impls = {"eager": eager, "compile": compiled, "ours": linear_attention}
    if needs_grad:
        impls = {key: with_backward(forward) for key, forward in impls.items()}
    elements = rows * tokens * HEADS * WIDTH
    return Case(
        shape=f"{name} + backward" if needs_grad else name,
        dtype=str(dtype).removeprefix("torch."),
        impls=impls,
        inputs=partial(_inputs, rows, tokens, dtype, device, needs_grad),
        bytes_moved=(11 if needs_grad else 4) * elements * dtype.itemsize,
        flops=(14 if needs_grad else 4) * elements * WIDTH,
        exact=with_backward(eager) if needs_grad else eager,
    )


def cases(device: str, smoke: bool) -> Iterator[Case]:
    shapes = (
        SHAPES[:2] if device == "cpu" else SHAPES
    )  # one eager call of the others takes a second
    for name, rows, tokens in [("sana-512 x1", 1, 256)] if smoke else shapes:
        for dtype in (torch.float32, torch.bfloat16):
            for needs_grad in (False, True):
                yield _case(name, rows, tokens, dtype, device, needs_grad)


if __name__ == "__main__":
    raise SystemExit(main(OP, cases))
