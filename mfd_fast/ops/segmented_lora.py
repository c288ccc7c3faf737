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

from mfd_fast.ops.dispatch import register
from mfd_fast.ops.reference import wide

_ARGS = "Tensor x, Tensor a, Tensor b, Tensor rows, float scale"
torch.library.define("mfd_fast::segmented_lora_", f"(Tensor(a!) y, {_ARGS}) -> ()")
# hidden is x A^T [R, T, G * rank], kept for the gradient of B.
torch.library.define(
    "mfd_fast::segmented_lora", f"(Tensor y, {_ARGS}) -> (Tensor out, Tensor hidden)"
)
torch.library.define(
    "mfd_fast::_segmented_lora_backward",
    "(Tensor grad, Tensor x, Tensor hidden, Tensor a, Tensor b, Tensor rows, float scale, "
    "bool need_x) -> (Tensor grad_x, Tensor grad_a, Tensor grad_b)",
)

MAX_RANK = 256


@torch.library.register_fake("mfd_fast::segmented_lora_")
def _(y, x, a, b, rows, scale):
    return None


@torch.library.register_fake("mfd_fast::segmented_lora")
def _(y, x, a, b, rows, scale):
    return torch.empty_like(y), x.new_empty((*x.shape[:2], a.shape[1] * a.shape[2]))


@torch.library.register_fake("mfd_fast::_segmented_lora_backward")
def _(grad, x, hidden, a, b, rows, scale, need_x):
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


_TRITON = "mfd_fast.kernels.segmented_lora"
register("segmented_lora_", _cpu_, triton=f"{_TRITON}:segmented_lora_")
register("segmented_lora", _cpu, triton=f"{_TRITON}:segmented_lora")
register("_segmented_lora_backward", _cpu_backward, triton=f"{_TRITON}:segmented_lora_backward")


def _setup_context(ctx, inputs, output):
    _, x, a, b, rows, ctx.scale = inputs
    ctx.save_for_backward(x, output[1], a, b, rows)


def _backward(ctx, grad, _hidden):
    x, hidden, a, b, rows = ctx.saved_tensors
    need_x = ctx.needs_input_grad[1]
    grad_x, grad_a, grad_b = torch.ops.mfd_fast._segmented_lora_backward(
        grad.contiguous(), x, hidden, a, b, rows, ctx.scale, need_x
    )
    return grad, grad_x if need_x else None, grad_a, grad_b, None, None


torch.library.register_autograd("mfd_fast::segmented_lora", _backward, setup_context=_setup_context)


def _check_layers(name: str, y: Tensor, x: Tensor) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    if x.ndim != 3 or (
        x.dtype not in dtypes and not (x.dtype == torch.float64 and x.device.type == "cpu")
    ):
        raise ValueError(
            f"{name}: x must be [R, T, Cin] in one of {list(dtypes)}, or torch.float64 on the CPU; "
            f"got {x.dtype} {list(x.shape)} on {x.device}"
        )
    if y.ndim != 3 or y.shape[:2] != x.shape[:2] or y.dtype != x.dtype or y.device != x.device:
        raise ValueError(
            f"{name}: y must be {x.dtype} {[*x.shape[:2], 'G * Cout']} on {x.device}; "
            f"got {y.dtype} {list(y.shape)} on {y.device}"
        )
    for label, tensor in (("x", x), ("y", y)):
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name}: {label} must be contiguous (the kernel takes no strides of it); "
                f"got strides {list(tensor.stride())}"
            )


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
    return torch.ops.mfd_fast.segmented_lora(y, x, a, b, rows, scale)[0]


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
    torch.ops.mfd_fast.segmented_lora_(y, x, a, b, rows, scale)
    return y
