"""Launches whose bounds ``bench.predict.issue`` counts: the launchers on meta tensors, in bf16."""

from functools import partial

import torch

from mfd_fast.kernels import (
    gated_residual,
    glu_depthwise,
    layer_norm_modulate,
    linear_attention,
    linear_attention_backward,
    ode_step,
    quantize_rows,
    segmented_lora,
    short_attention,
)

TOKENS, WIDTH, HIDDEN = 1024, 2240, 5600  # SANA 1.6B at 1024px
# (columns, terms) of the products of a block: q, k, v; the attentions' outputs and the second's
# queries; widen and narrow.
PRODUCTS = (
    (3 * WIDTH, WIDTH), *3 * [(WIDTH, WIDTH)], (2 * HIDDEN, WIDTH), (WIDTH, HIDDEN)
)  # fmt: skip
APART = {"quantize_rows"}  # not in a block of bf16
PASSES = {"attention to the text": 2}  # over the tokens, in PyTorch


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def _sana(rows: int) -> None:
    """Forward of one block of SANA 1.6B at 1,024 tokens; a third of the lanes has adapters."""
    x, row = _meta(rows, 1024, 2240), _meta(rows, 2240)
    own = max(1, rows // 3)
    index, mine = _meta(own, dtype=torch.int32), x[:own]
    y, a, b = _meta(own, 1024, 6720), _meta(1, 3, 64, 2240), _meta(1, 3, 2240, 64)
    wide, taps, bias = _meta(rows, 1024, 11200), _meta(11200, 1, 3, 3), _meta(11200)
    lora = segmented_lora.segmented_lora_
    norm = layer_norm_modulate.layer_norm_modulate
    norm(x, row, row, None, 1e-6, "layer", x, row, None)  # the block before ends
    gated_residual.gated_residual(x, x, row, row[0])
    norm(x, row, row, None, 1e-6, "layer", x, None, row[0])  # the attention to the text ends
    linear_attention.linear_attention(*_heads(rows), 1e-15)
    lora(y, mine, a, b, index, 1.0)
    lora(mine, mine, a[:, :1], b[:, :1], index, 1.0)
    glu_depthwise.glu_depthwise(wide, taps, bias, bias, 32, 32)
    quantize_rows.quantize_rows(x)


def _sana_backward(rows: int) -> None:
    """Backward of the student's block, every row with an adapter."""
    x, row = _meta(rows, 1024, 2240), _meta(rows, 2240)
    mean = _meta(rows, 1024, dtype=torch.float32)
    state = _meta(rows, 70, 33, 32, dtype=torch.float32)
    index, hidden = _meta(rows, dtype=torch.int32), _meta(rows, 1024, 192)
    y, a, b = _meta(rows, 1024, 6720), _meta(1, 3, 64, 2240), _meta(1, 3, 2240, 64)
    grad, wide = _meta(rows, 1024, 5600), _meta(rows, 1024, 11200)
    taps, bias = _meta(11200, 1, 3, 3), _meta(11200)
    norm = layer_norm_modulate.layer_norm_modulate_backward
    glu = glu_depthwise.glu_depthwise_backward
    norm(x, x, row, None, mean, mean, "layer", False)
    norm(x, x, row, None, mean, mean, "layer", False, x, None)
    gated_residual.gated_residual_backward(x, x, row, None, False)
    linear_attention_backward.linear_attention_backward(x, *_heads(rows), state, 1e-15)
    segmented_lora.segmented_lora_backward(y, x, hidden, a, b, index, 1.0, True)
    glu(grad, wide, taps, bias, bias, 32, 32, False)


def _heads(rows: int) -> tuple[torch.Tensor, ...]:
    return _meta(rows, 1024, 3, 70, 32).unbind(2)


def _occfm(rows: int, width: int) -> None:
    """The attention over 12 frames of OccFM's pixels."""
    qkv, grad = _meta(rows, 12, 3, 8, width).unbind(2), _meta(rows, 12, 8 * width)
    short_attention.short_attention(*qkv, None, True, 0.25)
    short_attention.short_attention_backward(grad, *qkv, None, True, 0.25, False)


def _solver(rows: int) -> None:
    x, v = _meta(rows, 2, 32768, dtype=torch.float32), _meta(rows, 3, 32768)
    coef = _meta(rows, 5, dtype=torch.float32)
    ode_step.ode_step_(x, v, None, coef, 4.5, v)


SHAPES = {
    **{f"SANA, {rows} lanes": partial(_sana, rows) for rows in (1, 3, 12)},
    **{f"SANA backward, {rows} rows": partial(_sana_backward, rows) for rows in (1, 4)},
    "OccFM, 2500 pixels, width 8": partial(_occfm, 2500, 8),
    "OccFM, 625 pixels, width 32": partial(_occfm, 625, 32),
    "solver step, 4 samples": partial(_solver, 4),
}
