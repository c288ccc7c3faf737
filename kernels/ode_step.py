"""One solver step of every trajectory of every sample; the contract is ``ops/ode_step.py``.

States are [B, S, N], lanes [B, L, N].  The copy bandwidth is the roofline.
"""

import triton
import triton.language as tl
from torch import Tensor

# As kernels/interpolate.py: one 16-byte access per thread to bf16 lanes, two to the fp32 states.
BLOCK_N = 2048
NUM_WARPS = 8


@triton.jit
def _ode_step_kernel(
    x_ptr,  # [B, S, N]
    v_ptr,  # [B, L, N]
    history_ptr,  # [B, S, N] or None
    coef_ptr,  # [B, 5] fp32
    in_ptr,  # [B, L, N] or None
    guidance,
    n,
    blocks,  # of BLOCK_N elements in one trajectory
    S: tl.constexpr,
    IS_GUIDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    WIDE: tl.constexpr = x_ptr.dtype.element_ty
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)  # sample * S + s
    sample = row // S
    s = row % S
    column = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = column < n
    at = row * n + column
    lane_at = at
    if IS_GUIDED:
        lane_at = (sample * (S + 1) + s + (s > 0).to(tl.int64)) * n + column

    a = tl.load(coef_ptr + 5 * sample).to(WIDE)
    b = tl.load(coef_ptr + 5 * sample + 1).to(WIDE)
    x = tl.load(x_ptr + at, mask=mask)
    v = tl.load(v_ptr + lane_at, mask=mask).to(WIDE)
    if IS_GUIDED:  # off for a whole program unless s = 0: then it moves nothing
        guided = column < tl.where(s == 0, n, 0)
        uncond = tl.load(v_ptr + lane_at + n, mask=guided).to(WIDE)
        v = tl.where(s == 0, uncond + guidance * (v - uncond), v)
    x_next = a * x + b * v
    if history_ptr is not None:
        c = tl.load(coef_ptr + 5 * sample + 2).to(WIDE)
        p = tl.load(coef_ptr + 5 * sample + 3).to(WIDE)
        q = tl.load(coef_ptr + 5 * sample + 4).to(WIDE)
        x_next += c * tl.load(history_ptr + at, mask=mask)
        tl.store(history_ptr + at, p * x + q * v, mask=mask)
    tl.store(x_ptr + at, x_next, mask=mask)
    if in_ptr is not None:
        x_in = x_next.to(in_ptr.dtype.element_ty)
        tl.store(in_ptr + lane_at, x_in, mask=mask)
        if IS_GUIDED:
            tl.store(in_ptr + lane_at + n, x_in, mask=guided)


def ode_step_(
    x: Tensor,
    v: Tensor,
    history: Tensor | None,
    coef: Tensor,
    guidance: float,
    x_in: Tensor | None,
) -> None:
    """Launch the kernel.  Inputs are already validated by ``mfd_fast.ops``."""
    if x.numel() == 0:
        return
    rows = x.shape[0] * x.shape[1]
    n = x.numel() // rows
    blocks = triton.cdiv(n, BLOCK_N)
    _ode_step_kernel[(rows * blocks,)](
        x,
        v,
        history,
        coef,
        x_in,
        float(guidance),
        n,
        blocks,
        S=x.shape[1],
        IS_GUIDED=v.shape[1] > x.shape[1],
        BLOCK_N=BLOCK_N,
        num_warps=NUM_WARPS,
    )
