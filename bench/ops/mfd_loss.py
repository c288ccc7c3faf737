"""Loss, distance and gradient from the two end states (planes of one state buffer).

python -m bench.bench_mfd_loss [--smoke] [--out FILE.json]
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.harness import Case, compiled_cuda, main
from mfd_fast.ops import mfd_loss_from_ends, reference

OP = "mfd_loss"
# (name, samples, elements of a sample): SANA 32 channels x 32 x 32; OccFM 12 frames x 16 x 50 x 50.
SHAPES = [
    ("sana-1024 x1", 1, 32 * 32 * 32),
    ("sana-1024 x3", 3, 32 * 32 * 32),
    ("sana-1024 x12", 12, 32 * 32 * 32),
    ("occfm x8", 8, 12 * 16 * 50 * 50),
]


def _inputs(batch: int, n: int, dtype: torch.dtype, device: str) -> tuple:
    states = torch.randn(batch, 2, n, device=device)
    x = torch.randn(batch, n, device=device) + states[:, 1] - states[:, 0]
    states = states.to(dtype)
    span = 0.1 + torch.rand(batch, device=device)
    return x.to(dtype), states[:, 0], states[:, 1], span, torch.rand(batch, device=device)


def eager(x: Tensor, teacher: Tensor, aux: Tensor, span: Tensor, weight: Tensor) -> tuple:
    """In float32 like the operator, or in float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    loss, distance, grad = reference.mfd_loss(
        x.to(wide), teacher.to(wide), aux.to(wide), span, weight
    )
    return loss, distance, grad.to(x.dtype)


def _impls(device: str) -> dict:
    impls = {
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
        "ours": mfd_loss_from_ends,
    }
    if device == "cuda":
        from mfd_fast.kernels.mfd_loss import mfd_loss as triton

        impls["ours-triton"] = triton
        if cuda := compiled_cuda(OP):
            impls["ours-cuda"] = cuda
    return impls


def cases(device: str, smoke: bool) -> Iterator[Case]:
    for name, batch, n in SHAPES[:1] if smoke else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            yield Case(
                shape=name,
                dtype=str(dtype).removeprefix("torch."),
                impls=_impls(device),
                inputs=partial(_inputs, batch, n, dtype, device),
                bytes_moved=4 * batch * n * dtype.itemsize,
                exact=eager,
            )


if __name__ == "__main__":
    raise SystemExit(main(OP, cases))
