"""LayerNorm + modulation, forward and forward + backward to x: SANA 1024px, fp32 and bf16."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, Operator
from mfd_fast.ops import layer_norm_modulate, reference

CHANNELS, TOKENS = 2240, 1024
# (lanes, samples): one sample; its two teacher lanes and the auxiliary; four samples of these.
LANES = [(1, 1), (3, 1), (12, 4)]


def eager(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """As the diffusers block writes it, the rows repeated for every lane."""
    lanes = x.shape[0] // scale.shape[0]
    scale, shift = (m.repeat_interleave(lanes, 0).unsqueeze(1) for m in (scale, shift))
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def inputs(lanes: int, samples: int, tokens: int, dtype: torch.dtype, device: str) -> tuple:
    x = torch.randn(lanes, tokens, CHANNELS, device=device).to(dtype)
    rows = torch.randn(samples, 6, CHANNELS, device=device).to(dtype)
    return x, rows[:, 1], rows[:, 0], torch.randn_like(x)


def cases(device: str, smoke: bool) -> Iterator[Case]:
    name, tokens, lanes_of = ("smoke", 64, LANES[:1]) if smoke else ("sana-1024", TOKENS, LANES)
    dtypes = torch.float32, torch.bfloat16
    for (lanes, samples), dtype, train in product(lanes_of, dtypes, (False, True)):
        num_bytes = lanes * tokens * CHANNELS * dtype.itemsize
        make = partial(inputs, lanes, samples, tokens, dtype, device)
        yield Case(f"{name} x{lanes}", dtype, make, (5 if train else 2) * num_bytes, train=train)


# The modulation is frozen, as it is under LoRA.
OPERATOR = Operator(
    cases, eager, layer_norm_modulate, exact=reference.layer_norm_modulate, trained=("x",)
)
