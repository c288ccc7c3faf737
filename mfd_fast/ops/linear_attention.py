"""SANA's ReLU linear attention, softmax-free: O(T) in tokens, no fp32 copies of q, k and v.

    state  = sum_t [v_t; 1] relu(k_t)^T                         fp32, [D + 1, D] per head
    out_t  = (state[:D] relu(q_t)) / (state[D] relu(q_t) + eps)

q, k, v are ``[R, T, H, D]`` views with a contiguous last dimension and any other strides: slices of
one fused product ``[R, T, 3 * H * D]`` are taken as they are.  R rows (lanes), T tokens, H heads of
width D.  out is ``[R, T, H * D]`` contiguous in their dtype.

Traffic: 3 reads and 1 write of R * T * H * D elements (18.4 MB a row of SANA 1024px in bf16) and a
state that stays in the cache; diffusers' processor, which this replaces, casts q, k and v to fp32,
pads v and transposes twice: 7 more passes, most of them in fp32.  The backward reads q, k, v and
the gradient once each, writes three gradients, and keeps nothing but q, k, v and the state.

``kernels/dot.py`` says how an fp32 state meets 16-bit operands in tensor cores, and the error.
"""

import torch
from torch import Tensor

from mfd_fast.ops import reference
from mfd_fast.ops.checks import check_kernel_dtype, check_like
from mfd_fast.ops.dispatch import define, differentiable

OP = "linear_attention"
WIDTHS = (4, 8, 16, 32, 64)


def _fake(q, k, v, eps):
    rows, tokens, heads, width = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    state = q.new_empty((rows, heads, width + 1, width), dtype=dtype)
    return q.new_empty((rows, tokens, heads * width)), state


def _fake_backward(grad, q, k, v, state, eps):
    rows, tokens, heads, width = q.shape
    return q.new_empty((rows, tokens, 3, heads, width))


def _reference_backward(grad, q, k, v, state, eps):
    q_relu, k_relu = reference.wide(q.relu()), reference.wide(k.relu())
    grad = reference.wide(grad.unflatten(2, q.shape[2:]))
    out = torch.einsum("rhed,rthd->rthe", state, q_relu)
    inverse = 1 / (out[..., -1:] + eps)
    grad_norm = -(grad * out[..., :-1]).sum(-1, keepdim=True) * inverse
    grad_state_row = torch.cat([grad, grad_norm], dim=-1)  # the gradient of state q', times n
    grad_q = torch.einsum("rthe,rhed->rthd", grad_state_row, state) * inverse
    grad_state = torch.einsum("rthe,rthd->rhed", grad_state_row, q_relu * inverse)
    v_and_one = torch.nn.functional.pad(reference.wide(v), (0, 1), value=1.0)
    grad_k = torch.einsum("rhed,rthe->rthd", grad_state, v_and_one)
    grad_v = torch.einsum("rhed,rthd->rthe", grad_state[:, :, :-1], k_relu)
    grad_q, grad_k = grad_q.masked_fill(q <= 0, 0), grad_k.masked_fill(k <= 0, 0)
    return torch.stack([grad_q, grad_k, grad_v], dim=2).to(q.dtype)


_forward = define(
    OP,
    "(Tensor q, Tensor k, Tensor v, float eps) -> (Tensor out, Tensor state)",
    fake=_fake,
    reference=reference.linear_attention,
    triton=f"{OP}:{OP}",
)
# The gradients of q, k and v side by side, [R, T, 3, H, D]: one buffer, as the fused product is.
_gradients = define(
    f"_{OP}_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor state, float eps) -> Tensor",
    fake=_fake_backward,
    reference=_reference_backward,
    triton=f"{OP}_backward:{OP}_backward",
)


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.eps = inputs
    ctx.save_for_backward(q, k, v, output[1])


def _backward(ctx, grad, _state):
    return *_gradients(grad.contiguous(), *ctx.saved_tensors, ctx.eps).unbind(2), None


differentiable(OP, _backward, _setup_context)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or q.shape[3] not in WIDTHS:
        raise ValueError(
            f"linear_attention: q must be [R, T, H, D] with D one of {list(WIDTHS)}; "
            f"got {list(q.shape)}"
        )
    check_kernel_dtype(OP, "q", q)
    check_like(OP, "k", k, "q", q)
    check_like(OP, "v", v, "q", q)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(3) != 1:
            raise ValueError(
                f"linear_attention: {name} must have a contiguous last dimension; "
                f"got strides {list(x.stride())}"
            )


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, eps: float = 1e-15) -> Tensor:
    """ReLU linear attention over all tokens, ``[R, T, H * D]`` in the dtype of q.

    Args:
        q, k, v: ``[R, T, H, D]``, D a power of two from 4 to 64; the last dimension contiguous,
            otherwise any strides.  The gradient flows to all three.
        eps: added to the normaliser; a token whose relu(q) is zero gets zero.

    Source: diffusers' SanaLinearAttnProcessor2_0, between its projections.  ``ValueError`` if
    shapes, dtypes or devices disagree.
    """
    _check(q, k, v)
    return _forward(q, k, v, eps)[0]
