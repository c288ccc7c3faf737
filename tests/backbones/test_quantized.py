"""A frozen base in fewer bits: its numbers, and updates on it are those on the dequantised base."""

import copy
import sys

import pytest
import torch
from frozen_bases import as_plain, quantised, updates

from mfd_fast.backbones.lora import Target
from mfd_fast.backbones.quantized import BLOCK, FORMATS, FrozenLinear, check_format
from mfd_fast.testing.numerics import assert_as_accurate

pytest.importorskip("bitsandbytes")
BASES = [base for base in FORMATS if base != "bf16"]
# The codes of NF4 as the paper prints them (Dettmers et al. 2023, appendix E).
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


def linear(rows, columns, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return torch.nn.Linear(columns, rows, dtype=dtype)


def frozen(layer, base):
    made = FrozenLinear(layer, base)
    made.store(layer.weight)
    return made


@pytest.mark.parametrize("base", ["int8", "float8"])
def test_codes_by_rows_are_torchaos(base):
    torchao = pytest.importorskip("torchao.quantization")
    config = {"int8": "Int8WeightOnlyConfig", "float8": "Float8WeightOnlyConfig"}[base]
    layer = linear(96, 80, torch.float32)  # from bf16 torchao rounds the scales to bf16
    ours = frozen(layer, base).weight
    torchao.quantize_(layer, getattr(torchao, config)())
    assert torch.equal(ours, layer.weight.dequantize())


@pytest.mark.parametrize("shape", [(96, 80), (7, 9), (4, 64)])
def test_nf4_is_the_papers_code_of_every_block_at_any_width(shape):
    layer = linear(*shape, torch.float32)
    ours, flat = frozen(layer, "nf4").weight.flatten(), layer.weight.detach().flatten()
    for begin in range(0, len(flat), BLOCK):
        block = flat[begin : begin + BLOCK]
        levels = NF4 * block.abs().max()
        nearest = (block[:, None] - levels).abs().min(1).values
        mine = ours[begin : begin + BLOCK]
        assert float((mine[:, None] - levels).abs().min(1).values.max()) < 1e-6  # a level
        assert torch.allclose((block - mine).abs(), nearest, atol=1e-6)  # and the nearest


@pytest.mark.parametrize(("base", "size"), [("nf4", 0.5625), ("int8", 1 + 4 / 512)])
def test_bytes_of_a_number(base, size):
    assert frozen(linear(512, 512), base).stored.nbytes == size * 512 * 512


@pytest.mark.parametrize("name", ["sd3", "flux1-dev"])
@pytest.mark.parametrize("base", BASES)
def test_updates_are_those_on_the_dequantised_base(name, base):
    network = quantised(name, base)
    plain = as_plain(network)
    before = {key: x.clone() for key, x in network.state_dict().items()}
    ours, backbone = updates(name, network)
    eager, _ = updates(name, plain)
    exact, _ = updates(name, copy.deepcopy(plain).float())  # the solver's states are float32
    assert ours.keys() == {"aux", "student"}
    for role, grad in ours.items():
        assert float(grad.abs().max()) > 0
        assert_as_accurate(grad, eager[role], exact[role].double())
    state = network.state_dict()
    assert any(key.endswith("stored") for key in before)
    assert all(torch.equal(before[key], state[key]) for key in before)
    owned = {id(p) for role in ("aux", "student") for p in backbone.parameters_of(role)}
    assert all(p.grad is None for p in backbone.parameters() if id(p) not in owned)


@pytest.mark.parametrize("activation", ["cheap", "block"])
def test_recomputed_blocks_give_the_same_gradients(activation):
    network = quantised("sd3", "int8", torch.float32)
    ours, _ = updates("sd3", network, activation=activation)
    plain, _ = updates("sd3", quantised("sd3", "int8", torch.float32))
    assert all(torch.equal(ours[role], plain[role]) for role in plain)


def test_the_weight_is_not_kept_for_the_backward():
    """Memory of a forward with gradient: its inputs and outputs, no dequantised copy."""
    layer, kept = frozen(linear(64, 64), "int8"), []
    x = torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x).sum().backward()
    assert x.grad is not None and not any(t.shape == (64, 64) for t in kept)


def test_a_lora_is_kept_beside_the_codes():
    layer = frozen(linear(32, 48), "nf4")
    before, a, b = layer.weight, torch.randn(3, 48), torch.randn(32, 3)
    layer.add_lora(a, b)
    assert torch.equal(layer.weight, torch.addmm(before, b.bfloat16(), a.bfloat16()))
    with pytest.raises(ValueError, match="quantised"):
        Target.of("x", layer).own_weight()


def test_a_missing_library_is_named_with_what_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    check_format("int8")
    with pytest.raises(ImportError, match="pip install bitsandbytes, or take --base int8"):
        check_format("nf4")
