"""Slow, obvious, dtype-generic implementations.  The single source of truth for every operator.

No kernel, no in-place trick, no ``.contiguous()``: a reader checks these against the paper, the
tests run them in float64, and a CPU without the compiled extension runs them in production.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """``[B]`` -> ``[B, 1, ...]`` so that it broadcasts against ``like`` ``[B, ...]``."""
    return values.view(-1, *(1,) * (like.ndim - 1))


def wide_rows(values: Tensor, like: Tensor) -> Tensor:
    """Times and coefficients in the type they multiply in: float64 where samples are float64."""
    return values.to(torch.promote_types(values.dtype, like.dtype))


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """``x_t = (1 - t) x0 + t noise`` and the flow-matching target ``noise - x0``."""
    t = per_sample(wide_rows(t, x0), x0)
    return ((1 - t) * x0 + t * noise).to(x0.dtype), noise - x0


def guide(v: Tensor, num_trajectories: int, guidance: float) -> Tensor:
    """Lanes ``[B, L, ...]`` -> trajectories ``[B, S, ...]``; with L = S + 1 the first is guided."""
    if v.shape[1] == num_trajectories:
        return v
    cond, uncond = v[:, :1], v[:, 1:2]
    return torch.cat([uncond + guidance * (cond - uncond), v[:, 2:]], dim=1)


def renormalised(v_cond: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
    """Linear guidance with the norm of v_cond over the last dimension."""
    v = v_uncond + scale * (v_cond - v_uncond)
    return v * (v_cond.norm(dim=-1, keepdim=True) / v.norm(dim=-1, keepdim=True))


def renormalised_guidance(v: Tensor, guidance: float) -> Tensor:
    """Lanes ``[B, L, ..., C]`` with :func:`renormalised` of the first two in both of them."""
    both = renormalised(*(wide(v[:, lane]) for lane in (0, 1)), guidance).to(v.dtype)[:, None]
    return torch.cat([both, both, v[:, 2:]], dim=1)


def ode_step(
    x: Tensor, v: Tensor, history: Tensor | None, coef: Tensor, guidance: float
) -> tuple[Tensor, Tensor]:
    """``(a x + b v + c h, p x + q v)`` with the rows (a, b, c, p, q) of ``coef`` ``[B, 5]``."""
    v = guide(v.to(x.dtype), x.shape[1], guidance)
    a, b, c, p, q = (per_sample(k, x) for k in coef.to(x.dtype).unbind(-1))
    x_next = a * x + b * v
    if history is not None:
        x_next = x_next + c * history
    return x_next, p * x + q * v


def mfd_loss(
    x: Tensor, end_teacher: Tensor, end_aux: Tensor, span: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss ``[]``, distance ``[B]`` and gradient ``[B, ...]``; see ``ops/mfd_loss.py``."""
    diff = (end_aux - end_teacher) / per_sample(span, x)
    distance = diff.flatten(1).norm(dim=1)
    if weight is not None:
        diff = diff * per_sample(weight, x)
    grad = (diff / x.numel()).to(x.dtype)
    return (diff * x).mean(), distance, grad


def wide(x: Tensor) -> Tensor:
    """x in the type of its statistics: float64 stays, everything else is float32."""
    return x if x.dtype == torch.float64 else x.float()


