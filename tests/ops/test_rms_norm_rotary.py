"""RMS norm + rotary embedding: the operator and its Triton kernel against float64 and diffusers."""

import pytest
import torch
from test_planted_bugs import load, with_room

from mfd_fast.kernels import rms_norm_rotary as kernel
from mfd_fast.ops import reference, rms_norm_rotary
from mfd_fast.testing.numerics import assert_as_accurate

from capture import assert_captured_equals_eager

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["interleaved", "half"]
# (rows, tokens, heads, width, rows of the angles): FLUX's, ragged heads and width, one head.
SHAPES = [(2, 3, 2, 16, 1), (3, 2, 3, 12, 3), (1, 4, 1, 48, 1), (1, 2, 5, 128, 1)]
EPS = 1e-6


def make_inputs(rows, tokens, heads, width, angles, dtype, device, *, across=False):
    """x as one of three side by side, weight, cos and sin."""
    x = torch.randn(rows, tokens, 3, heads, width, device=device).to(dtype)[:, :, 1]
    weight = torch.randn(heads * width if across else width, device=device).to(dtype)
    angle = 6 * torch.randn(angles, tokens, width // 2, device=device)
    return x, weight, angle.cos(), angle.sin()


def wide(inputs):
    return [t if t is None else t.double() for t in inputs]


def gradient(inputs, grad, layout, across):
    x, *rest = inputs
    x = x.detach().requires_grad_()
    out = reference.rms_norm_rotary(x, *rest, EPS, layout, across)
    return torch.autograd.grad(out, x, grad.to(out.dtype))[0]


def check(launch, launch_backward, inputs, layout, across=False):
    """Result and gradient by the tolerance rule."""
    form = EPS, layout, across
    out = launch(*inputs, *form)
    assert out.is_contiguous()
    eager = reference.rms_norm_rotary(*inputs, *form)
    assert_as_accurate(out, eager, reference.rms_norm_rotary(*wide(inputs), *form))
    grad = torch.randn_like(out)
    ours = launch_backward(grad, *inputs, *form)
    exact = gradient(wide(inputs), grad, layout, across)
    assert_as_accurate(ours, gradient(inputs, grad, layout, across), exact)


def op(*args):
    return torch.ops.mfd_fast.rms_norm_rotary(*args)


def op_backward(*args):
    return torch.ops.mfd_fast._rms_norm_rotary_backward(*args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape, across, layout, dtype, triton_device):
    inputs = make_inputs(*shape, dtype, triton_device, across=across)
    check(kernel.rms_norm_rotary, kernel.rms_norm_rotary_backward, inputs, layout, across)
    check(op, op_backward, inputs, layout, across)


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_large_tiny_and_zero_values(scale, triton_device):
    x, _, cos, sin = make_inputs(2, 3, 2, 16, 1, torch.float32, triton_device)
    inputs = x * scale, None, cos, sin
    check(kernel.rms_norm_rotary, kernel.rms_norm_rotary_backward, inputs, "half")
    check(op, op_backward, inputs, "interleaved")


def test_angles_by_other_strides(triton_device):
    """As FLUX has them, every number twice, and as complex numbers."""
    x, weight, cos, sin = make_inputs(2, 3, 2, 16, 2, torch.float32, triton_device)
    plain = kernel.rms_norm_rotary(x, weight, cos, sin, EPS, "interleaved", False)
    twice = [t.repeat_interleave(2, dim=-1)[..., ::2] for t in (cos, sin)]
    parts = torch.view_as_real(torch.complex(cos, sin)).unbind(-1)
    for tables in (twice, parts):
        ours = kernel.rms_norm_rotary(x, weight, *tables, EPS, "interleaved", False)
        assert torch.equal(ours, plain)


@pytest.mark.parametrize(("layout", "dim"), [("interleaved", -1), ("half", -2)])
def test_is_what_diffusers_computes(layout, dim, device):
    rotate = pytest.importorskip("diffusers.models.embeddings").apply_rotary_emb
    norm = pytest.importorskip("diffusers.models.normalization").RMSNorm(16, eps=EPS).to(device)
    x, weight, cos, sin = make_inputs(2, 3, 2, 16, 1, torch.float32, device)
    norm.weight.data.copy_(weight)
    repeat = {-1: lambda t: t.repeat_interleave(2, -1), -2: lambda t: torch.cat([t, t], -1)}[dim]
    tables = [repeat(t[0]) for t in (cos, sin)]
    with torch.no_grad():
        theirs = rotate(norm(x), tables, use_real_unbind_dim=dim, sequence_dim=1)
    ours = rms_norm_rotary(x, weight, cos, sin, eps=EPS, layout=layout)
    form = EPS, layout, False
    exact = reference.rms_norm_rotary(*wide((x, weight, cos, sin)), *form)
    assert_as_accurate(ours, theirs, exact)
    assert_as_accurate(theirs, ours, exact)


def test_memory_beside_the_tensors_is_not_read(triton_device):
    x, weight, cos, sin = make_inputs(2, 3, 3, 12, 1, torch.float32, triton_device)
    inputs = [with_room(t.contiguous()) for t in (x, weight, cos, sin)]
    check(kernel.rms_norm_rotary, kernel.rms_norm_rotary_backward, inputs, "interleaved")


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout, across, device):
    x, weight, cos, sin = make_inputs(2, 2, 2, 6, 1, torch.float64, device, across=across)
    x = x.clone().requires_grad_()
    options = {"layout": layout, "across": across}
    torch.autograd.gradcheck(lambda x: rms_norm_rotary(x, weight, cos, sin, **options), x)
    both = x, weight.clone().requires_grad_()
    torch.autograd.gradcheck(lambda x, w: rms_norm_rotary(x, w, cos, sin, **options), both)


