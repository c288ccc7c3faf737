"""FP8 for lanes without gradient: the product, what it touches, its error, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from mfd_fast import DistillConfig, Distiller, SharedBackbone
from mfd_fast.backbones import float8
from mfd_fast.backbones.adapters import AdapterBank
from mfd_fast.backbones.float8 import (
    Float8Products,
    Rows,
    check_device,
    product,
    reference_product,
    use_float8,
)
from mfd_fast.backbones.lanes import TEACHER, CopiedBackbone
from mfd_fast.cost.trace import Trace
from mfd_fast.ops import quantize_rows
from mfd_fast.run.float8_error import float8_summary, velocity_error
from mfd_fast.testing.numerics import assert_as_accurate

FACTOR = 2.0**-4 + 2.0**-20  # relative error of a factor: round to nearest, and float32 on the way
SMALL = {"min_side": 1, "min_outputs": 16}  # every product of a small network pays


def rows_of(*shape, device="cpu", dtype=torch.float32):
    x = torch.randn(shape, device=device).to(dtype)
    return x, Rows(*quantize_rows(x))


def exact_product(x, weight, bias):
    """Of the numbers that e4m3 and the scales stand for, in float64."""
    x, weight = (part.values.double() * part.scale.double() for part in (x, weight))
    return F.linear(x, weight, None if bias is None else bias.double())


def eager_product(x, weight, bias, dtype):
    """Of the same numbers, what torch gives in ``dtype`` alone."""
    x, weight = ((part.values.float() * part.scale).to(dtype) for part in (x, weight))
    return F.linear(x, weight, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 16, 16), (33, 64, 48), (300, 2240, 80)])
def test_the_product_is_that_of_the_rounded_factors(shape, has_bias, dtype):
    rows, terms, outputs = shape
    x, weight = rows_of(rows, terms)[1], rows_of(outputs, terms)[1]
    bias = torch.randn(outputs).to(dtype) if has_bias else None
    actual = product(x, weight, bias, dtype)
    assert_as_accurate(
        actual, eager_product(x, weight, bias, dtype), exact_product(x, weight, bias)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(1, 16, 16), (33, 64, 48), (3072, 2240, 6720), (3072, 5600, 2240)]
)
def test_the_device_multiplies_like_the_reference(shape, has_bias):
    rows, terms, outputs = shape
    if torch.cuda.get_device_capability() < float8.MIN_CAPABILITY:
        pytest.skip("this GPU is older than compute capability 8.9: it has no e4m3 products")
    x, weight = (rows_of(n, terms, device="cuda", dtype=torch.bfloat16)[1] for n in (rows, outputs))
    bias = torch.randn(outputs, device="cuda").bfloat16() if has_bias else None
    exact = exact_product(x, weight, bias)
    expected = reference_product(x, weight, bias, torch.bfloat16)
    assert_as_accurate(product(x, weight, bias, torch.bfloat16), expected, exact)


@pytest.mark.skipif(
    torch.__version__ < (2, 13),
    reason="only tried on torch 2.13, which is pinned; older ones may have none by rows on a CPU",
)
def test_the_cpus_own_float8_product_gives_the_same_numbers():
    """The call that a GPU gets, where torch has it for the CPU."""
    (x, weight), bias = (rows_of(n, 64)[1] for n in (33, 48)), torch.randn(48)
    theirs = torch._scaled_mm(
        x.values, weight.values.t(), scale_a=x.scale, scale_b=weight.scale.t(),
        bias=bias, out_dtype=torch.float32,
    )  # fmt: skip
    exact = exact_product(x, weight, bias)
    assert_as_accurate(theirs, reference_product(x, weight, bias, torch.float32), exact)


def test_the_error_of_a_product_is_that_of_two_roundings():
    """|x8 w8 - x w| <= (2 u + u^2) |x| |w|, and what falls below the smallest normal numbers."""
    (x, x8), (weight, weight8) = rows_of(50, 256), rows_of(64, 256)
    error = (exact_product(x8, weight8, None) - F.linear(x.double(), weight.double())).abs()
    assert (error <= product_bound(x, weight)).all()


def product_bound(x, weight):
    """Elementwise bound of ``|x8 w8^T - x w^T|`` in float64."""
    sizes = []
    for factor in (x, weight):
        factor = factor.double().abs()
        smallest = factor.amax(1, keepdim=True) / 448 * 2.0**-10
        sizes.append((factor, FACTOR * factor + smallest))
    (x, dx), (weight, dw) = sizes
    return dx @ weight.t() + x @ dw.t() + dx @ dw.t()


class TwoLinears(torch.nn.Module):
    """``v = W x``, and a layer of the time that has a row per sample."""

    def __init__(self, dim=32):
        super().__init__()
        self.to_q = torch.nn.Linear(dim, dim, bias=False)
        self.time = torch.nn.Linear(16, dim)

    def forward(self, x, t, cond):
        self.of_time = self.time(t[:, None].to(x.dtype).expand(-1, 16))
        return self.to_q(x)


def linear_distiller(**options):
    network = TwoLinears()
    backbone = SharedBackbone(
        network, adapters=AdapterBank(network, targets=("to_q",)), sample_shape=(8, 32)
    )
    use_float8(backbone, **SMALL | options)
    return Distiller(backbone, DistillConfig(guidance=1.0, step_size=0.1))


def test_the_error_of_an_integrated_linear_velocity_stays_within_its_bound():
    """Every step moves by dt (W x + e), |e| bounded; the errors of the steps before are carried."""
    distiller, cond = linear_distiller(), torch.zeros(1, 1)
    errors = velocity_error(distiller, cond)
    weight = distiller.backbone.network.to_q.weight.detach()
    generator = torch.Generator().manual_seed(distiller.config.seed)
    start = torch.randn(1, 8, 32, generator=generator)[0]
    x, x8, carried, dt = start, start, torch.zeros(8, 32, dtype=torch.float64), 0.1
    carry = (torch.eye(32) - dt * weight).double().abs()
    rows = Rows(*quantize_rows(weight))
    for _ in range(10):
        carried = carried @ carry.t() + dt * product_bound(x8, weight)
        x = x - dt * F.linear(x, weight)
        x8 = x8 - dt * product(Rows(*quantize_rows(x8)), rows, None, torch.float32)
    bound = (carried.norm() / (start - x).norm()).item()
    for role in ("teacher", "auxiliary"):
        assert 0 < errors[role] < bound
    assert errors["teacher"] == pytest.approx(((x8 - x).norm() / (start - x).norm()).item())


def test_the_sentence_of_a_start_costs_two_evaluations():
    distiller, calls = linear_distiller(), []
    distiller.backbone.network.register_forward_hook(lambda *_: calls.append(1))
    assert "of the velocity at the noise, the first step: teacher" in float8_summary(
        distiller, torch.zeros(1, 1)
    )
    assert len(calls) == 2


def test_layers_with_a_row_per_sample_and_narrow_ones_are_left_alone():
    """Samples of 8 rows for one layer, a row a sample for the other; 32 terms and outputs each."""
    for options, samples, copied in (
        ({"min_side": 16}, 2, {"to_q"}),
        ({"min_side": 17}, 2, set()),
        ({"min_side": 32}, 5, {"to_q"}),
        ({"min_side": 33}, 5, set()),
        ({"min_side": 1}, 2, {"to_q"}),
        ({"min_outputs": 33}, 2, set()),
    ):
        backbone = linear_distiller(**options).backbone
        prepared, x = backbone.prepare(torch.zeros(samples, 1)), torch.randn(samples, 1, 8, 32)
        with torch.no_grad():
            backbone.forward(x, torch.ones(samples), prepared, (TEACHER,))
        keys = {key[0] for key in backbone.float8.copies}
        network = backbone.network
        assert keys == {getattr(network, name).weight.untyped_storage()._cdata for name in copied}


def test_what_is_no_multiple_of_16_or_not_frozen_is_left_alone():
    network = torch.nn.Linear(24, 32, bias=False).requires_grad_(False)
    strange = torch.randn(32, 32)
    products = Float8Products(network, **SMALL)
    for weight in (network.weight, strange):  # both large enough
        x = torch.randn(1, 4, weight.shape[1])
        with torch.no_grad(), products:
            y = F.linear(x, weight)
        assert torch.equal(y, F.linear(x, weight))
    assert not products.copies


def test_calls_with_gradient_are_left_alone():
    network = torch.nn.Linear(16, 16).requires_grad_(False)
    x = torch.randn(1, 4, 16)
    with Float8Products(network, **SMALL) as products:
        assert torch.equal(network(x), network(x.clone().requires_grad_())) and not products.copies
        with torch.no_grad():
            network(x)
        assert products.copies


def test_a_plan_without_storage_counts_products_of_float8():
    """What ``mfd_fast.cost`` traces: the call of a GPU, charged in its dtype."""
    with torch.device("meta"):
        network = torch.nn.Linear(64, 96).bfloat16()
        x = torch.empty(4, 32, 64, dtype=torch.bfloat16)
    products = Float8Products(network.requires_grad_(False), **SMALL)
    with torch.no_grad(), products:
        network(x)
        with Trace() as trace:
            assert network(x).shape == (4, 32, 96)
    calls = {op.name: op for op in trace.work[""].calls}
    assert calls.keys() == {"quantize_rows", "_scaled_mm"}
    product = calls["_scaled_mm"]
    assert (product.family, product.dtype) == ("product", torch.float8_e4m3fn)
    assert product.flops == 2 * 4 * 32 * 64 * 96
    scales = 4 * (4 * 32 + 96)
    assert product.bytes == 128 * 64 + 64 * 96 + scales + 2 * 96 + 2 * 128 * 96
    assert calls["quantize_rows"].bytes == 3 * 128 * 64 + 4 * 128


def test_full_copies_are_refused():
    copies = CopiedBackbone(torch.nn.Linear(16, 16), sample_shape=(16,))
    with pytest.raises(ValueError, match=r"SharedBackbone.*got CopiedBackbone.*no-float8"):
        use_float8(copies)


@pytest.mark.parametrize(
    ("capability", "dtype", "message"),
    [
        (
            (8, 0),
            torch.bfloat16,
            r"8.9 or newer; A card has 8.0: .*--train.no-float8",
        ),
        (
            (9, 0),
            torch.float32,
            r"bfloat16 network on a GPU; got torch.float32: cast",
        ),
        ((9, 0), torch.float64, r"at most 32 bits; got torch.float64: cast, or"),
    ],
)
def test_devices_without_such_products_are_refused(capability, dtype, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    with pytest.raises(ValueError, match=message):
        check_device(torch.device("cuda"), dtype)
    for able in ((8, 9), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, able=able: able)
        check_device(torch.device("cuda"), torch.bfloat16)


def test_an_error_without_float8_is_refused():
    distiller = linear_distiller(min_outputs=33)
    with pytest.raises(ValueError, match=r"1 rows and terms and 33 outputs; .*no-float8"):
        velocity_error(distiller, torch.zeros(1, 1))
    distiller.backbone.float8 = None
    with pytest.raises(ValueError, match=r"call use_float8\(backbone\) first"):
        velocity_error(distiller, torch.zeros(1, 1))
