"""SiLU, depthwise 3x3 and gate of SANA 1024px, forward and forward + backward to x."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, Operator
from mfd_fast.ops import glu_depthwise

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


def inputs(lanes: int, side: int, channels: int, dtype: torch.dtype, device: str) -> tuple:
    x = torch.randn(lanes, side * side, 2 * channels, device=device).to(dtype)
    weight = (torch.randn(2 * channels, 1, 3, 3, device=device) / 3).to(dtype)
    bias, in_bias = torch.randn(2, 2 * channels, device=device).to(dtype).unbind(0)
    grad = torch.randn(lanes, side * side, channels, device=device).to(dtype)
    return x, weight, bias, in_bias, side, grad


def cases(device: str, smoke: bool) -> Iterator[Case]:
    side, channels, lanes_of = (8, 80, LANES[:1]) if smoke else (SIDE, CHANNELS, LANES)
    dtypes = torch.float32, torch.bfloat16
    for lanes, dtype, train in product(lanes_of, dtypes, (False, True)):
        outputs = lanes * side * side * channels
        yield Case(
            f"sana-1024 x{lanes}",
            dtype,
            partial(inputs, lanes, side, channels, dtype, device),
            bytes_moved=(8 if train else 3) * outputs * dtype.itemsize,
            flops=(108 if train else 36) * outputs,
            train=train,
        )


OPERATOR = Operator(cases, eager, ours, trained=("x",))  # frozen weights, as they are under LoRA
