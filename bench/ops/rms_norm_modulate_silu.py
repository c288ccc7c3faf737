"""OccFM's RMS norm + modulation + SiLU, forward and training, fp16 and fp32, channels last."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, Operator
from mfd_fast.ops import reference, rms_norm_modulate_silu

FRAMES = 12
# (name, height and width, channels): the two levels of the network and its last one.
LEVELS = [("50x50x128", 50, 128), ("25x25x256", 25, 256), ("50x50x64", 50, 64)]
BATCHES = [1, 4]


def eager(x: Tensor, gain: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """As the network is specified: in float32, as under autocast, the rows repeated per frame."""
    frames = x.shape[0] // scale.shape[0]
    scale, shift = (m.repeat_interleave(frames, 0)[:, None, None] for m in (scale, shift))
    h = F.normalize(x.float(), dim=-1) * x.shape[-1] ** 0.5 * gain.float()
    return F.silu(h * (1 + scale.float()) + shift.float()).to(x.dtype)


def inputs(batch: int, size: int, channels: int, dtype: torch.dtype, device: str) -> tuple:
    x = torch.randn(batch * FRAMES, size, size, channels, device=device).to(dtype)
    rows = torch.randn(batch, 2 * channels, device=device).to(dtype).chunk(2, dim=1)
    return x, 1 + torch.rand(channels, device=device).to(dtype), *rows, torch.randn_like(x)


def cases(device: str, smoke: bool) -> Iterator[Case]:
    levels, batches = ([("5x5x64", 5, 64)], BATCHES[:1]) if smoke else (LEVELS, BATCHES)
    dtypes = torch.float16, torch.float32
    for (name, size, channels), batch, dtype, train in product(
        levels, batches, dtypes, (False, True)
    ):
        num_bytes = batch * FRAMES * size * size * channels * dtype.itemsize
        make = partial(inputs, batch, size, channels, dtype, device)
        moved = (5 if train else 2) * num_bytes
        yield Case(f"occfm {name} x{batch}", dtype, make, moved, train=train)


OPERATOR = Operator(
    cases,
    eager,
    rms_norm_modulate_silu,
    exact=reference.rms_norm_modulate_silu,
    trained=("x", "gain", "scale", "shift"),  # OccFM's network is trained as a whole
)
