"""x + gate * (y + bias), forward and forward + backward to x and y: SANA 1024px, fp32 and bf16.

python -m bench.bench_gated_residual [--smoke] [--out FILE.json]
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench.harness import Case, main
from mfd_fast.ops import gated_residual, reference

OP = "gated_residual"
CHANNELS, TOKENS = 2240, 1024
# (lanes, samples): one sample; its two teacher lanes and the auxiliary; four samples of these.
LANES = [(1, 1), (3, 1), (12, 4)]


def eager(x: Tensor, y: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
    """As the diffusers block writes it, the gate repeated for every lane."""
    gate = gate.repeat_interleave(x.shape[0] // gate.shape[0], 0).unsqueeze(1)
    return x + gate * (y + bias)


def step(
    forward: Callable, x: Tensor, y: Tensor, gate: Tensor, bias: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    """The gradients to x and y; gate and bias are frozen, as they are under LoRA."""
    return torch.autograd.grad(forward(x, y, gate, bias), (x, y), grad)


def _inputs(
    lanes: int, samples: int, tokens: int, dtype: torch.dtype, device: str, train: bool
) -> tuple:
    x, y, grad = torch.randn(3, lanes, tokens, CHANNELS, device=device).to(dtype).unbind(0)
    gate = torch.randn(samples, 6, CHANNELS, device=device).to(dtype)[:, 2]
    bias = torch.randn(CHANNELS, device=device).to(dtype)
    inputs = (x.requires_grad_(train), y.requires_grad_(train), gate, bias)
    return (*inputs, grad) if train else inputs


def cases(device: str, smoke: bool) -> Iterator[Case]:
    forwards = {
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
        "ours": gated_residual,
    }
    name, tokens = ("smoke", 64) if smoke else ("sana-1024", TOKENS)
    for lanes, samples in LANES[:1] if smoke else LANES:
        for dtype in (torch.float32, torch.bfloat16):
            for train in (False, True):
                num_bytes = lanes * tokens * CHANNELS * dtype.itemsize
                exact = reference.gated_residual
                yield Case(
                    shape=f"{name} x{lanes}" + (" train" if train else ""),
                    dtype=str(dtype).removeprefix("torch."),
                    impls={n: partial(step, f) if train else f for n, f in forwards.items()},
                    inputs=partial(_inputs, lanes, samples, tokens, dtype, device, train),
                    bytes_moved=(5 if train else 3) * num_bytes,
                    exact=partial(step, exact) if train else exact,
                )


if __name__ == "__main__":
    raise SystemExit(main(OP, cases))
