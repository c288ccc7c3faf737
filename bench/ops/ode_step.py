"""One guided solver step of teacher and auxiliary, the next model inputs of all lanes included.

python -m bench.bench_ode_step [--smoke] [--out FILE.json]
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.harness import Case, compiled_cuda, main
from mfd_fast.ops import ode_step_, reference

OP = "ode_step"
GUIDANCE = 4.5
TRAJECTORIES, LANES = 2, 3
# (name, samples, elements of a sample): SANA 32 channels x 32 x 32; OccFM 12 frames x 16 x 50 x 50.
SHAPES = [
    ("sana-1024 x1", 1, 32 * 32 * 32),
    ("sana-1024 x4", 4, 32 * 32 * 32),
    ("sana-1024 x12", 12, 32 * 32 * 32),
    ("occfm x8", 8, 12 * 16 * 50 * 50),
]


def eager(x: Tensor, v: Tensor, history: Tensor | None, coef: Tensor, x_in: Tensor) -> tuple:
    """State, history and next inputs out of place, as one would write them."""
    x, h_next = reference.ode_step(x, v, history, coef, GUIDANCE)
    lanes = torch.cat([x[:, :1], x], dim=1).to(x_in.dtype)
    return (x, lanes) if history is None else (x, h_next, lanes)


def _in_place(step) -> object:
    def run(x: Tensor, v: Tensor, history: Tensor | None, coef: Tensor, x_in: Tensor) -> tuple:
        step(x, v, history, coef, x_in)
        return (x, x_in) if history is None else (x, history, x_in)

    return run


def _inputs(batch: int, n: int, dtype: torch.dtype, has_history: bool, device: str) -> tuple:
    x = torch.randn(batch, TRAJECTORIES, n, device=device)
    v = torch.randn(batch, LANES, n, device=device).to(dtype)
    history = torch.randn_like(x) if has_history else None
    row = (1.0, -0.03, 0.01, 0.0, 1.0) if has_history else (1.0, -0.02, 0.0, 0.0, 1.0)
    coef = torch.tensor(row, device=device).repeat(batch, 1)
    return x, v, history, coef, torch.empty_like(v)


def _impls(device: str) -> dict:
    impls = {
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
        "ours": _in_place(lambda *a: ode_step_(*a[:4], guidance=GUIDANCE, x_in=a[4])),
    }
    if device == "cuda":
        from mfd_fast.kernels.ode_step import ode_step_ as triton

        impls["ours-triton"] = _in_place(lambda *a: triton(*a[:4], GUIDANCE, a[4]))
        if cuda := compiled_cuda("ode_step_"):
            impls["ours-cuda"] = _in_place(lambda *a: cuda(*a[:4], GUIDANCE, a[4]))
    return impls


def cases(device: str, smoke: bool) -> Iterator[Case]:
    for name, batch, n in SHAPES[:1] if smoke else SHAPES:
        for dtype, has_history in (
            (torch.float32, False),
            (torch.bfloat16, False),
            (torch.bfloat16, True),
        ):
            states = 16 if has_history else 8
            lanes = 2 * dtype.itemsize
            yield Case(
                shape=name + (" ab2" if has_history else " euler"),
                dtype=str(dtype).removeprefix("torch."),
                impls=_impls(device),
                inputs=partial(_inputs, batch, n, dtype, has_history, device),
                bytes_moved=batch * n * (states * TRAJECTORIES + lanes * LANES),
                exact=eager,
            )


if __name__ == "__main__":
    raise SystemExit(main(OP, cases))
