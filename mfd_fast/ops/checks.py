"""Checks that operators share, and the lane rule.

A row of ``[S, C]`` modulation belongs to one sample; x ``[R, ...]`` holds R / S lanes of every
sample, sample by sample (lane r belongs to sample r // (R / S)).
"""

import torch
from torch import Tensor

MAX_CHANNELS = 8192  # the Triton kernels hold a whole row in registers
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_activation(op: str, x: Tensor, layout: str) -> None:
    """x is contiguous, floating, at least as deep as ``layout`` ("[R, T, C]"), C in 1..8192."""
    ndim = layout.count(",") + 1
    if x.ndim < ndim or (x.ndim > ndim and "..." not in layout):
        raise ValueError(f"{op}: x must be {layout}; got {list(x.shape)}")
    if not 1 <= x.shape[-1] <= MAX_CHANNELS:
        raise ValueError(f"{op}: x must have 1 to {MAX_CHANNELS} channels; got {x.shape[-1]}")
    if x.dtype not in DTYPES:
        raise ValueError(f"{op}: x must be float32, float64, bfloat16 or float16; got {x.dtype}")
    if not x.is_contiguous():
        raise ValueError(
            f"{op}: x must be contiguous (channels last); got strides {list(x.stride())} "
            f"for {list(x.shape)}"
        )


def _check_dtype(op: str, name: str, row: Tensor, x: Tensor) -> None:
    if row.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device}, like x; got {row.device}")
    allowed = {x.dtype, torch.float32 if x.dtype != torch.float64 else x.dtype}
    if row.dtype not in allowed:
        raise ValueError(
            f"{op}: {name} must be {' or '.join(sorted(map(str, allowed)))} for x of {x.dtype}; "
            f"got {row.dtype}"
        )


def check_channel_row(op: str, name: str, row: Tensor, x: Tensor) -> None:
    """A row for every sample alike: ``[C]``, contiguous, of x's dtype or float32."""
    if row.shape != x.shape[-1:] or not row.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be contiguous [{x.shape[-1]}]; "
            f"got {list(row.shape)} with strides {list(row.stride())}"
        )
    _check_dtype(op, name, row, x)


def check_sample_rows(op: str, name: str, rows: Tensor, x: Tensor) -> None:
    """``[S, C]``, any row stride, S a divisor of R = x.shape[0], of x's dtype or float32."""
    channels, lanes = x.shape[-1], x.shape[0]
    if rows.ndim != 2 or rows.shape[1] != channels:
        raise ValueError(f"{op}: {name} must be [S, {channels}]; got {list(rows.shape)}")
    samples = rows.shape[0]
    if (samples == 0 and lanes > 0) or (samples > 0 and lanes % samples):
        raise ValueError(
            f"{op}: {name} must have S rows with S a divisor of the {lanes} lanes of x; "
            f"got S = {samples}"
        )
    if channels > 1 and rows.stride(1) != 1:
        raise ValueError(
            f"{op}: {name} must be contiguous along the channels (any row stride); "
            f"got strides {list(rows.stride())}"
        )
    _check_dtype(op, name, rows, x)


def check_modulation(op: str, scale: Tensor, shift: Tensor, x: Tensor) -> None:
    """scale and shift are rows of samples, alike."""
    check_sample_rows(op, "scale", scale, x)
    check_sample_rows(op, "shift", shift, x)
    if shift.shape != scale.shape or shift.dtype != scale.dtype:
        raise ValueError(
            f"{op}: shift must be like scale, {scale.dtype} {list(scale.shape)}; "
            f"got {shift.dtype} {list(shift.shape)}"
        )


def check_like(op: str, name: str, x: Tensor, other: str, like: Tensor) -> None:
    """x has shape, dtype and device of ``like``, which is called ``other``."""
    if x.shape != like.shape or x.dtype != like.dtype or x.device != like.device:
        raise ValueError(
            f"{op}: {name} must be like {other}, {like.dtype} {list(like.shape)} on {like.device}; "
            f"got {x.dtype} {list(x.shape)} on {x.device}"
        )


def check_contiguous(op: str, **tensors: Tensor | None) -> None:
    """Those that are not None are contiguous."""
    for name, x in tensors.items():
        if x is not None and not x.is_contiguous():
            raise ValueError(
                f"{op}: {name} must be contiguous (the kernel takes no strides of it); "
                f"got strides {list(x.stride())}"
            )


def check_kernel_dtype(op: str, name: str, x: Tensor) -> None:
    """float32, bfloat16 or float16; float64 on the CPU alone."""
    if x.dtype not in KERNEL_DTYPES and not (x.dtype == torch.float64 and x.device.type == "cpu"):
        raise ValueError(
            f"{op}: {name} must be one of {list(KERNEL_DTYPES)}, or torch.float64 on the CPU; "
            f"got {x.dtype} on {x.device}"
        )


def check_rows(op: str, rows: Tensor, name: str, x: Tensor, *columns: int) -> Tensor:
    """``[B, *columns]`` for x ``[B, ...]`` as the kernels read it: contiguous, float32, or float64
    for float64 samples, which take either.  ``ValueError`` names what is wrong.
    """
    allowed = (torch.float32, torch.float64)[: 2 if x.dtype == torch.float64 else 1]
    shape = (x.shape[0], *columns)
    if rows.shape != shape or rows.dtype not in allowed or rows.device != x.device:
        raise ValueError(
            f"{op}: {name} must be {' or '.join(map(str, allowed))} {list(shape)} on {x.device}; "
            f"got {rows.dtype} {list(rows.shape)} on {rows.device}"
        )
    return (rows.double() if x.dtype == torch.float64 else rows).contiguous()
