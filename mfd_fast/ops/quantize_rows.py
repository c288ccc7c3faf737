"""Rows in e4m3 with a float32 scale each: what ``float8.py`` multiplies.

    scale = max |x| / 448        values = x (448 / max |x|), rounded to nearest even

x is [..., K]; values are float8_e4m3fn like x, scale is float32 [..., 1], and values * scale is x
to 4 significant bits; what is smaller than 2^-6 of a scale is rounded to multiples of 2^-9 of it.
A row of zeros gives zeros; a row with a value that is not finite gives NaN in every product.
Nothing is differentiable.

Traffic per element in bf16: read 2 bytes, write 1; the reference's five operators (float32, |x|,
maximum, product, cast) move 31.
"""

import torch
from torch import Tensor

from mfd_fast.ops import reference
from mfd_fast.ops.checks import check_activation
from mfd_fast.ops.dispatch import define

OP = "quantize_rows"


def _fake(x):
    values = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    return values, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


_quantize = define(
    OP,
    "(Tensor x) -> (Tensor values, Tensor scale)",
    fake=_fake,
    reference=reference.quantize_rows,
    triton=f"{OP}:{OP}",
)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(values, scale): float8_e4m3fn like x, and float32 ``[..., 1]``.

    x is ``[..., K]``, contiguous, float32, bfloat16 or float16, K at most 8192; ``ValueError`` if
    it is not.
    """
    check_activation(OP, x, "[..., K]")
    if x.dtype == torch.float64:
        raise ValueError(f"{OP}: x must be float32, bfloat16 or float16; got {x.dtype}")
    return _quantize(x)
