"""SanaNetwork equals diffusers' SanaTransformer2DModel; its packed weights; what it refuses."""

import copy

import pytest
import torch
from sana_models import (
    DTYPES,
    SMALL,
    TARGETS,
    VARIANTS,
    call_theirs,
    inputs,
    make_bank,
    make_exact,
    make_ours,
    make_theirs,
)

from mfd_fast.backbones.adapters import AdapterBank
from mfd_fast.models.sana import SanaConfig, SanaNetwork, trim_text
from mfd_fast.testing.numerics import assert_as_accurate


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_forward_equals_diffusers(variant, dtype, rows):
    theirs = make_theirs(**VARIANTS[variant]).to(dtype)
    ours = make_ours(theirs)
    x, t, cond = inputs(rows, dtype, has_guidance=variant == "guidance")
    v = ours(x, t, cond)
    exact = call_theirs(make_exact(theirs), x, t, cond)
    assert_as_accurate(v, call_theirs(theirs, x, t, cond), exact)
    assert torch.equal(ours(x, t, ours.prepare(cond)), v)
    assert v.is_contiguous()


@pytest.mark.parametrize("mask", ["none", "all real", "one row of padding only"])
@torch.no_grad()
def test_masks_equal_diffusers(mask):
    theirs = make_theirs()
    x, t, cond = inputs(2)
    if mask == "none":
        del cond["mask"]
    elif mask == "all real":
        cond["mask"][:] = True
    else:
        cond["mask"][1] = False
    args = x, t, cond
    exact = call_theirs(make_exact(theirs), *args)
    assert_as_accurate(make_ours(theirs)(*args), call_theirs(theirs, *args), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_trimmed_text_changes_nothing(dtype):
    theirs = make_theirs().to(dtype)
    x, t, cond = inputs(3, dtype, length=20)
    cond["mask"][:, 9:] = False
    for lengths in (None, [1, 9, 3]):
        trimmed = trim_text(cond, lengths)
        assert trimmed["text"].shape[1] == trimmed["mask"].shape[1] == 9
        exact = call_theirs(make_exact(theirs), x, t, cond)
        assert_as_accurate(make_ours(theirs)(x, t, trimmed), call_theirs(theirs, x, t, cond), exact)
    on_device = {name: tensor.to("meta") for name, tensor in cond.items()}
    assert trim_text(on_device)["text"].shape[1] == 20
    with pytest.raises(ValueError, match=r"lengths must be 1 to L = 20, got \[21\]"):
        trim_text(cond, [21])


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_time_table_holds_the_grid_and_rounds_to_it(dtype):
    theirs = make_theirs(timestep_scale=0.5).to(dtype)
    ours = make_ours(theirs, time_table=True)
    x, _, cond = inputs(3, dtype)
    steps = torch.tensor([0.0, 501.0, 1000.0])
    half = steps / 2 / 1000  # diffusers' pipeline applies timestep_scale, the model does not
    exact = call_theirs(make_exact(theirs), x, half, cond)
    v = ours(x, steps / 1000, cond)
    assert_as_accurate(v, call_theirs(theirs, x, half, cond), exact)
    assert torch.equal(ours(x, (steps + torch.tensor([0.3, -0.4, 0.0])) / 1000, cond), v)
    ours.has_time_table = False
    assert_as_accurate(ours(x, steps / 1000, cond), call_theirs(theirs, x, half, cond), exact)


@torch.no_grad()
def test_time_table_follows_new_weights_and_hooks():
    first, second = make_theirs(), make_theirs()
    ours = make_ours(first, time_table=True)
    x, t, cond = inputs(2)
    t = t.mul(1000).round() / 1000
    ours(x, t, cond)
    ours.load_state_dict(second.state_dict())
    expected = make_ours(second, time_table=True)(x, t, cond)
    assert torch.equal(ours(x, t, cond), expected)
    ours.double()
    exact = call_theirs(make_exact(second), x, t, cond)
    assert_as_accurate(ours(x.double(), t, cond).float(), expected, exact)
    ours.float().time_embed.linear.register_forward_hook(lambda *_: _[2] + 1)
    assert not torch.equal(ours(x, t, cond), expected)


@torch.no_grad()
def test_packed_weights_survive_copies_casts_loads_and_merges():
    theirs = make_theirs(attention_bias=True)
    x, t, cond = inputs(2)
    first = make_ours(theirs)
    expected = first(x, t, cond)

    def check(network):
        assert torch.equal(network(x, t, cond), expected)
        attention = network.transformer_blocks[1].attn1
        places = [getattr(attention, name).weight.data_ptr() for name in TARGETS]
        step = 4 * attention.to_q.weight.numel()
        assert places == list(range(places[0], places[0] + 3 * step, step))

    check(first)
    check(copy.deepcopy(first))
    check(copy.deepcopy(first).double().float())
    again = SanaNetwork(first.config)
    again.load_state_dict(theirs.state_dict(), assign=True)
    check(again)
    bank = make_bank(again)
    again.use_adapters(bank)
    bank.merge("aux")
    merged = again(x, t, cond)
    bank.unmerge("aux")
    check(again)
    with bank.lanes((("aux",),)):
        added = again(x, t, cond)
    wide = again.double()
    bank.double()
    with bank.lanes((("aux",),)):
        assert_as_accurate(merged, added, wide(x.double(), t, cond))


def test_every_weight_can_be_trained():
    """A full copy in training: gradients of all parameters equal diffusers'."""
    theirs = make_theirs(**VARIANTS["qk_norm"])
    ours, exact = make_ours(theirs, time_table=True), make_exact(theirs)
    x, t, cond = inputs(2)
    ours.has_time_table = False
    ours(x, t, cond).square().mean().backward()
    for model in (theirs, exact):
        call_theirs(model, x, t, cond).square().mean().backward()
    truth, eager = dict(exact.named_parameters()), dict(theirs.named_parameters())
    assert truth.keys() == dict(ours.named_parameters()).keys()
    # Tensors whose true gradient is zero (the biases of to_k) have no scale to compare on.
    largest = max(p.grad.abs().max() for p in truth.values())
    for name, parameter in ours.named_parameters():
        ratio = truth[name].grad.abs().max() / largest
        if ratio > torch.finfo(torch.float32).eps:
            assert_as_accurate(parameter.grad, eager[name].grad, truth[name].grad)


def small(**options):
    return SanaNetwork(SanaConfig.from_dict(SMALL | options))


def run_small(change=lambda x, t, cond: (x, t, cond), **options):
    small(**options)(*change(*inputs(2)))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: small(norm_elementwise_affine=True), "norm_elementwise_affine other than False"),
        (lambda: small(dropout=0.1), "dropout other than 0.0 is not supported"),
        (lambda: small(qk_norm="rms_norm"), "qk_norm must be one of .*, got 'rms_norm'"),
        (lambda: small(attention_head_dim=12), r"attention_head_dim must be one of \[4, 8, .* 12"),
        (lambda: small(num_layers=0), "num_layers must be >= 1, got 0"),
        (lambda: small(num_cross_attention_heads=None), "num_cross_attention_heads must .* None"),
        (lambda: small(cross_attention_dim=48), "cross_attention_dim must be .* 64.*; got 48"),
        (lambda: small(out_channels=8), "out_channels must equal in_channels 4.*; got 8"),
        (lambda: small(num_attention_heads=2048), "must be even and at most 8192, got 65536"),
        (lambda: small(window=4), "the config key 'window' is unknown here"),
        (lambda: small(_class_name="SanaVideo"), "expected .*SanaTransformer2DModel, got .*SanaVi"),
        (
            lambda: SanaNetwork(SanaConfig(guidance_embeds=True), time_table=True),
            "time_table must be off for a network with guidance embedding",
        ),
        (lambda: run_small(patch_size=4), r"x must be \[R, 4, H, W\] .* 4; got \[2, 4, 8, 6\]"),
        (lambda: run_small(lambda x, t, c: (x.double(), t, c)), "dtype torch.float32; got .*64"),
        (lambda: run_small(lambda x, t, c: (x, t[:1], c)), r"t must be \[2\], .*; got \[1\]"),
        (lambda: run_small(guidance_embeds=True), r"it lacks \['guidance'\]"),
        (lambda: run_small(lambda x, t, c: (x, t, c | {"y": t})), r"no use for \['y'\] in cond"),
        (lambda: run_small(caption_channels=8), r"cond\['text'\] must be \[R, L, 8\]; got"),
        (
            lambda: run_small(lambda x, t, c: (x, t, c | {"mask": c["mask"][:, 1:]})),
            r"cond\['mask'\] must be \[2, 7\]; got \[2, 6\]",
        ),
        (
            lambda: AdapterBank(small(), targets=("conv_point",)),
            "must be nn.Linear or a 1x1 nn.Conv2d .*conv_point is ConvWeights",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(run, message):
    with pytest.raises(ValueError, match=message):
        run()
