"""linear_attention: C++, plain PyTorch and Triton against the float64 reference."""

import pytest
import torch
from torch import Tensor

from mfd_fast.kernels import linear_attention as kernel
from mfd_fast.kernels import linear_attention_backward as backward_kernel
from mfd_fast.ops import linear_attention, reference
from mfd_fast.ops.extension import has_ext
from mfd_fast.ops.linear_attention import _reference_backward
from mfd_fast.testing.numerics import assert_as_accurate

EPS = 1e-15
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (R, T, H, D): SANA's head width over several blocks of tokens with a ragged tail; more heads than
# a group of the C++ kernel; the widest head; the narrowest, less than a tile.
SHAPES = [(2, 130, 3, 32), (1, 65, 10, 16), (1, 70, 1, 64), (2, 7, 9, 4)]


def op(*args):
    return torch.ops.mfd_fast.linear_attention(*args)


def op_backward(*args):
    return torch.ops.mfd_fast._linear_attention_backward(*args)


@pytest.fixture(params=["op", "triton"])
def implementation(request, triton_device):
    """(forward, backward, device): the operator as installed on the CPU, and the launchers."""
    triton = (kernel.linear_attention, backward_kernel.linear_attention_backward, triton_device)
    return {"op": (op, op_backward, "cpu"), "triton": triton}[request.param]


def make_inputs(shape, dtype, device="cpu", scale=1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Three views of one fused product ``[R, T, 3 * H * D]``."""
    rows, tokens, heads, width = shape
    fused = scale * torch.randn(rows, tokens, 3 * heads * width, dtype=torch.float64)
    return fused.to(dtype).to(device).view(rows, tokens, 3, heads, width).unbind(2)


def widened(tensors):
    return [x.double() for x in tensors]


def assert_accurate(run, qkv):
    eager = reference.linear_attention(*qkv, EPS)
    exact = reference.linear_attention(*widened(qkv), EPS)
    ours = run(*qkv, EPS)
    for actual, yardstick, true in zip(ours, eager, exact, strict=True):
        assert_as_accurate(actual, yardstick, true)
    return ours


def gradients(qkv, grad):
    """What autograd makes of the reference."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    return torch.autograd.grad(reference.linear_attention(*leaves, EPS)[0], leaves, grad)


def assert_backward_accurate(run, run_backward, qkv):
    out, state = run(*qkv, EPS)
    grad = torch.randn_like(out)
    eager, exact = gradients(qkv, grad), gradients(widened(qkv), grad.double())
    ours = run_backward(grad, *qkv, state, EPS).unbind(2)
    for actual, yardstick, true in zip(ours, eager, exact, strict=True):
        assert_as_accurate(actual, yardstick, true)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape, dtype, implementation):
    run, run_backward, device = implementation
    qkv = make_inputs(shape, dtype, device)
    assert_accurate(run, qkv)
    assert_backward_accurate(run, run_backward, qkv)


def test_one_token_gets_its_own_value(implementation):
    run, _, device = implementation
    qkv = make_inputs((2, 1, 3, 8), torch.float32, device)  # out = v, if q and k meet at all
    assert_accurate(run, qkv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_ranges_of_tokens(dtype, implementation):
    run, run_backward, device = implementation
    qkv = make_inputs((1, backward_kernel.SPLIT_TOKENS + 45, 2, 8), dtype, device)
    assert_accurate(run, qkv)
    assert_backward_accurate(run, run_backward, qkv)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_large_and_tiny_values(scale, dtype, implementation):
    run, run_backward, device = implementation
    qkv = make_inputs((1, 33, 2, 16), dtype, device, scale)
    assert_accurate(run, qkv)
    assert_backward_accurate(run, run_backward, qkv)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_without_a_query_and_heads_without_a_key_give_zero(dtype, implementation):
    run, run_backward, device = implementation
    q, k, v = make_inputs((2, 20, 3, 16), dtype, device)
    q[:, 5] = -q[:, 5].abs()
    k[:, :, 1] = -k[:, :, 1].abs()
    q[0, 7], k[0, 7] = 0.0, 0.0
    out, _ = assert_accurate(run, (q, k, v))
    heads = out.unflatten(2, (3, 16))
    assert not heads[:, 5].any() and not heads[:, :, 1].any() and not heads[0, 7].any()
    # Head 1 is left out: its outputs are 0 / eps, and their gradients to k and v exceed any range.
    some = [x[:, :, ::2] for x in (q, k, v)]
    assert_backward_accurate(run, run_backward, some)


def test_a_nan_is_not_hidden_by_relu(implementation):
    run, _, device = implementation
    for which in range(3):
        qkv = make_inputs((2, 9, 2, 8), torch.float32, device)
        qkv[which][1, 3, 1, 2] = torch.nan
        heads = run(*qkv, EPS)[0].unflatten(2, (2, 8))
        assert heads[1, 3, 1].isnan().any()
        assert heads[0].isfinite().all() and heads[1, :, 0].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8)])
def test_empty(shape, implementation):
    run, run_backward, device = implementation
    rows, tokens, heads, width = shape
    qkv = make_inputs(shape, torch.float32, device)
    out, state = run(*qkv, EPS)
    assert out.shape == (rows, tokens, heads * width)
    assert torch.equal(state, torch.zeros(rows, heads, width + 1, width, device=device))
    assert run_backward(out, *qkv, state, EPS).shape == (rows, tokens, 3, heads, width)


