"""RMS norm + rotary embedding of queries: FLUX's and Wan's, forward and forward + backward to x."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, Operator
from mfd_fast.ops import reference, rms_norm_rotary

# (name, tokens, heads, width of a head): 1024px with 512 tokens of text; 480p, 21 latent frames.
SHAPES = [("flux 1024px", 4608, 24, 128), ("wan 14B 480p", 32760, 40, 128)]


def eager(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As diffusers writes it, every angle twice."""
    z = F.rms_norm(x, weight.shape, weight, 1e-6)
    a, b = z.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-b, a], dim=-1).flatten(3)
    cos, sin = (t[:, :, None].repeat_interleave(2, -1) for t in (cos, sin))
    return (z * cos + turned * sin).to(x.dtype)


def exact(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return reference.rms_norm_rotary(x, weight, cos, sin, 1e-6, "interleaved", False)


def inputs(shape: tuple, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    x, grad = torch.randn(2, *shape, device=device).to(dtype).unbind(0)
    angle = torch.randn(1, shape[1], shape[3] // 2, device=device)
    return x, torch.ones(shape[3], device=device).to(dtype), angle.cos(), angle.sin(), grad


def cases(device: str, smoke: bool) -> Iterator[Case]:
    shapes = [("smoke", 16, 2, 16)] if smoke else SHAPES
    for (name, *size), dtype, train in product(
        shapes, (torch.float32, torch.bfloat16), (False, True)
    ):
        shape = (1, *size)
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        make = partial(inputs, shape, dtype, device)
        yield Case(name, dtype, make, (5 if train else 2) * num_bytes, train=train)


OPERATOR = Operator(cases, eager, rms_norm_rotary, exact=exact, trained=("x",))
