"""Attention over a few tokens in many rows: the operator against float64, both merges."""

import pytest
import torch

from mfd_fast.kernels import short_attention as kernel
from mfd_fast.ops import reference, short_attention, short_attention_qkv
from mfd_fast.ops.short_attention import _rounded_backward
from mfd_fast.testing.numerics import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (rows, tokens, heads, width): OccFM's three widths, with rows that do not fill a block; the most
# tokens and the widest head; ragged; more heads than a block of the CUDA kernel holds; one of each.
SHAPES = [
    (37, 12, 8, 8), (21, 12, 8, 16), (9, 12, 8, 32), (5, 16, 2, 64), (6, 7, 3, 5), (3, 5, 40, 12),
    (2, 1, 1, 1), (300, 12, 8, 8),
]  # fmt: skip


def make_inputs(rows, tokens, heads, width, dtype, device, scale=1.0):
    """q, k, v as views of the fused product, the gradient at the output, and the bias.

    The bias lies [T, T, H] in memory, as a gather from a table of [buckets, H] leaves it.
    """
    qkv = (torch.randn(rows, tokens, 3, heads, width, device=device) * scale).to(dtype)
    grad = torch.randn(rows, tokens, heads * width, device=device).to(dtype)
    bias = torch.randn(tokens, tokens, heads, device=device).permute(2, 0, 1)
    return qkv, grad, bias


def call(q, k, v, bias, row_major):
    merge = "row_major" if row_major else "normal"
    return short_attention(q, k, v, bias=bias, merge=merge)


def call_reference(q, k, v, bias, row_major):
    return reference.short_attention(q, k, v, bias, row_major, q.shape[-1] ** -0.5)


def with_gradients(function, qkv, bias, row_major, grad):
    """Output, and gradients to the fused product and the bias."""
    qkv = qkv.detach().requires_grad_()
    leaves = [qkv] if bias is None else [qkv, bias.detach().requires_grad_()]
    out = function(*qkv.unbind(2), leaves[1] if bias is not None else None, row_major)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def check(qkv, grad, bias, row_major):
    wide = None if bias is None else bias.double()
    ours = with_gradients(call, qkv, bias, row_major, grad)
    eager = with_gradients(call_reference, qkv, bias, row_major, grad)
    exact = with_gradients(call_reference, qkv.double(), wide, row_major, grad.double())
    for one, two, three in zip(ours, eager, exact, strict=True):
        assert_as_accurate(one, two, three)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_major", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_operator_matches_float64(shape, has_bias, row_major, dtype, device):
    qkv, grad, bias = make_inputs(*shape, dtype, device)
    check(qkv, grad, bias if has_bias else None, row_major)


def assert_launchers_accurate(lanes, qkv, grad, bias, row_major):
    """Output and gradients of the Triton launchers by the tolerance rule."""
    wide, scale = None if bias is None else bias.double(), qkv.shape[-1] ** -0.5
    args = (*qkv.unbind(2), bias, row_major, scale)
    ours = lanes.short_attention(*args), *lanes.short_attention_backward(grad, *args, True)
    eager = with_gradients(call_reference, qkv, bias, row_major, grad)
    exact = with_gradients(call_reference, qkv.double(), wide, row_major, grad.double())
    for one, two, three in zip(ours[: len(eager)], eager, exact, strict=True):
        assert_as_accurate(one, two, three)
    alone, none = lanes.short_attention_backward(grad, *args, False)
    assert torch.equal(alone, ours[1]) and none.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("has_bias", "row_major"), [(False, True), (True, False)])
@pytest.mark.parametrize("shape", [(3, 12, 8, 8), (2, 16, 2, 64), SHAPES[4], (2, 5, 9, 12)])
def test_triton_matches_float64(shape, has_bias, row_major, dtype, triton_device):
    qkv, grad, bias = make_inputs(*shape, dtype, triton_device)
    assert_launchers_accurate(kernel, qkv, grad, bias if has_bias else None, row_major)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 30.0])
def test_triton_takes_extreme_values(scale, dtype, triton_device):
    qkv, grad, bias = make_inputs(3, 12, 4, 16, dtype, triton_device, scale)
    assert_launchers_accurate(kernel, qkv, grad, bias * scale, False)


