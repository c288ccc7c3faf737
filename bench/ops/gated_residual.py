"""x + gate * (y + bias), forward and forward + backward to x and y: SANA 1024px, fp32 and bf16."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from bench.harness import Case, Operator
from mfd_fast.ops import gated_residual, reference

CHANNELS, TOKENS = 2240, 1024
# (lanes, samples): one sample; its two teacher lanes and the auxiliary; four samples of these.
LANES = [(1, 1), (3, 1), (12, 4)]


def eager(x: Tensor, y: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
    """As the diffusers block writes it, the gate repeated for every lane."""
    gate = gate.repeat_interleave(x.shape[0] // gate.shape[0], 0).unsqueeze(1)
    return x + gate * (y + bias)


def inputs(lanes: int, samples: int, tokens: int, dtype: torch.dtype, device: str) -> tuple:
    x, y, grad = torch.randn(3, lanes, tokens, CHANNELS, device=device).to(dtype).unbind(0)
    gate = torch.randn(samples, 6, CHANNELS, device=device).to(dtype)[:, 2]
    return x, y, gate, torch.randn(CHANNELS, device=device).to(dtype), grad


def cases(device: str, smoke: bool) -> Iterator[Case]:
    name, tokens, lanes_of = ("smoke", 64, LANES[:1]) if smoke else ("sana-1024", TOKENS, LANES)
    dtypes = torch.float32, torch.bfloat16
    for (lanes, samples), dtype, train in product(lanes_of, dtypes, (False, True)):
        num_bytes = lanes * tokens * CHANNELS * dtype.itemsize
        make = partial(inputs, lanes, samples, tokens, dtype, device)
        yield Case(f"{name} x{lanes}", dtype, make, (5 if train else 3) * num_bytes, train=train)


# Gate and bias are frozen, as they are under LoRA.
OPERATOR = Operator(
    cases, eager, gated_residual, exact=reference.gated_residual, trained=("x", "y")
)