def by_sample(x: Tensor, rows: Tensor | None) -> Tensor:
    """``[R, ..., C]`` -> wide ``[S, M, C]``: the R / S lanes of a sample follow each other."""
    samples = 1 if rows is None else rows.shape[0]
    return wide(x).reshape(samples, x.shape[:-1].numel() // max(samples, 1), x.shape[-1])


def modulate(x: Tensor, scale: Tensor | None, shift: Tensor | None, gain: Tensor | None) -> Tensor:
    """``x * gain * (1 + scale_s) + shift_s`` for x ``[S, M, C]``; what is None is left out."""
    factor = 1 if gain is None else wide(gain)
    if scale is not None:
        factor = factor * (1 + wide(scale).unsqueeze(1))
    return x * factor if shift is None else torch.addcmul(wide(shift).unsqueeze(1), x, factor)


def normalise(x: Tensor, eps: float, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """``(x - mean) * rstd`` over the last dimension, mean and rstd; kinds "layer", "rms", "l2"."""
    if kind == "layer":
        return torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
    norm = x.norm(dim=-1, keepdim=True)
    if kind == "rms":
        rstd = (norm.square() / x.shape[-1] + eps).rsqrt()
    else:
        rstd = x.shape[-1] ** 0.5 / norm.clamp_min(eps)
    return x * rstd, x.new_zeros(()), rstd


def layer_norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    gain: Tensor | None = None,
    eps: float = 1e-6,
    kind: str = "layer",
) -> Tensor:
    """``norm(x) [* gain] * (1 + scale_s) + shift_s``; x ``[R, T, C]``, rows ``[S, C]``."""
    xhat, _, _ = normalise(by_sample(x, scale), eps, kind)
    return modulate(xhat, scale, shift, gain).reshape(x.shape).to(x.dtype)


def rms_norm_modulate_silu(
    x: Tensor,
    gain: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """SiLU of ``x / max(|x|, eps) * sqrt(C) * gain [* (1 + scale_s) + shift_s]``."""
    xhat, _, _ = normalise(by_sample(x, scale), eps, "l2")
    z = modulate(xhat, scale, shift, gain)
    return (z * z.sigmoid()).reshape(x.shape).to(x.dtype)


def norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, eps: float, kind: str
) -> Tensor:
    """The gradient of :func:`normalise` to x from the one to its first result."""
    if kind == "layer":
        args = (grad, x, x.shape[-1:], mean, rstd, None, None, (True, False, False))
        return torch.ops.aten.native_layer_norm_backward(*args)[0]
    inner = rstd.square() * (grad * x).mean(-1, keepdim=True)
    if kind == "l2":  # a row under the least norm was divided by a constant
        inner = inner * (rstd < x.shape[-1] ** 0.5 / eps * (1 - 1e-6))
    return torch.addcmul(grad, x, inner, value=-1) * rstd


def gated_residual(x: Tensor, y: Tensor, gate: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """``x + gate_s * (y + bias)``; x, y ``[R, T, C]``, gate ``[S, C]``; without a gate it is 1."""
    y = by_sample(y, gate) if bias is None else by_sample(y, gate) + wide(bias)
    x_s = by_sample(x, gate)
    out = x_s + y if gate is None else torch.addcmul(x_s, wide(gate).unsqueeze(1), y)
    return out.reshape(x.shape).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Pairs of channels of x ``[R, T, H, D]`` turned by the angles of ``[R or 1, T, D / 2]``."""
    cos, sin = (wide_rows(table.unsqueeze(2), x) for table in (cos, sin))
    if layout == "half":
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def rms_norm_rotary(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    layout: str,
    across: bool,
) -> Tensor:
    """RMS norm of every head, or across heads, and the rotation of pairs; x ``[R, T, H, D]``."""
    z = wide(x)
    z = z * (z.square().mean((-2, -1) if across else -1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        z = z * wide(weight).view(-1 if across else 1, x.shape[3])
    return rotate(z, cos, sin, layout).to(x.dtype).contiguous()


def glu_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor, in_bias: Tensor | None, height: int, width: int
) -> Tensor:
    """SiLU, depthwise 3x3, first half times SiLU of the second; x ``[R, T, 2C]``."""
    a = F.silu(x if in_bias is None else x + in_bias)
    image = a.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    z = F.conv2d(image, weight, bias, padding=1, groups=weight.shape[0])
    value, gate = z.flatten(2).mT.chunk(2, dim=-1)
    return (value * F.silu(gate)).contiguous()


def short_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, row_major: bool, scale: float
) -> Tensor:
    """Attention in each row; q, k, v ``[N, T, H, D]``, bias ``[H, T, T]`` -> ``[N, T, H D]``.

    ``row_major`` views the result ``[N, H, T, D]`` as ``[N, T, H D]`` as it lies in memory; the
    normal merge transposes heads and tokens first.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = scale * (q @ k.mT)
    probabilities = torch.softmax(scores if bias is None else scores + bias, dim=-1).to(v.dtype)
    out = probabilities @ v
    rows, heads, tokens, width = out.shape
    return (out if row_major else out.transpose(1, 2)).reshape(rows, tokens, heads * width)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-15) -> tuple[Tensor, Tensor]:
    """ReLU linear attention ``[R, T, H * D]`` and its state ``[R, H, D + 1, D]``, summed wide.

    The last row of the state is the sum of the keys (the values padded with a one): the normaliser.
    """
    q, k = wide(q.relu()), wide(k.relu())
    v_and_one = torch.nn.functional.pad(wide(v), (0, 1), value=1.0)
    state = torch.einsum("rthe,rthd->rhed", v_and_one, k)
    out = torch.einsum("rhed,rthd->rthe", state, q)
    out = out[..., :-1] / (out[..., -1:] + eps)
    return out.flatten(2).to(v.dtype), state


def segmented_lora(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, rows: Tensor, scale: float
) -> Tensor:
    """``y[r] + scale (x[r] A^T) B^T`` for every row r with an adapter, in PEFT's order.

    y ``[R, T, G * Cout]``, x ``[R, T, Cin]``, A ``[K, G, rank, Cin]``, B ``[K, G, Cout, rank]``,
    rows ``[R]``: which of the K adapters, or -1; G targets share the input.
    """
    adapter = rows.clamp(min=0).long()
    a, b = a[adapter].to(x.dtype), b[adapter].to(x.dtype)
    deltas = [(x @ a[:, g].mT @ b[:, g].mT) * scale for g in range(a.shape[1])]
    return torch.where((rows >= 0)[:, None, None], y + torch.cat(deltas, dim=-1), y)


E4M3_MAX = 448.0  # the largest finite value of float8_e4m3fn
# The largest value of a row is taken as at least this, so that its scale is a normal float32.
E4M3_SMALLEST_ROW = E4M3_MAX * torch.finfo(torch.float32).tiny


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values like x ``[..., K]`` and the float32 scale ``[..., 1]`` that gives x again."""
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True).clamp_min(E4M3_SMALLEST_ROW)
    # Between tensors: PyTorch divides by a number, or a number, through a rounded reciprocal.
    limit = torch.full_like(largest, E4M3_MAX)
    return (x * (limit / largest)).to(torch.float8_e4m3fn), largest / limit
