"""Guidance that keeps a length: the operator and its Triton kernel against float64."""

import pytest
import torch
from test_planted_bugs import load, with_room

from mfd_fast.kernels import renormalised_guidance as kernel
from mfd_fast.ops import reference, renormalised_guidance
from mfd_fast.testing.numerics import assert_as_accurate

W = 4.0
# [B, L, ..., C]: a row of Lumina's and of Qwen's, ragged ones, and one element.
SHAPES = [(2, 3, 4, 5, 16), (1, 3, 70, 64), (3, 2, 37, 12), (2, 4, 1, 1), (0, 3, 2, 4)]


def check(launch, v):
    assert_as_accurate(
        launch(v, W),
        reference.renormalised_guidance(v, W),
        reference.renormalised_guidance(v.double(), W),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape, dtype, triton_device):
    v = torch.randn(shape, device=triton_device).to(dtype)
    check(kernel.renormalised_guidance, v)
    check(renormalised_guidance, v)
    check(renormalised_guidance, v.transpose(0, 1).contiguous().transpose(0, 1))


def test_the_reference_keeps_the_length_and_the_other_lanes():
    v = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    out = reference.renormalised_guidance(v, W)
    plain = v[:, 1] + W * (v[:, 0] - v[:, 1])
    assert torch.allclose(out[:, 0].norm(dim=-1), v[:, 0].norm(dim=-1))
    cosine = torch.nn.functional.cosine_similarity(out[:, 0], plain, dim=-1)
    assert torch.allclose(cosine, torch.ones_like(cosine))
    assert torch.equal(out[:, 0], out[:, 1]) and torch.equal(out[:, 2], v[:, 2])
    assert torch.equal(out[:, 0], reference.renormalised(v[:, 0], v[:, 1], W))


def test_opcheck(device):
    v = torch.randn(2, 3, 5, 8, device=device)
    torch.library.opcheck(torch.ops.mfd_fast.renormalised_guidance.default, (v, W))


@pytest.mark.parametrize(
    ("v", "message"),
    [
        (torch.zeros(2, 1, 3, 4), r"v must be \[B, L, ..., C\] .*; got \[2, 1, 3, 4\]"),
        (torch.zeros(1, 2, 8193), "C at most 8192; got"),
        (torch.zeros(2, 2, 3).int(), "v must be one of"),
    ],
)
def test_error_sentences(v, message):
    with pytest.raises(ValueError, match=f"^renormalised_guidance: .*{message}"):
        renormalised_guidance(v, W)


BUGS = {
    "wrong sign": ("guidance * (cond - uncond)", "guidance * (cond + uncond)"),
    "missing mask": ("v_ptr + second, mask=mask", "v_ptr + second, mask=r < rows"),
    "wrong stride": ("lane + (lane > 0).to(tl.int32)", "lane"),
    "one lane left": ("tl.store(out_ptr + second, v", "tl.store(out_ptr + second, cond"),
}


@pytest.mark.parametrize("bug", [None, *BUGS])
def test_bugs_are_caught(bug, tmp_path, triton_device):
    module = load("renormalised_guidance", tmp_path, BUGS.get(bug))
    v = with_room(torch.randn(2, 3, 37, 12, device=triton_device))
    if bug is None:
        check(module.renormalised_guidance, v)
        return
    with pytest.raises(AssertionError, match=r"relative error|non-finite"):
        check(module.renormalised_guidance, v)
