"""What the compile tests compile: every launcher of ``kernels/`` on meta tensors, as on a GPU.

SANA 1.6B's and OccFM's sizes in every dtype, the narrowest and widest ones, and each optional
argument present and absent.
"""

from collections.abc import Iterator
from importlib import import_module

import torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def gated_residual(kernel) -> None:
    for dtype, width, with_bias in ((BF16, 2240, True), (FP32, 2240, True), (FP16, 64, False)):
        x, gate = meta(6, 1024, width, dtype=dtype), meta(2, width, dtype=dtype)
        bias = gate[0] if with_bias else None
        kernel.gated_residual(x, x, gate, bias)
        kernel.gated_residual_backward(x, x, gate, bias, True)
        kernel.gated_residual_backward(x, None, gate, bias, False)


def layer_norm_modulate(kernel) -> None:
    for dtype, width, kind, with_gain in (
        (BF16, 2240, "layer", False), (FP32, 2240, "layer", False), (BF16, 2240, "rms", True),
        (FP16, 128, "layer", False), (BF16, 8192, "layer", True), (FP32, 8192, "layer", True),
    ):  # fmt: skip
        x, row = meta(6, 1024, width, dtype=dtype), meta(2, width, dtype=dtype)
        gain, mean = row[0] if with_gain else None, meta(6, 1024, dtype=FP32)
        kernel.layer_norm_modulate(x, row, row, gain, 1e-6, kind)
        kernel.layer_norm_modulate(x, row, row, gain, 1e-6, kind, x, row, row[0])
        for with_sums in (False, True):
            args = (x, x, row, gain, mean, mean, kind, with_sums)
            kernel.layer_norm_modulate_backward(*args)
            kernel.layer_norm_modulate_backward(*args, x, row)


def rms_norm_modulate_silu(kernel) -> None:
    for dtype, width, is_modulated in (
        (FP16, 64, True), (FP16, 128, False), (FP16, 256, True), (BF16, 256, True), (FP32, 64, True)
    ):  # fmt: skip
        x, gain = meta(2, 625, width, dtype=dtype), meta(width, dtype=dtype)
        row, rstd = meta(2, width, dtype=dtype) if is_modulated else None, meta(2, 625, dtype=FP32)
        kernel.rms_norm_modulate_silu(x, gain, row, row, 1e-12)
        for with_sums in (False, True):
            args = (x, x, gain, row, row, rstd, 1e-12, with_sums)
            kernel.rms_norm_modulate_silu_backward(*args)