def test_any_strides_but_the_last(implementation):
    run, run_backward, device = implementation
    shape = (2, 21, 3, 8)
    q = make_inputs((2, 3, 21, 8), torch.float32, device)[0].transpose(1, 2)  # heads first
    k = make_inputs(shape, torch.float32, device)[1].contiguous()
    v = make_inputs((2, 21, 5, 16), torch.float32, device)[2][:, :, 1:4, 3:11]  # misaligned
    views = assert_accurate(run, (q, k, v))
    copies = run(*(x.contiguous() for x in (q, k, v)), EPS)
    assert all(torch.equal(a, b) for a, b in zip(views, copies, strict=True))
    assert_backward_accurate(run, run_backward, (q, k, v))


def test_same_bits_every_time_and_beside_other_rows(implementation):
    run, run_backward, device = implementation
    qkv = make_inputs((3, 90, 2, 16), torch.float32, device)
    out, state = run(*qkv, EPS)
    grad = torch.randn_like(out)
    grads = run_backward(grad, *qkv, state, EPS)
    assert torch.equal(run(*qkv, EPS)[0], out)
    assert torch.equal(run_backward(grad, *qkv, state, EPS), grads)
    one = [x[1:2] for x in qkv]
    assert torch.equal(run(*one, EPS)[0], out[1:2])
    assert torch.equal(run_backward(grad[1:2], *one, state[1:2], EPS), grads[1:2])


@pytest.mark.skipif(not has_ext(), reason="needs the compiled operators (mfd_fast._C)")
def test_same_bits_on_any_number_of_threads():
    qkv = make_inputs((2, 100, 11, 32), torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, state = op(*qkv, EPS)
            results.append((out, op_backward(out, *qkv, state, EPS)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_formula_without_the_extension(dtype):
    assert_backward_accurate(
        reference.linear_attention, _reference_backward, make_inputs((2, 40, 3, 16), dtype)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_the_attention_of_diffusers(dtype, device):
    """The processor's own sequence of operations, as the yardstick and in float64."""
    shape = (2, 50, 3, 32)
    qkv = make_inputs(shape, dtype, device)

    def processor(q, k, v):
        q, k, v = (x.flatten(2).transpose(1, 2).unflatten(1, (shape[2], -1)) for x in (q, k, v))
        wide = torch.promote_types(dtype, torch.float32) if q.dtype == dtype else q.dtype
        q, k, v = q.relu().to(wide), k.relu().transpose(2, 3).to(wide), v.to(wide)
        v = torch.nn.functional.pad(v, (0, 0, 0, 1), value=1.0)
        out = torch.matmul(torch.matmul(v, k), q)
        out = out[:, :, :-1] / (out[:, :, -1:] + EPS)
        return out.flatten(1, 2).transpose(1, 2)

    assert_as_accurate(linear_attention(*qkv), processor(*qkv).to(dtype), processor(*widened(qkv)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_the_public_function(dtype, device):
    qkv = [x.requires_grad_() for x in make_inputs((2, 33, 3, 16), dtype, device)]
    out = linear_attention(*qkv)
    grad = torch.randn_like(out)
    eager, exact = gradients(qkv, grad), gradients(widened(qkv), grad.double())
    for ours, *others in zip(torch.autograd.grad(out, qkv, grad), eager, exact, strict=True):
        assert_as_accurate(ours, *others)


def test_gradcheck():
    qkv = [x.requires_grad_() for x in make_inputs((2, 5, 2, 4), torch.float64)]
    assert torch.autograd.gradcheck(linear_attention, qkv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, device):
    qkv = [x.requires_grad_() for x in make_inputs((2, 9, 2, 8), dtype, device)]
    torch.library.opcheck(torch.ops.mfd_fast.linear_attention.default, (*qkv, EPS))
    out, state = op(*qkv, EPS)
    args = [x.detach() for x in (torch.ones_like(out), *qkv, state)]
    torch.library.opcheck(torch.ops.mfd_fast._linear_attention_backward.default, (*args, EPS))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_sana_shapes(dtype):
    for tokens in (256, 1024, 4096):
        qkv = make_inputs((3, tokens, 70, 32), dtype, "cuda")
        assert_accurate(op, qkv)
        assert_backward_accurate(op, op_backward, qkv)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 16)}, r"q must be \[R, T, H, D\] .*got \[2, 5, 16\]"),
        ({"q": torch.zeros(2, 5, 3, 12)}, r"q .* D one of \[4, 8, .*got \[2, 5, 3, 12\]"),
        ({"q": torch.zeros(2, 5, 3, 8).int()}, r"q must be one of .*got torch.int32"),
        (
            {"k": torch.zeros(2, 6, 3, 8)},
            r"k must be like q, .*\[2, 5, 3, 8\] .*got .*\[2, 6, 3, 8\]",
        ),
        ({"v": torch.zeros(2, 5, 3, 8).half()}, r"v must be like q.*got torch.float16"),
        ({"v": torch.zeros(2, 5, 3, 8, device="meta")}, r"v must be .* on cpu; got .* on meta"),
        ({"k": torch.zeros(2, 5, 3, 16)[..., ::2]}, r"k must have a contiguous last .*strides"),
    ],
)
def test_errors_name_argument_expected_and_got(change, message):
    args = {name: torch.zeros(2, 5, 3, 8) for name in "qkv"} | change
    with pytest.raises(ValueError, match="^linear_attention: " + message):
        linear_attention(**args)
