"""Guidance that keeps the length of the conditional velocity: both lanes of the teacher at once.

    v  = v_uncond + w (v_cond - v_uncond)
    v' = v |v_cond| / |v|                      over the last dimension

v is [B, L, ..., C]: lane 0 is v_cond, lane 1 v_uncond; both become v', which linear guidance leaves
as it is in the solver step, and lanes from 2 on stay.  Arithmetic is float32 (float64 for float64).
Traffic: 1 read and 1 write of v; the eleven eager operators move some 40 bytes an element.
"""

from torch import Tensor

from mfd_fast.ops import reference
from mfd_fast.ops.checks import MAX_CHANNELS, check_kernel_dtype
from mfd_fast.ops.dispatch import define

OP = "renormalised_guidance"


_forward = define(
    OP,
    "(Tensor v, float guidance) -> Tensor",
    fake=lambda v, guidance: v.new_empty(v.shape),
    reference=reference.renormalised_guidance,
    triton=f"{OP}:{OP}",
)


def renormalised_guidance(v: Tensor, guidance: float) -> Tensor:
    """The lanes ``[B, L, ..., C]`` with the guided velocity in lanes 0 and 1, contiguous.

    No gradient flows: teacher and auxiliary are integrated under stop-gradient.  Source: the
    pipelines of Qwen-Image (C a token's channels) and Lumina-Image 2 (a row of pixels).
    ``ValueError`` for fewer than two lanes, or C above 8192.
    """
    if v.ndim < 3 or v.shape[1] < 2 or not 1 <= v.shape[-1] <= MAX_CHANNELS:
        raise ValueError(
            f"{OP}: v must be [B, L, ..., C] with L at least 2 and C at most {MAX_CHANNELS}; "
            f"got {list(v.shape)}"
        )
    check_kernel_dtype(OP, "v", v)
    return _forward(v.contiguous(), float(guidance))