def test_triton_sums_the_gradient_of_the_bias_over_several_blocks(triton_device, monkeypatch):
    monkeypatch.setattr(kernel, "PROGRAMS", 3)  # 9 blocks of rows in 3 parts, 13 more are empty
    shape = kernel.launch_shape(3, 2, 4, 4)
    rows = 9 * shape["PAIRS"] // shape["BLOCK_H"]
    qkv, grad, bias = make_inputs(rows, 3, 2, 4, torch.float32, triton_device)
    assert_launchers_accurate(kernel, qkv, grad, bias, False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 30.0])
def test_extreme_values(scale, dtype, device):
    """Uniform probabilities, nearly uniform ones, and ones that are 0 or 1."""
    qkv, grad, bias = make_inputs(40, 12, 8, 16, dtype, device, scale)
    check(qkv, grad, bias * scale, False)


def test_scores_beyond_the_range_of_the_exponential(device):
    qkv, grad, _ = make_inputs(8, 12, 2, 8, torch.float32, device)
    qkv[:, :, 0] *= 1e4
    check(qkv, grad, None, False)


def test_a_masked_key_has_no_effect(device):
    qkv, _, bias = make_inputs(4, 6, 3, 8, torch.float32, device)
    bias[:, :, 5] = float("-inf")
    first = call(*qkv.unbind(2), bias, False)
    qkv[:, 5, 1:] += 1.0
    assert torch.equal(call(*qkv.unbind(2), bias, False), first)


@pytest.mark.parametrize(("tokens", "heads", "width"), [(12, 8, 16), (5, 3, 4)])
def test_row_major_merge_is_the_index_formula_of_occfm(tokens, heads, width, device):
    """Token i, channel c is O[h, j, m] with i C + c = (h T + j) d + m."""
    qkv, _, _ = make_inputs(3, tokens, heads, width, torch.float32, device)
    normal = call(*qkv.unbind(2), None, False).view(3, tokens, heads, width)
    actual = call(*qkv.unbind(2), None, True)
    channels = heads * width
    expected = torch.empty_like(actual)
    for i in range(tokens):
        for c in range(channels):
            pair, m = divmod(i * channels + c, width)
            h, j = divmod(pair, tokens)
            expected[:, i, c] = normal[:, j, h, m]
    assert torch.equal(actual, expected)
    assert not torch.equal(actual, normal.flatten(2))


