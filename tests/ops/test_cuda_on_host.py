"""The CUDA C++ of csrc/cuda, run on the host by cuda_host/emulator.h, against float64.

No GPU is needed, only g++ and the headers of CUDA.  Every case runs with the threads of a block in
both orders.  At the end the same checks have to fail for bugs planted in the kernels.
"""

from functools import cache, partial

import cuda_host_build
import pytest
import test_glu_depthwise as glu_depthwise_tests
import test_interpolate as interpolate_tests
import test_mfd_loss as mfd_loss_tests
import test_ode_step as ode_step_tests
import test_short_attention as short_attention_tests
import torch
from cuda_host_calls import HostKernels

from mfd_fast.ops import reference
from mfd_fast.ops.glu_depthwise import _reference_backward as glu_backward
from mfd_fast.ops.short_attention import _rounded_backward as attention_backward
from mfd_fast.testing.numerics import assert_as_accurate

pytestmark = pytest.mark.skipif(bool(cuda_host_build.missing()), reason=cuda_host_build.missing())

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (rows, height, width, channels of a half): whole vectors, channels that are not, one pixel, images
# wider than a block with and without whole vectors.
GLU_SHAPES = [(2, 3, 6, 32), (1, 4, 7, 53), (1, 1, 1, 3), (1, 3, 35, 8), (1, 19, 33, 3)]
# (rows, tokens, heads, width): whole blocks and a ragged one, the most tokens, a width and a number
# of tokens that divide nothing, more heads than a block holds, more blocks than bias_sum_kernel has
# walkers, one of each.
ATTENTION_SHAPES = [
    (9, 12, 8, 16), (2, 16, 2, 64), (5, 7, 3, 5), (2, 3, 40, 16), (40, 2, 32, 4), (1, 1, 1, 1),
]  # fmt: skip


@cache
def built(bug=None):
    return cuda_host_build.build(bug)


@pytest.fixture(params=[False, True], ids=["ascending", "descending"])
def descending(request) -> bool:
    """The order in which the threads of a block run."""
    return request.param


def wide(args):
    return tuple(a.double() if isinstance(a, torch.Tensor) else a for a in args)


def assert_all_accurate(ours, eager, exact):
    for one, two, three in zip(ours, eager, exact, strict=True):
        assert_as_accurate(one, two, three)


def check_glu(host, shape, dtype, has_in_bias):
    x, weight, bias, in_bias, grad = glu_depthwise_tests.make_inputs(*shape, dtype, "cpu")
    in_bias = in_bias if has_in_bias else None
    size = shape[1:3]
    args = (x, weight, bias, in_bias, *size)
    eager, exact = reference.glu_depthwise(*args), reference.glu_depthwise(*wide(args))
    assert_as_accurate(host.glu_depthwise(x, weight, bias, *size, in_bias), eager, exact)

    args = (grad, *args, True)
    ours = host.glu_depthwise_backward(*args)
    assert_all_accurate(ours, glu_backward(*args), glu_backward(*wide(args)))
    alone, _ = host.glu_depthwise_backward(*args[:-1], False)
    assert torch.equal(alone, ours[0]), "grad_x depends on whether grad_conv is wanted"


def check_attention(host, shape, dtype, has_bias, row_major):
    qkv, grad, bias = short_attention_tests.make_inputs(*shape, dtype, "cpu")
    bias = bias if has_bias else None
    scale = shape[3] ** -0.5
    args = (*qkv.unbind(2), bias, row_major, scale)
    eager, exact = reference.short_attention(*args), reference.short_attention(*wide(args))
    assert_as_accurate(host.short_attention(qkv, bias, row_major, scale), eager, exact)

    args = (grad, *args, has_bias)
    ours = host.short_attention_backward(grad, qkv, bias, row_major, scale)
    count = 2 if has_bias else 1
    eager, exact = attention_backward(*args), attention_backward(*wide(args))
    assert_all_accurate(ours[:count], eager[:count], exact[:count])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GLU_SHAPES)
