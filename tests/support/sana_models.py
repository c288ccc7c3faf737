"""Small SANA models: diffusers', ours with the same weights, inputs and adapters for both."""

import copy

import pytest
import torch
from small_networks import draw_adapter

from mfd_fast.backbones.adapters import AdapterBank
from mfd_fast.models.sana import SanaConfig, SanaNetwork
from mfd_fast.ops import reference

diffusers = pytest.importorskip("diffusers")

SMALL = {
    **{"in_channels": 4, "out_channels": 4, "num_layers": 2, "sample_size": 8},
    **{"num_attention_heads": 2, "attention_head_dim": 32, "cross_attention_dim": 64},
    **{"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "caption_channels": 24},
}
VARIANTS = {
    "plain": {},
    "patches": {"patch_size": 2},
    "positions": {"interpolation_scale": 2.0},
    "patches and positions": {"patch_size": 2, "interpolation_scale": 0.5, "sample_size": 16},
    "qk_norm": {"qk_norm": "rms_norm_across_heads"},
    "guidance": {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"},
    "attention_bias": {"attention_bias": True},
    "other cross width": {"num_cross_attention_heads": 3, "mlp_ratio": 1.7},
}
TARGETS = ("to_q", "to_k", "to_v")
RANK, ALPHA = 4, 6.0
DTYPES = [torch.float32, torch.bfloat16]


class LinearAttention:
    """diffusers' processor without its casts to float32, so that float64 stays float64."""

    def __call__(self, attn, hidden_states, **_):
        q, k, v = (getattr(attn, name)(hidden_states) for name in TARGETS)
        if attn.norm_q is not None:
            q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = (y.unflatten(2, (attn.heads, -1)) for y in (q, k, v))
        return attn.to_out[0](reference.linear_attention(q, k, v)[0])


def make_theirs(**options):
    return diffusers.SanaTransformer2DModel(**SMALL | options).eval()


def make_ours(theirs, **options):
    """Our network with their weights."""
    network = SanaNetwork(SanaConfig.from_dict(dict(theirs.config)), **options)
    network.to(theirs.dtype).load_state_dict(theirs.state_dict())
    return network.eval()


def make_exact(theirs):
    exact = copy.deepcopy(theirs).double()
    for block in exact.transformer_blocks:
        block.attn1.set_processor(LinearAttention())
    return exact


def inputs(rows, dtype=torch.float32, *, has_guidance=False, length=7):
    """x ``[R, 4, 8, 6]``, t and cond; text of 1, L - 1, ... real tokens."""
    x, t = torch.randn(rows, 4, 8, 6).to(dtype), torch.rand(rows)
    lengths = torch.tensor([[1, length - 1, 3][row % 3] for row in range(rows)])
    cond = {"text": torch.randn(rows, length, 24).to(dtype)}
    cond["mask"] = torch.arange(length)[None] < lengths[:, None]
    if has_guidance:
        cond["guidance"] = torch.rand(rows)
    return x, t, cond


def call_theirs(theirs, x, t, cond):
    dtype = theirs.dtype
    guidance = {"guidance": cond["guidance"]} if "guidance" in cond else {}
    return theirs(
        x.to(dtype),
        cond["text"].to(dtype),
        1000 * t,
        encoder_attention_mask=cond.get("mask"),
        return_dict=False,
        **guidance,
    )[0]


def make_bank(network, names=("aux", "student")):
    """A bank whose adapters all do something."""
    bank = AdapterBank(network, rank=RANK, alpha=ALPHA, targets=TARGETS, names=names)
    for seed, name in enumerate(names):
        draw_adapter(bank, name, seed)
    return bank


def lora_keys(name):
    return [f"{name}.lora_{factor}.weight" for factor in "AB"]


def pooled(triples):
    """Every tensor on its own scale, all together: ReLUs near zero decide the worst of one."""
    scales = [exact.abs().max() for _, _, exact in triples]
    return [torch.cat([(part / scale).flatten().to(part.dtype)
                       for part, scale in zip(parts, scales, strict=True)])
            for parts in zip(*triples, strict=True)]  # fmt: skip