def rms_norm_rotary(kernel) -> None:
    """FLUX's heads, Wan 14B's norm across them, LTX's one head, both layouts."""
    for dtype, heads, width, layout, is_across in (
        (BF16, 24, 128, "interleaved", False), (BF16, 40, 128, "interleaved", True),
        (FP32, 40, 128, "interleaved", True), (BF16, 1, 2048, "interleaved", False),
        (BF16, 24, 96, "half", False), (FP32, 24, 128, "half", False), (FP16, 2, 12, "half", True),
    ):  # fmt: skip
        x, angles = meta(2, 512, heads, width, dtype=dtype), meta(1, 512, width // 2, dtype=FP32)
        args = (meta(heads * width if is_across else width, dtype=dtype), angles, angles)
        for weight in (args[0], None):
            kernel.rms_norm_rotary(x, weight, *args[1:], 1e-6, layout, is_across)
            kernel.rms_norm_rotary_backward(x, x, weight, *args[1:], 1e-6, layout, is_across)


def renormalised_guidance(kernel) -> None:
    for dtype, width in ((BF16, 64), (FP16, 96), (FP32, 8192)):
        kernel.renormalised_guidance(meta(2, 3, 16, width, dtype=dtype), 4.0)


def interpolate(kernel) -> None:
    for dtype in (BF16, FP16, FP32):
        x, t = meta(4, 32768, dtype=dtype), meta(4, dtype=FP32)
        for with_target in (False, True):
            kernel.interpolate(x, x, t, with_target)


def ode_step(kernel) -> None:
    for dtype, lanes, with_history, with_input in (
        (BF16, 3, True, True), (BF16, 3, False, True), (BF16, 2, False, False),
        (FP16, 3, True, True), (FP32, 3, True, True), (FP32, 2, True, False),
    ):  # fmt: skip
        x, v, coef = (
            meta(4, 2, 32768, dtype=FP32),
            meta(4, lanes, 32768, dtype=dtype),
            meta(4, 5, dtype=FP32),
        )
        args = (x, v, x if with_history else None, coef, 4.5, v if with_input else None)
        kernel.ode_step_(*args)


def mfd_loss(kernel) -> None:
    for dtype, with_weight in ((FP32, True), (FP32, False), (BF16, True), (FP16, True)):
        x, row = meta(4, 32768, dtype=dtype), meta(4, dtype=FP32)
        kernel.mfd_loss(x, x, x, row, row if with_weight else None)


def quantize_rows(kernel) -> None:
    for dtype, width in ((BF16, 2240), (BF16, 5600), (FP16, 64), (FP32, 8192)):
        kernel.quantize_rows(meta(1024, width, dtype=dtype))


def _heads() -> Iterator[tuple[torch.Tensor, ...]]:
    """(q, k, v) of one, two and four ranges of tokens."""
    for dtype, tokens, width in (
        (BF16, 1024, 32), (FP16, 1024, 32), (FP32, 1024, 32), (BF16, 77, 4), (BF16, 2000, 64),
        (FP32, 2000, 64),
    ):  # fmt: skip
        yield meta(2, tokens, 3, 7, width, dtype=dtype).unbind(2)


def linear_attention(kernel) -> None:
    for heads in _heads():
        kernel.linear_attention(*heads, 1e-15)


def linear_attention_backward(kernel) -> None:
    for q, k, v in _heads():
        state = meta(2, 7, q.shape[3] + 1, q.shape[3], dtype=FP32)
        kernel.linear_attention_backward(q.flatten(2), q, k, v, state, 1e-15)


def segmented_lora(kernel) -> None:
    """SANA's fused q, k, v in one row, whose shrink is cut into parts, and in nine."""
    for dtype, factors, rank, rows in (
        (BF16, BF16, 64, 1), (BF16, FP32, 64, 9), (FP16, FP16, 64, 1), (FP32, FP32, 64, 1),
        (BF16, BF16, 4, 9), (BF16, BF16, 256, 1),
    ):  # fmt: skip
        y, x = meta(rows, 1024, 6720, dtype=dtype), meta(rows, 1024, 2240, dtype=dtype)
        a, b = meta(2, 3, rank, 2240, dtype=factors), meta(2, 3, 2240, rank, dtype=factors)
        index, hidden = meta(rows, dtype=torch.int32), meta(rows, 1024, 3 * rank, dtype=dtype)
        kernel.segmented_lora(y, x, a, b, index, 1.0)
        kernel.segmented_lora_backward(y, x, hidden, a, b, index, 1.0, True)


def glu_depthwise(kernel) -> None:
    for dtype, channels, with_bias, width in (
        (BF16, 5600, True, 32), (FP16, 5600, False, 32), (FP32, 5600, True, 32),
        (BF16, 53, False, 4),
    ):  # fmt: skip
        x, grad = meta(2, 1024, 2 * channels, dtype=dtype), meta(2, 1024, channels, dtype=dtype)
        weight, bias = meta(2 * channels, 1, 3, 3, dtype=dtype), meta(2 * channels, dtype=dtype)
        args = (x, weight, bias, bias if with_bias else None, 1024 // width, width)
        kernel.glu_depthwise(*args)
        kernel.glu_depthwise_backward(grad, *args, with_bias)


def short_attention(kernel) -> None:
    for dtype, width, with_bias in (
        (BF16, 8, False), (BF16, 16, True), (BF16, 32, False), (FP16, 16, True),
        (FP32, 16, True), (FP32, 64, True), (BF16, 64, True),
    ):  # fmt: skip
        qkv, grad = meta(2500, 12, 3, 8, width, dtype=dtype), meta(2500, 12, 8 * width, dtype=dtype)
        args = (*qkv.unbind(2), meta(8, 12, 12, dtype=FP32) if with_bias else None, True, 0.25)
        kernel.short_attention(*args)
        kernel.short_attention_backward(grad, *args, with_bias)


LAUNCHERS = {
    function.__name__: function
    for function in (
        gated_residual, layer_norm_modulate, rms_norm_modulate_silu, rms_norm_rotary, interpolate,
        renormalised_guidance, ode_step,
        mfd_loss, quantize_rows, linear_attention, linear_attention_backward, segmented_lora,
        glu_depthwise, short_attention,
    )
}  # fmt: skip


def launch(module: str) -> None:
    """Call the launchers of ``kernels/<module>.py``."""
    LAUNCHERS[module](import_module(f"mfd_fast.kernels.{module}"))
