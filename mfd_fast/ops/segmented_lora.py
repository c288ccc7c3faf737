"""Low-rank adapters on some rows of a batch, several targets that share the input in one go.

    y[r, :, g] += scale (x[r] A[k, g]^T) B[k, g]^T       k = rows[r], nothing where rows[r] = -1

R rows (lanes) of T tokens; x ``[R, T, Cin]``; G targets of equal width Cout side by side in y
``[R, T, G * Cout]`` (SANA's fused q, k, v: G = 3); K adapters A ``[K, G, rank, Cin]`` and B
``[K, G, Cout, rank]`` with contiguous last two dimensions and any strides of the first two: factors
that follow each other in one flat vector (A_q B_q A_k B_k ...) are taken as they are.  rows is
``[R]`` int32 on the device of x and is never read on the host there, so the call can be captured.

A and B are in x's dtype, or float32 masters that are rounded to x's dtype as they are read; their
gradients come in their own dtype, summed in fp32 over rows in order, without atomics.

Traffic per row with an adapter: x, the hidden x A^T twice, y read and written, in all
T (Cin + 2 G rank + 2 G Cout) elements, 32.9 MB for SANA 1024px at rank 64 in bf16; rows without
one cost nothing.  PEFT runs, per target, two products, a scaling and a sum, each a pass over
``[R, T, Cout]``, on all rows of the call.
"""

import torch
from torch import Tensor

from mfd_fast.ops.checks import check_contiguous, check_kernel_dtype
from mfd_fast.ops.dispatch import define, differentiable
from mfd_fast.ops.reference import wide

OP = "segmented_lora"
_ARGS = "Tensor x, Tensor a, Tensor b, Tensor rows, float scale"
MAX_RANK = 256


def _fake(y, x, a, b, rows, scale):
    return torch.empty_like(y), x.new_empty((*x.shape[:2], a.shape[1] * a.shape[2]))


def _fake_backward(grad, x, hidden, a, b, rows, scale, need_x):
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    return grad_x, a.new_empty(a.shape), b.new_empty(b.shape)


def _used(rows: Tensor) -> list[tuple[int, int]]:
    """(row, adapter) of the rows with one.  numpy() is a view of host memory, or raises."""
    return [(row, int(k)) for row, k in enumerate(rows.numpy()) if k >= 0]


def _add_cpu(y, x, a, b, rows, scale) -> Tensor:
    """y in place, a product for each row and target; returns hidden."""
    groups, rank = a.shape[1:3]
    hidden = x.new_zeros((*x.shape[:2], groups * rank))
    a, b = a.to(x.dtype), b.to(x.dtype)
    for row, k in _used(rows):
        torch.mm(x[row], a[k].flatten(0, 1).t(), out=hidden[row])
        targets = y[row].chunk(groups, dim=-1)
        for part, target, b_g in zip(hidden[row].split(rank, -1), targets, b[k], strict=True):
            target.addmm_(part, b_g.t(), alpha=scale)
    return hidden


def _cpu(y, x, a, b, rows, scale):
    out = y.clone()
    return out, _add_cpu(out, x, a, b, rows, scale)


def _cpu_(y, x, a, b, rows, scale):
    _add_cpu(y, x, a, b, rows, scale)


def _cpu_backward(grad, x, hidden, a, b, rows, scale, need_x):
    groups, rank = a.shape[1:3]
    grad_x = torch.zeros_like(x) if need_x else x.new_empty(0)
    sums = torch.promote_types(x.dtype, torch.float32)
    grad_a, grad_b = a.new_zeros(a.shape, dtype=sums), b.new_zeros(b.shape, dtype=sums)
    grad_h = x.new_empty(x.shape[1], groups * rank)
    a_x, b_x = a.to(x.dtype), b.to(x.dtype)
    for row, k in _used(rows):
        parts = zip(grad[row].chunk(groups, -1), grad_h.split(rank, -1), strict=True)
        for g, (grad_g, grad_part) in enumerate(parts):
            part = hidden[row, :, g * rank : (g + 1) * rank]
            grad_b[k, g].addmm_(wide(grad_g).t(), wide(part), alpha=scale)
            torch.mm(grad_g, b_x[k, g], out=grad_part)
        grad_h.mul_(scale)
        grad_a[k].flatten(0, 1).addmm_(wide(grad_h).t(), wide(x[row]))
        if need_x:
            torch.mm(grad_h, a_x[k].flatten(0, 1), out=grad_x[row])
    return grad_x, grad_a.to(a.dtype), grad_b.to(b.dtype)


_in_place = define(
    f"{OP}_",
    f"(Tensor(a!) y, {_ARGS}) -> ()",
    fake=lambda y, x, a, b, rows, scale: None,
    reference=_cpu_,
    triton=f"{OP}:{OP}_",
)
# hidden is x A^T [R, T, G * rank], kept for the gradient of B.
_forward = define(
    OP,
    f"(Tensor y, {_ARGS}) -> (Tensor out, Tensor hidden)",
    fake=_fake,
    reference=_cpu,
    triton=f"{OP}:{OP}",
)
_gradients = define(
    f"_{OP}_backward",
    "(Tensor grad, Tensor x, Tensor hidden, Tensor a, Tensor b, Tensor rows, float scale, "
    "bool need_x) -> (Tensor grad_x, Tensor grad_a, Tensor grad_b)",
    fake=_fake_backward,
    reference=_cpu_backward,
    triton=f"{OP}:{OP}_backward",
)