def test_only_x_is_kept(device):
    x, weight, cos, sin = make_inputs(1, 4, 2, 16, 1, torch.float32, device)
    x, kept = x.contiguous().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm_rotary(x, weight, cos, sin)
    large = [t for t in kept if t.numel() >= x.numel()]
    assert len(large) == 1 and large[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("shape", [(0, 3, 2, 16), (2, 0, 2, 16)])
def test_empty(shape, triton_device):
    x, angles = torch.zeros(shape, device=triton_device), torch.zeros(1, shape[1], 8)
    angles = angles.to(triton_device)
    for launch in (kernel.rms_norm_rotary, op):
        assert launch(x, None, angles, angles, EPS, "half", False).shape == shape
    for launch in (kernel.rms_norm_rotary_backward, op_backward):
        assert launch(x, x, None, angles, angles, EPS, "half", False).shape == shape


def test_opcheck(device):
    x, weight, cos, sin = make_inputs(2, 3, 2, 16, 1, torch.float32, device)
    args = x.contiguous().requires_grad_(), weight, cos, sin, EPS, "half", True
    args = args[0], weight.repeat(2), *args[2:]
    torch.library.opcheck(torch.ops.mfd_fast.rms_norm_rotary.default, args)
    args = x.contiguous(), x.contiguous(), *args[1:]
    torch.library.opcheck(torch.ops.mfd_fast._rms_norm_rotary_backward.default, args)


X, ANGLES, WEIGHT = torch.zeros(2, 3, 4, 16), torch.zeros(1, 3, 8), torch.ones(16)
ERRORS = [
    ({"layout": "both"}, r"layout must be one of \['interleaved', 'half'\]; got 'both'"),
    ({"x": X[0]}, r"x must be \[R, T, H, D\] with D even and contiguous; got \[3, 4, 16\]"),
    ({"x": X[..., :15]}, r"x must be .*; got \[2, 3, 4, 15\]"),
    ({"x": X.transpose(2, 3)}, r"x must be .*; got \[2, 3, 16, 4\] with strides"),
    ({"x": X.int()}, "x must be one of .*; got torch.int32"),
    (
        {"x": torch.zeros(1, 3, 1025, 16)},
        "x must have at most 16384 channels a token; got 1025 heads of 16",
    ),
    ({"cos": ANGLES[0]}, r"cos must be \[2 or 1, 3, 8\]; got \[3, 8\]"),
    ({"sin": ANGLES[..., :7]}, r"sin must be \[2 or 1, 3, 8\]; got \[1, 3, 7\]"),
    ({"sin": ANGLES.half()}, "sin must be torch.float32 on cpu; got torch.float16"),
    ({"weight": WEIGHT[:8]}, r"weight must be contiguous \[16\] on cpu; got torch.float32 \[8\]"),
    ({"across": True}, r"weight must be contiguous \[64\] on cpu; got torch.float32 \[16\]"),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS)
def test_error_sentences(changes, message):
    arguments = {"x": X, "weight": WEIGHT, "cos": ANGLES, "sin": ANGLES} | changes
    with pytest.raises(ValueError, match=f"^rms_norm_rotary: {message}"):
        rms_norm_rotary(**arguments)


BUGS = {
    "wrong sign": ("a * cos - b * sin", "a * cos + b * sin"),
    "missing mask": ("mask=(h < H) & (d < D), other", "mask=h < H + 1, other"),
    "wrong stride": ("token * sin_token", "token * cos_pair"),
    "mean of a head": ("tl.sum(total, axis=0, keep_dims=True) / (H * D)", "total / D"),
    "gradient turned forwards": ("g_a * cos + g_b * sin", "g_a * cos - g_b * sin"),
    "norm's gradient left out": ("u_a - a * inner", "u_a"),
    "halves exchanged": ("tl.store(at + D // 2, b", "tl.store(at + D // 2, a"),
}


def check_all(module, device):
    for layout, across in (("interleaved", True), ("half", False)):
        inputs = make_inputs(2, 3, 3, 12, 1, torch.float32, device, across=across)
        inputs = [with_room(t.contiguous()) for t in inputs]
        check(module.rms_norm_rotary, module.rms_norm_rotary_backward, inputs, layout, across)


def test_unchanged_copy_passes(tmp_path, triton_device):
    check_all(load("rms_norm_rotary", tmp_path, None), triton_device)


@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_caught(bug, tmp_path, triton_device):
    faulty = load("rms_norm_rotary", tmp_path, BUGS[bug])
    with pytest.raises(AssertionError, match=r"relative error|non-finite"):
        check_all(faulty, triton_device)


@pytest.mark.gpu
def test_captured_step_equals_the_eager_one():
    x, weight, cos, sin = make_inputs(2, 64, 24, 128, 1, torch.bfloat16, "cuda")
    x = x.contiguous().requires_grad_()

    def step():
        out = rms_norm_rotary(x, weight, cos, sin)
        return out, torch.autograd.grad(out, x, torch.ones_like(out))[0]

    assert_captured_equals_eager(step)
