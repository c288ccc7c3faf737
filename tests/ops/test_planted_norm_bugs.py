"""The checks of the norm and gate operators fail for bugs planted in their kernels.

As in test_planted_bugs: each bug is in the text of a Triton kernel, and the very check that the
test file makes has to raise; an unchanged copy has to pass.
"""

import pytest
import test_gated_residual
import test_layer_norm_modulate
import test_residual_norm_modulate
import test_rms_norm_modulate_silu
import torch
from test_planted_bugs import load, with_room

from mfd_fast.kernels import (
    layer_norm_modulate,
    norm_modulate_backward,
    rms_norm_modulate_silu,
)

BUGS = {
    "norm_modulate": {
        "wrong sign": ("y = xs[i] - mean", "y = xs[i] + mean"),
        "missing mask": ("if (i + 1) * BLOCK_C > C:", "if False:"),
        "wrong stride": ("scale_ptr += sample * scale_stride", "scale_ptr += sample * C"),
        "norm of x alone": ("x = stream.to(WIDE)", "pass"),
        "stream without bias": ("y += load_row(bias_ptr, c, C, WIDE)", "pass"),
        "gate of the first sample": ("gate_ptr += sample * gate_stride", "pass"),
        "wrong count": ("tl.sqrt(total / C + EPS)", "tl.sqrt(total / BLOCK_C + EPS)"),
    },
    "norm_modulate_backward": {
        "wrong sign": ("grads[i] - xhats[i] * inner", "grads[i] + xhats[i] * inner"),
        "missing mask": ("inner = tl.where(rstd < MAX_RSTD, inner, 0.0)", "pass"),
        "wrong stride": ("shift_ptr + sample * shift_stride", "shift_ptr + sample * C"),
        "base left out": ("grad_x += tl.load(base_ptr", "grad_x += 0 * tl.load(base_ptr"),
        "gate of the first sample": (
            "gate_ptr = None if gate_ptr is None else gate_ptr + sample * gate_stride",
            "pass",
        ),
        "tiles of another part": ("(pid % parts) * tiles + tile", "(pid % parts) + tile"),
    },
    "column_sum": {
        "wrong sign": ("value *= weight + OFFSET", "value *= weight - OFFSET"),
        "missing mask": ("(p < parts)[:, None] & (c < n)", "(p < parts + 1)[:, None] & (c < n)"),
        "wrong stride": ("s * weight_stride", "s * C"),
    },
    "gated_residual": {
        "wrong sign": ("x + gate * y", "x - gate * y"),
        "missing mask": ("grad_ptr + offset, mask=mask", "grad_ptr + offset, mask=c < C"),
        "wrong stride": ("sample * gate_stride", "sample * C"),
        "bias left out": ("sum_a += grad * (y + bias)", "sum_a += grad * y"),
    },
}
PARTS = 6  # programs of a backward pass: several tiles for each of several programs of a sample


def check_norms(device):
    """Both operators that share the kernels; the second also under the least norm."""
    test = test_layer_norm_modulate
    inputs = test.make_inputs(4, 37, 150, 2, torch.float32, device)
    rows = with_room(inputs[1]._base)
    inputs = (with_room(inputs[0]), rows[:, 1], rows[:, 4], with_room(inputs[3]))
    kernel = layer_norm_modulate
    launches = kernel.layer_norm_modulate, kernel.layer_norm_modulate_backward
    test.check(*launches, inputs, "layer")
    residual = with_room(torch.randn_like(inputs[0])), rows[:, 2], with_room(inputs[3].clone())
    test_residual_norm_modulate.check_residual(*launches, inputs, residual, "layer")

    test = test_rms_norm_modulate_silu
    x, gain, *_ = test.make_inputs((4, 9, 70), 2, torch.float32, device)
    rows = with_room(torch.randn(2, 140, device=device)).chunk(2, dim=1)
    kernel = rms_norm_modulate_silu
    launch, launch_backward = kernel.rms_norm_modulate_silu, kernel.rms_norm_modulate_silu_backward
    for factor in (1.0, 1e-14):
        test.check(launch, launch_backward, (with_room(x * factor), with_room(gain), *rows))


def check_norm_modulate(faulty, device, monkeypatch):
    for kernel in (layer_norm_modulate, rms_norm_modulate_silu):
        monkeypatch.setattr(kernel, "forward", faulty.forward)
    check_norms(device)


def check_norm_modulate_backward(faulty, device, monkeypatch):
    monkeypatch.setattr(faulty, "PROGRAMS", PARTS)
    for kernel in (layer_norm_modulate, rms_norm_modulate_silu):
        monkeypatch.setattr(kernel, "backward", faulty.backward)
    check_norms(device)


def check_column_sum(faulty, device, monkeypatch):
    def sum_parts(partial):  # with finite values, not zeros, behind its end
        wide = torch.ones(partial.numel() + 4096, device=partial.device)
        wide[: partial.numel()] = partial.flatten()
        return faulty.sum_parts(wide[: partial.numel()].view(partial.shape))

    monkeypatch.setattr(norm_modulate_backward, "PROGRAMS", PARTS)
    monkeypatch.setattr(norm_modulate_backward, "sum_parts", sum_parts)
    for kernel in (layer_norm_modulate, rms_norm_modulate_silu):
        monkeypatch.setattr(kernel, "finish", faulty.finish)
    check_norms(device)


def check_gated_residual(faulty, device, monkeypatch):
    monkeypatch.setattr(faulty, "PROGRAMS", PARTS)
    test = test_gated_residual
    x, y, gate, bias = test.make_inputs(4, 37, 130, 2, torch.float32, device)
    inputs = (with_room(x), with_room(y), with_room(gate._base)[:, 2], with_room(bias))
    grad = with_room(torch.randn_like(x))
    test.check(faulty.gated_residual, faulty.gated_residual_backward, inputs, grad)


CHECKS = {
    "norm_modulate": check_norm_modulate,
    "norm_modulate_backward": check_norm_modulate_backward,
    "column_sum": check_column_sum,
    "gated_residual": check_gated_residual,
}


@pytest.mark.parametrize("name", BUGS)
def test_unchanged_copy_passes(name, tmp_path, triton_device, monkeypatch):
    CHECKS[name](load(name, tmp_path, None), triton_device, monkeypatch)


@pytest.mark.parametrize(("name", "bug"), [(name, bug) for name in BUGS for bug in BUGS[name]])
def test_bug_is_caught(name, bug, tmp_path, triton_device, monkeypatch):
    faulty = load(name, tmp_path, BUGS[name][bug])
    with pytest.raises(AssertionError, match=r"relative error|non-finite"):
        CHECKS[name](faulty, triton_device, monkeypatch)