def _setup_context(ctx, inputs, output):
    _, x, a, b, rows, ctx.scale = inputs
    ctx.save_for_backward(x, output[1], a, b, rows)


def _backward(ctx, grad, _hidden):
    need_x = ctx.needs_input_grad[1]
    kept = *ctx.saved_tensors, ctx.scale
    grad_x, grad_a, grad_b = _gradients(grad.contiguous(), *kept, need_x)
    return grad, grad_x if need_x else None, grad_a, grad_b, None, None


differentiable(OP, _backward, _setup_context)


def _check_layers(name: str, y: Tensor, x: Tensor) -> None:
    if x.ndim != 3:
        raise ValueError(f"{name}: x must be [R, T, Cin]; got {list(x.shape)}")
    check_kernel_dtype(name, "x", x)
    if y.ndim != 3 or y.shape[:2] != x.shape[:2] or y.dtype != x.dtype or y.device != x.device:
        raise ValueError(
            f"{name}: y must be {x.dtype} {[*x.shape[:2], 'G * Cout']} on {x.device}; "
            f"got {y.dtype} {list(y.shape)} on {y.device}"
        )
    check_contiguous(name, x=x, y=y)


def _check_factors(name: str, y: Tensor, x: Tensor, a: Tensor, b: Tensor, rows: Tensor) -> None:
    if a.ndim != 4 or a.shape[3] != x.shape[2] or not 1 <= a.shape[2] <= MAX_RANK:
        raise ValueError(
            f"{name}: a must be [K, G, rank, {x.shape[2]}] with rank 1 to {MAX_RANK}; "
            f"got {list(a.shape)}"
        )
    adapters, groups, rank, _ = a.shape
    if b.ndim != 4 or b.shape[:2] != a.shape[:2] or b.shape[3] != rank:
        raise ValueError(
            f"{name}: b must be [{adapters}, {groups}, Cout, {rank}] like a {list(a.shape)}; "
            f"got {list(b.shape)}"
        )
    if y.shape[2] != groups * b.shape[2]:
        raise ValueError(
            f"{name}: y must hold {groups} targets of equal width {b.shape[2]}, "
            f"[R, T, {groups * b.shape[2]}]; got {list(y.shape)}"
        )
    for label, factor in (("a", a), ("b", b)):
        if factor.dtype not in (x.dtype, torch.float32) or factor.device != x.device:
            raise ValueError(
                f"{name}: {label} must be {x.dtype} or torch.float32 on {x.device}; "
                f"got {factor.dtype} on {factor.device}"
            )
        if factor.stride(3) != 1 or factor.stride(2) != factor.shape[3]:
            raise ValueError(
                f"{name}: {label} must be contiguous in its last two dimensions; "
                f"got strides {list(factor.stride())} for {list(factor.shape)}"
            )
    if rows.shape != x.shape[:1] or rows.dtype != torch.int32 or rows.device != x.device:
        raise ValueError(
            f"{name}: rows must be torch.int32 [{x.shape[0]}] on {x.device}; "
            f"got {rows.dtype} {list(rows.shape)} on {rows.device}"
        )


def segmented_lora(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, rows: Tensor, scale: float
) -> Tensor:
    """y plus the low-rank update of every row's adapter; differentiable.

    Args:
        y: outputs of G frozen linear layers side by side, ``[R, T, G * Cout]``, contiguous.
        x: their input, ``[R, T, Cin]``, contiguous.
        a, b: factors ``[K, G, rank, Cin]`` and ``[K, G, Cout, rank]``, rank 1 to 256, in x's dtype
            or float32; contiguous in their last two dimensions.
        rows: ``[R]`` int32 on x's device: an adapter in [0, K), or -1 for none.
        scale: alpha / rank.

    The gradient flows to y, x, a and b.  Source: LoRA (Hu et al. 2021); numerically PEFT's order,
    lora_B(lora_A(x)) * scale added to the output.  ``ValueError`` if shapes, dtypes, devices or
    layouts do not fit.
    """
    _check_layers("segmented_lora", y, x)
    _check_factors("segmented_lora", y, x, a, b, rows)
    return _forward(y, x, a, b, rows, scale)[0]


def segmented_lora_(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, rows: Tensor, scale: float
) -> Tensor:
    """:func:`segmented_lora` added to y in place, for lanes without gradient; returns y."""
    _check_layers("segmented_lora_", y, x)
    _check_factors("segmented_lora_", y, x, a, b, rows)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (y, x, a, b)):
        raise ValueError(
            "segmented_lora_: y, x, a and b must not require gradients while they are recorded; "
            "got one that does: use segmented_lora or torch.no_grad()"
        )
    _in_place(y, x, a, b, rows, scale)
    return y
