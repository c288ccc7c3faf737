"""SiLU, depthwise 3x3 and gate of SANA 1024px, forward and forward + backward to x, fp32 and bf16.

python -m bench.bench_glu_depthwise [--smoke] [--out FILE.json]
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, main
from mfd_fast.ops import glu_depthwise

OP = "glu_depthwise"
SIDE, CHANNELS = 32, 5600
# Three lanes: the teacher's two and the auxiliary; twelve: four samples of these.
LANES = [1, 3, 12]


def eager(x: Tensor, weight: Tensor, bias: Tensor, in_bias: Tensor, side: int) -> Tensor:
    """As diffusers has it: the tokens viewed as a channels-last image."""
    image = F.silu(x + in_bias).unflatten(1, (side, side)).permute(0, 3, 1, 2)
    value, gate = F.conv2d(image, weight, bias, padding=1, groups=x.shape[2]).chunk(2, dim=1)
    return (value * F.silu(gate)).flatten(2, 3).permute(0, 2, 1)


def ours(x: Tensor, weight: Tensor, bias: Tensor, in_bias: Tensor, side: int) -> Tensor:
    return glu_depthwise(x, weight, bias, side, side, in_bias=in_bias)


def step(
    forward: Callable,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    in_bias: Tensor,
    side: int,
    grad: Tensor,
) -> Tensor:
    """The gradient to x; the weights are frozen, as they are under LoRA."""
    return torch.autograd.grad(forward(x, weight, bias, in_bias, side), x, grad)[0]


def _inputs(
    lanes: int, side: int, channels: int, dtype: torch.dtype, device: str, train: bool
) -> tuple:
    x = torch.randn(lanes, side * side, 2 * channels, device=device).to(dtype)
    weight = (torch.randn(2 * channels, 1, 3, 3, device=device) / 3).to(dtype)
    bias, in_bias = torch.randn(2, 2 * channels, device=device).to(dtype).unbind(0)
    inputs = (x.requires_grad_(train), weight, bias, in_bias, side)
    grad = torch.randn(lanes, side * side, channels, device=device).to(dtype)
    return (*inputs, grad) if train else inputs


def cases(device: str, smoke: bool) -> Iterator[Case]:
    forwards = {"eager": eager, "compile": torch.compile(eager, dynamic=False), "ours": ours}
    side, channels = (8, 80) if smoke else (SIDE, CHANNELS)
    for lanes in LANES[:1] if smoke else LANES:
        for dtype in (torch.float32, torch.bfloat16):
            for train in (False, True):
                outputs = lanes * side * side * channels
                yield Case(
                    shape=f"sana-1024 x{lanes}" + (" train" if train else ""),
                    dtype=str(dtype).removeprefix("torch."),
                    impls={n: partial(step, f) if train else f for n, f in forwards.items()},
                    inputs=partial(_inputs, lanes, side, channels, dtype, device, train),
                    bytes_moved=(8 if train else 3) * outputs * dtype.itemsize,
                    flops=(108 if train else 36) * outputs,
                    exact=partial(step, eager) if train else eager,
                )


if __name__ == "__main__":
    raise SystemExit(main(OP, cases))
