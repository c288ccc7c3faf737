"""The checks of the attentions, the adapters and the depthwise unit fail for planted bugs.

As in test_planted_bugs: each bug is in the text of a Triton kernel, and the very check that the
test file makes has to raise; an unchanged copy has to pass.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import test_glu_depthwise
import test_linear_attention
import test_segmented_lora
import test_short_attention
import torch
from test_planted_bugs import load, with_room

from mfd_fast.kernels import linear_attention as forward_kernel
from mfd_fast.kernels import linear_attention_backward as backward_kernel

BUGS = {
    "linear_attention": {
        "wrong sign": ("tl.where(wide < 0, 0.0, wide)", "tl.where(wide > 0, 0.0, wide)"),
        "missing mask": (
            "tl.load(k_ptr + t * k_token + d[None, :], mask=mask",
            "tl.load(k_ptr + t * k_token + d[None, :], mask=in_width",
        ),
        "wrong stride": ("row * k_row + head * k_head", "row * k_row + head * k_token"),
        "state not flipped": ("flipped = tl.trans(state)", "flipped = state"),
        "last tokens left out": (
            "range(0, tokens, BLOCK_T)",
            "range(0, tokens - BLOCK_T, BLOCK_T)",
        ),
    },
    "linear_attention_backward": {
        "wrong sign": ("-c * keys[None, :]", "c * keys[None, :]"),
        "missing mask": ("tl.where(raw.to(tl.float32) <= 0, 0.0, dq)", "dq"),
        "wrong stride": ("grad_q_ptr + step * 3", "grad_q_ptr + step * 2"),
        "range of tokens left out": ("first = split * range_tokens", "first = 2 * range_tokens"),
        "partial states left out": ("tl.static_range(1, SPLITS)", "tl.static_range(1, 1)"),
    },
    "segmented_lora": {
        "wrong sign": ("total *= scale", "total *= -scale"),
        "missing mask": ("tl.load(rows_ptr + row)\n", "tl.maximum(tl.load(rows_ptr + row), 0)\n"),
        "wrong stride": ("group * X_OUTER", "group * 0"),
        "rows of every adapter": ("if tl.load(rows_ptr + row) == adapter", "if row >= 0"),
        "part of the sum left out": ("in tl.static_range(1, SPLITS)", "in tl.static_range(1, 1)"),
        "counter left as it is": ("tl.store(counter_ptr, 0)", "pass"),
        "one counter for all tiles": ("tile * tl.num_programs(0) + tl.program_id(0)", "0"),
    },
    "glu_depthwise": {
        "wrong sign": ("(1.0 + x * (1.0", "(1.0 - x * (1.0"),
        "missing mask": ("other=outside", "other=0.0"),
        "wrong stride": ("grad_x_ptr + (row + n)", "grad_x_ptr + row"),
        "filter not mirrored": ("2 - j if MIRRORED else j", "j"),
        "filter upside down": ("taps[half][3 * ROW", "taps[half][3 * (2 - ROW)"),
        "last row left out": ("if end == height", "if end < 0"),
        "gate's gradient not doubled in 16 bits": ("_slope(z, 1.0,", "_slope(z, 0.5,"),
    },
    "short_attention": {
        "wrong sign": ("p * (dp - tl.sum", "p * (dp + tl.sum"),
        "missing mask": ("tl.where(j < T, scores", "tl.where(j < TOKENS, scores"),
        "wrong stride": (
            "head * strides[0] + i * strides[1]",
            "head * strides[0] + i * strides[2]",
        ),
        "merges exchanged": ("if row_major else", "if not row_major else"),
        "gradients not scaled": ("dk = scale * dot", "dk = dot"),
    },
}


def attention_inputs(device):
    """Two ranges of tokens, the second ragged, with room around the fused product."""
    shape = (2, backward_kernel.SPLIT_TOKENS + 37, 2, 8)
    q, *_ = test_linear_attention.make_inputs(shape, torch.float32, device)
    fused = with_room(q._base)
    return fused.view(*shape[:2], 3, *shape[2:]).unbind(2)


def check_linear_attention(kernel, device):
    test_linear_attention.assert_accurate(kernel.linear_attention, attention_inputs(device))


def check_linear_attention_backward(kernel, device):
    test_linear_attention.assert_backward_accurate(
        forward_kernel.linear_attention, kernel.linear_attention_backward, attention_inputs(device)
    )


@contextmanager
def nan_where_nothing_is_written():
    """Not what an earlier launch left in the same memory."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_segmented_lora(kernel, device):
    shape = (10, 40, 2, 18, 5, (-1, 1, 0))  # two parts of the sum over 40
    y, x, a, b, rows = test_segmented_lora.make_inputs(shape, torch.float32, device)
    args = [with_room(y), with_room(x), with_room(a), with_room(b), rows]
    launchers = SimpleNamespace(**vars(kernel))
    with nan_where_nothing_is_written():
        test_segmented_lora.assert_accurate(launchers, args)
        test_segmented_lora.assert_backward_accurate(launchers, args)


def check_glu_depthwise(kernel, device):
    kernel.multiprocessors = lambda device: 1
    for dtype in (torch.float32, torch.bfloat16):
        *tensors, grad = test_glu_depthwise.make_inputs(1, 3, 4, 2, dtype, device)
        tensors, grad = [with_room(t) for t in tensors], with_room(grad)
        test_glu_depthwise.assert_launchers_accurate(kernel, *tensors, grad, (3, 4))


def check_short_attention(kernel, device):
    qkv, grad, bias = test_short_attention.make_inputs(3, 5, 3, 8, torch.float32, device)
    test_short_attention.assert_launchers_accurate(kernel, qkv, grad, bias, False)


CHECKS = {
    "glu_depthwise": check_glu_depthwise,
    "short_attention": check_short_attention,
    "linear_attention": check_linear_attention,
    "linear_attention_backward": check_linear_attention_backward,
    "segmented_lora": check_segmented_lora,
}


@pytest.mark.parametrize("name", BUGS)
def test_unchanged_copy_passes(name, tmp_path, triton_device):
    CHECKS[name](load(name, tmp_path, None), triton_device)


@pytest.mark.parametrize(("name", "bug"), [(name, bug) for name in BUGS for bug in BUGS[name]])
def test_bug_is_caught(name, bug, tmp_path, triton_device):
    faulty = load(name, tmp_path, BUGS[name][bug])
    with pytest.raises(AssertionError, match=r"relative error|non-finite"):
        CHECKS[name](faulty, triton_device)
