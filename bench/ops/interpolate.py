"""Noising and flow-matching target, fp32 and bf16: latents of SANA 1024px and of OccFM.

python -m bench.bench_interpolate [--smoke] [--out FILE.json]
"""

from collections.abc import Iterator
from functools import partial

import torch

from bench.harness import Case, compiled_cuda, main
from mfd_fast.ops import interpolate_with_target, reference

OP = "interpolate"
# (name, batch, elements of a sample): SANA 32 channels x 32 x 32; OccFM 12 frames x 16 x 50 x 50.
SHAPES = [
    ("sana-1024 x1", 1, 32 * 32 * 32),
    ("sana-1024 x3", 3, 32 * 32 * 32),
    ("sana-1024 x12", 12, 32 * 32 * 32),
    ("occfm x8", 8, 12 * 16 * 50 * 50),
]


def _inputs(batch: int, n: int, dtype: torch.dtype, device: str) -> tuple:
    x0, noise = torch.randn(2, batch, n, device=device).to(dtype).unbind(0)
    return x0, noise, torch.rand(batch, device=device)


def _impls(device: str) -> dict:
    impls = {
        "eager": reference.interpolate,
        "compile": torch.compile(reference.interpolate, dynamic=False),
        "ours": interpolate_with_target,
    }
    if device == "cuda":
        from mfd_fast.kernels.interpolate import interpolate as triton

        impls["ours-triton"] = lambda x0, noise, t: triton(x0, noise, t, True)
        if cuda := compiled_cuda(OP):
            impls["ours-cuda"] = lambda x0, noise, t: cuda(x0, noise, t, True)
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
                exact=reference.interpolate,
            )


if __name__ == "__main__":
    raise SystemExit(main(OP, cases))
