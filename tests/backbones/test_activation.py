"""Activation policies: equal gradients, fewer bytes held, only in forwards with gradient."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mfd_fast import AUX, STUDENT, AdapterBank, SharedBackbone
from mfd_fast.backbones import activation
from mfd_fast.backbones.activation import POLICIES, apply_activation_policy
from mfd_fast.cost.trace import OUTSIDE, Trace
from mfd_fast.testing.counting import Alive, Count, Saved
from mfd_fast.testing.numerics import assert_as_accurate

WIDTH, TOKENS, HEADS = 192, 32, 4  # wider than MIN_KEPT_LENGTH: its projections are kept
PIECE = 8


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(activation, "CHUNK", PIECE)


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.widen, self.narrow = nn.Linear(WIDTH, 6 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x):
        hidden, linear = self.widen(x).chunk(2, -1)
        return self.narrow(F.silu(hidden) * linear)


class Block(nn.Module):
    """A transformer block with time modulation, normalised queries and keys, and a gated MLP."""

    def __init__(self):
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(3, WIDTH) * 0.1)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.mlp = FeedForward()

    def forward(self, x, time):
        shift, scale, gate = (row + time[:, None, None] for row in self.modulation)
        h = F.layer_norm(x, (WIDTH,)) * (1 + scale) + shift
        q, k, v = (layer(h).unflatten(-1, (HEADS, -1)).transpose(1, 2)
                   for layer in (self.to_q, self.to_k, self.to_v))  # fmt: skip
        q, k = (F.rms_norm(z, z.shape[-1:]) for z in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate * self.to_out(mixed)
        return x + gate * self.mlp(F.layer_norm(x, (WIDTH,)) * (1 + scale) + shift)


class Transformer(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x, t, cond):
        for block in self.blocks:
            x = block(x, t.to(x.dtype))
        return x


ALL = ("to_q", "to_k", "to_v", "widen", "narrow")


def make_backbone(policy, dtype=torch.float32, blocks=r"blocks\.\d", targets=ALL[:3]):
    torch.manual_seed(0)
    network = Transformer().to(dtype)
    bank = AdapterBank(network, rank=8, alpha=8.0, targets=targets)
    for name in bank.names:
        with torch.no_grad():
            bank.parameters_of(name)[0].copy_(torch.randn(bank.parameters_of(name)[0].shape) / 20)
        bank.refresh(name)
    return SharedBackbone(
        network, adapters=bank, sample_shape=(TOKENS, WIDTH), activation=policy, blocks=blocks
    )


def evaluate(backbone, lanes=(STUDENT,)):
    torch.manual_seed(1)
    x = torch.randn(2, len(lanes), TOKENS, WIDTH)
    prepared = backbone.prepare(torch.empty(2, 0))
    return backbone.forward(x, torch.tensor([0.3, 0.8]), prepared, lanes)


def gradient(policy, dtype=torch.float32, lanes=(STUDENT,), targets=ALL[:3]):
    backbone = make_backbone(policy, dtype, targets=targets)
    evaluate(backbone, lanes).square().mean().backward()
    return [backbone.parameters_of(role)[0].grad for role in {lane.role for lane in lanes}]


@pytest.mark.parametrize("lanes", [(STUDENT,), (AUX, AUX)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", POLICIES[1:])
def test_gradients_are_those_of_keeping_everything(policy, dtype, lanes):
    """Also for the adapters, whose lanes are over when the backward recomputes."""
    given = lanes, ALL if policy == "chunk" else ALL[:3]
    eager, exact = gradient("none", dtype, *given), gradient("none", torch.float64, *given)
    for actual, theirs, truth in zip(gradient(policy, dtype, *given), eager, exact, strict=True):
        assert actual.any()
        assert_as_accurate(actual, theirs, truth)


def held_bytes(policy):
    """Bytes that the graph of one student evaluation holds, and bytes autograd packed."""
    backbone = make_backbone(policy)
    with Saved() as saved, Alive() as alive:
        v = evaluate(backbone)
    assert v.requires_grad
    return alive.bytes, saved.bytes


def test_none_holds_more_than_cheap_and_cheap_more_than_block():
    """2.70, 1.99 and 0.20 MB in float32 (SANA 1.6B at 1024px, bf16: 4.03, 1.45 and 0.10 GB)."""
    (none, none_saved), (cheap, _), (block, block_saved), chunk = map(held_bytes, POLICIES)
    assert block < cheap < none
    assert chunk == (block, block_saved)
    assert block_saved < none_saved
    row = 2 * TOKENS * 4  # bytes of one feature of every token
    assert block == (3 + 1) * row * WIDTH  # the input of every block, and the result
    # Per block: q, k, v, mixed, to_out, narrow and widen, three products A x, the softmax's sums.
    assert cheap <= block + 3 * row * (12 * WIDTH + 3 * 8 + HEADS)


def test_products_with_few_terms_are_computed_again():
    """The second factor of an adapter is; the projections are not."""
    backbone = make_backbone("cheap")
    v = evaluate(backbone)
    with Count() as cheap:
        v.sum().backward()
    backbone = make_backbone("none")
    v = evaluate(backbone)
    with Count() as none:
        v.sum().backward()

    def products(count):
        return sum(count.ops.get(name, 0) for name in ("mm", "addmm", "bmm"))

    # Three adapted projections per block, each with one product B (A x).
    assert products(cheap) == products(none) + 3 * len(backbone.network.blocks)
    assert cheap.ops["gelu" if "gelu" in cheap.ops else "silu"] == len(backbone.network.blocks)


def peak_bytes(policy, *, with_grad):
    """The most bytes alive in an evaluation, and its backward, beside what was there."""
    backbone = make_backbone(policy)
    with Trace(counts_work=False) as trace, torch.set_grad_enabled(with_grad):
        v = evaluate(backbone).sum()
        if with_grad:
            v.backward()
    return trace.memory.peak[OUTSIDE]


def test_pieces_take_the_hidden_layer_off_the_peak(monkeypatch):
    """1.04 MB with a block's whole MLP, 0.63 MB by pieces of a quarter; with a backward 1.48 and
    0.94 MB.
    """
    row = 2 * TOKENS * 4
    for with_grad in (False, True):
        whole, pieces = (peak_bytes(x, with_grad=with_grad) for x in ("block", "chunk"))
        # Of the hidden layer a quarter at a time is there, and the pieces beside their sum.
        assert whole - pieces > (3 / 4 * 6 - 1) * row * WIDTH
        monkeypatch.setattr(activation, "CHUNK", TOKENS)
        assert peak_bytes("chunk", with_grad=with_grad) == whole
        monkeypatch.setattr(activation, "CHUNK", PIECE)


def test_what_is_an_mlp():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q, self.to_out = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Dropout())

    def block(*parts):
        return nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleList(parts)])})

    mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)))
    made = apply_activation_policy(block(Attention(), mlp), "chunk", r"blocks\.\d")
    assert list(made.blocks) == ["blocks.0", "blocks.0.1"]
    softmax = nn.Sequential(nn.Linear(4, 4), nn.Softmax(1), nn.Linear(4, 4))
    conv = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 3), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"'chunk' found no MLP of linear layers in blocks\.0;"):
        apply_activation_policy(block(Attention(), softmax, conv), "chunk", r"blocks\.\d")
    with pytest.raises(ValueError, match="'chunk' and compiled blocks exclude each other"):
        apply_activation_policy(block(mlp), "chunk", r"blocks\.\d", compiled=dict)


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_changes_without_gradient_and_after_remove(policy):
    plain, treated = make_backbone("none"), make_backbone(policy)
    with torch.no_grad():
        with Count() as expected:
            v = evaluate(plain)
        with Count() as count:
            same = evaluate(treated)
    assert torch.equal(v, same) if policy != "chunk" else torch.allclose(v, same, atol=1e-5)
    assert policy == "chunk" or count.ops == expected.ops
    treated.activation.remove()
    treated.activation.remove()
    assert all("forward" not in vars(block) for block in treated.network.blocks)
    with Saved() as saved:
        evaluate(treated)
    assert saved.bytes == held_bytes("none")[1]


@pytest.mark.parametrize("policy", ["cheap", "block"])
def test_a_network_without_adapters_and_a_copy_of_it(policy):
    network, asked = Transformer(), []

    def recompute_context():
        asked.append(1)
        return nullcontext()

    apply_activation_policy(network, policy, ("0", "2"), recompute_context=recompute_context)
    twin = copy.deepcopy(network)
    for parameter in twin.parameters():
        parameter.data.zero_()
    x, t = torch.randn(2, TOKENS, WIDTH), torch.rand(2)
    network(x, t, None).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert len(asked) == 2
    with torch.no_grad():
        network(x, t, None)
    assert len(asked) == 2  # nothing is set up where nothing is kept
    assert torch.equal(twin(x, t, None), x)  # the copy runs its own blocks, which do nothing


def applied_twice():
    network = Transformer()
    apply_activation_policy(network, "block", ("0", "1"))
    apply_activation_policy(network, "cheap", ("1", "2"))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda: apply_activation_policy(Transformer(), "all", ()),
            r"one of \['none', 'cheap', 'bl",
        ),
        (
            lambda: apply_activation_policy(Transformer(), "block", ("layers",)),
            r"'block': blocks \('layers',\) match nothing; the network's lists .* \['blocks'\]",
        ),
        (
            lambda: apply_activation_policy(Transformer(), "block", ("blocks", "1")),
            "block blocks.1 lies inside block blocks; name only one",
        ),
        (applied_twice, "the forward of block blocks.1 is replaced already; remove that first"),
    ],
)
def test_errors_say_how_to_mend_them(run, message):
    with pytest.raises(ValueError, match=message):
        run()