@pytest.mark.parametrize("row_major", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_fused_product_gives_the_same_bits(has_bias, row_major, device):
    qkv, grad, bias = make_inputs(9, 12, 8, 16, torch.bfloat16, device)
    bias = bias if has_bias else None

    def fused(q, k, v, bias, row_major):
        merge = "row_major" if row_major else "normal"
        return short_attention_qkv(q, bias=bias, merge=merge)

    expected = with_gradients(call, qkv, bias, row_major, grad)
    leaves = [qkv.requires_grad_()] + ([] if bias is None else [bias.requires_grad_()])
    out = fused(qkv, None, None, bias, row_major)
    actual = (out, *torch.autograd.grad(out, leaves, grad))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("row_major", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_gradcheck(has_bias, row_major):
    qkv, _, bias = make_inputs(2, 4, 2, 3, torch.float64, "cpu")
    bias = bias.double().requires_grad_() if has_bias else None
    assert torch.autograd.gradcheck(call, (*qkv.requires_grad_().unbind(2), bias, row_major))


@pytest.mark.parametrize("row_major", [False, True])
def test_reference_backward_is_the_autograd_of_the_reference(row_major):
    qkv, grad, bias = make_inputs(30, 7, 3, 8, torch.float32, "cpu")
    scale = 8**-0.5
    ours = _rounded_backward(grad, *qkv.unbind(2), bias, row_major, scale, True)
    eager = with_gradients(call_reference, qkv, bias, row_major, grad)[1:]
    exact = with_gradients(call_reference, qkv.double(), bias.double(), row_major, grad.double())
    for one, two, three in zip(ours, eager, exact[1:], strict=True):
        assert_as_accurate(one, two, three)


def test_scale_can_be_given(device):
    qkv, _, _ = make_inputs(5, 12, 2, 16, torch.float32, device)
    q, k, v = qkv.unbind(2)
    out = short_attention(q, k, v, scale=0.5)
    wide = (x.double() for x in (q, k, v))
    exact = reference.short_attention(*wide, None, False, 0.5)
    assert_as_accurate(out, reference.short_attention(q, k, v, None, False, 0.5), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_give_the_same_bits(dtype, device):
    """Views of the fused product, copies, transposed copies and copies at odd addresses."""
    qkv, grad, _ = make_inputs(7, 12, 4, 16, dtype, device)
    views = qkv.unbind(2)
    layouts = [
        views,
        [x.contiguous() for x in views],
        [x.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3) for x in views],
        [torch.cat([x, x[..., :1]], -1)[..., :16] for x in views],
        [torch.cat([x[..., :1], x], -1)[..., 1:] for x in views],
    ]
    results = [
        (
            torch.ops.mfd_fast.short_attention(*x, None, False, 0.25),
            *torch.ops.mfd_fast._short_attention_backward(grad, *x, None, False, 0.25, False),
        )
        for x in layouts
    ]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_same_bits_in_every_run_and_with_any_number_of_threads(device):
    qkv, grad, bias = make_inputs(700, 12, 4, 8, torch.float32, device)
    first = with_gradients(call, qkv, bias, False, grad)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        second = with_gradients(call, qkv, bias, False, grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_memory_beside_the_tensors_is_not_read(device):
    qkv, grad, bias = make_inputs(5, 7, 3, 12, torch.float32, device)

    def surrounded(t):
        buffer = torch.full((t.numel() + 512,), float("nan"), device=device)
        return buffer[256:-256].view(t.shape).copy_(t)

    check(surrounded(qkv), surrounded(grad), surrounded(bias), False)


@pytest.mark.parametrize("has_bias", [False, True])
def test_no_rows(has_bias, device):
    qkv, grad, bias = make_inputs(0, 12, 8, 16, torch.float32, device)
    out, grad_qkv, *grad_bias = with_gradients(call, qkv, bias if has_bias else None, True, grad)
    assert out.shape == (0, 12, 128) and grad_qkv.shape == qkv.shape
    args = (*qkv.detach().unbind(2), None, True, 0.25)
    assert kernel.short_attention(*args).shape == out.shape
    assert not kernel.short_attention_backward(grad, *args, True)[1].any()
    assert not any(g.any() for g in grad_bias)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("row_major", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(dtype, row_major, has_bias, device):
    qkv, grad, bias = make_inputs(2, 4, 2, 8, dtype, device)
    bias = bias.requires_grad_() if has_bias else None
    ops = torch.ops.mfd_fast
    leaves = [x.contiguous().requires_grad_() for x in qkv.unbind(2)]
    torch.library.opcheck(ops.short_attention.default, (*leaves, bias, row_major, 0.3))
    torch.library.opcheck(
        ops.short_attention_qkv.default, (qkv.clone().requires_grad_(), bias, row_major, 0.3)
    )
    bias = bias.detach() if has_bias else None
    args = (grad, *qkv.unbind(2), bias, row_major, 0.3, has_bias)
    torch.library.opcheck(ops._short_attention_backward.default, args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: {"q": q[0]}, r"q must be \[N, T, H, D\]; got torch.float32 \[4, 2, 8\]"),
        (lambda q: {"k": q.half()}, r"k must be like q, torch.float32 .*; got torch.float16"),
        (lambda q: {"v": q[:, :3]}, r"v must be like q, .*\[3, 4, 2, 8\].*got .*\[3, 3, 2, 8\]"),
        (lambda q: {"v": q.to("meta")}, r"on cpu; got .* on meta"),
        (lambda q: {"k": q.mT.contiguous().mT}, r"k must have a contiguous last dimension"),
        (lambda q: dict.fromkeys("qkv", q.repeat(1, 5, 1, 1)), r"1 to 16 tokens .*\[3, 20, 2, 8\]"),
        (lambda q: dict.fromkeys("qkv", q.repeat(1, 1, 1, 9)), r"1 to 64 wide; got"),
        (lambda q: {"bias": q[0]}, r"bias must be floating \[2, 4, 4\] on cpu; got .*\[4, 2, 8\]"),
        (
            lambda q: {"merge": "rows"},
            r"merge must be one of \['normal', 'row_major'\]; got 'rows'",
        ),
    ],
)
def test_error_sentences(change, message):
    q = torch.randn(3, 4, 2, 8)
    with pytest.raises(ValueError, match="short_attention: .*" + message):
        short_attention(**({"q": q, "k": q, "v": q} | change(q)))


def test_fused_product_must_have_three_parts():
    with pytest.raises(ValueError, match=r"qkv must be \[N, T, 3, H, D\]; got \[2, 4, 2, 3, 8\]"):
        short_attention_qkv(torch.randn(2, 4, 2, 3, 8))