def test_glu_depthwise(shape, dtype, descending):
    # One multiprocessor leaves an image whole, many cut it into ranges of rows.
    for multiprocessors, has_in_bias in ((1, True), (100, False)):
        host = HostKernels(built(), multiprocessors=multiprocessors, descending=descending)
        check_glu(host, shape, dtype, has_in_bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
def test_short_attention(shape, dtype, descending):
    host = HostKernels(built(), descending=descending)
    for has_bias, row_major in ((True, False), (False, True)):
        check_attention(host, shape, dtype, has_bias, row_major)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", interpolate_tests.SHAPES)
def test_interpolate(shape, dtype, descending):
    host = HostKernels(built(), descending=descending)
    interpolate_tests.assert_accurate(host.interpolate, interpolate_tests.make_inputs(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lanes", [(1, 1), (2, 3)])
@pytest.mark.parametrize("n", [(3, 11, 13), (2, 32, 32), (1,)])
def test_ode_step(n, lanes, dtype, descending):
    host = HostKernels(built(), descending=descending)
    inputs = ode_step_tests.make_inputs(lanes, n, dtype)
    ode_step_tests.assert_accurate(partial(host.ode_step_, ode_step_tests.GUIDANCE), *inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("shape", mfd_loss_tests.SHAPES)
def test_mfd_loss(shape, has_weight, dtype, descending):
    host = HostKernels(built(), descending=descending)
    args = mfd_loss_tests.make_inputs(shape, dtype, has_weight=has_weight)
    mfd_loss_tests.assert_accurate(host.mfd_loss, args)


# What is planted (file, its text, the bug) and what the checks above say to it, in either order.
WRONG = r"relative error|non-finite"
BUGS = {
    "a missing barrier": (
        (
            "glu_depthwise.cu",
            "      __pipeline_wait_prior(1);\n      __syncthreads();\n",
            "      __pipeline_wait_prior(1);\n",
        ),
        WRONG,
    ),
    "a copy not waited for": (
        ("glu_depthwise.cu", "__pipeline_wait_prior(1);", "__pipeline_wait_prior(2);"),
        WRONG,
    ),
    "a barrier that some never reach": (
        (
            "short_attention.cu",
            "  __pipeline_wait_prior(0);\n  __syncthreads();",
            "  __pipeline_wait_prior(0);\n  if (threadIdx.x != 0) __syncthreads();",
        ),
        "a barrier that not all threads",
    ),
    "a write past the last row": (
        ("interpolate.cu", "i < p.n; ++i", "i <= p.n; ++i"),
        "a write past tensor",
    ),
    "a shuffle too short": (("mfd_loss.cu", "int offset = 16;", "int offset = 8;"), WRONG),
}


def check_unit(file, host):
    """The check of the operator that the file belongs to."""
    if file == "glu_depthwise.cu":
        check_glu(host, (1, 4, 7, 53), torch.bfloat16, True)
        check_glu(host, (1, 4, 7, 16), torch.float32, True)
    elif file == "short_attention.cu":
        check_attention(host, (9, 12, 8, 16), torch.bfloat16, True, False)
    elif file == "interpolate.cu":
        args = interpolate_tests.make_inputs((3, 4099), torch.float32)
        interpolate_tests.assert_accurate(host.interpolate, args)
    else:
        args = mfd_loss_tests.make_inputs((3, 9001), torch.float32)
        mfd_loss_tests.assert_accurate(host.mfd_loss, args)


@pytest.mark.parametrize("file", sorted({bug[0] for bug, _message in BUGS.values()}))
def test_unchanged_kernel_passes(file, descending):
    check_unit(file, HostKernels(built(), descending=descending))


@pytest.mark.parametrize("name", BUGS)
def test_bug_is_caught(name, descending):
    bug, message = BUGS[name]
    host = HostKernels(built(bug), descending=descending)
    with pytest.raises(AssertionError, match=message):
        check_unit(bug[0], host)
