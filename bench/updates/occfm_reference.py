"""OccFM's transition network as it is specified: slow, obvious, any dtype, all twelve frames.

Reads the parameters of an :class:`~mfd_fast.models.occfm.network.OccfmNetwork`; the features of
time and trajectory are all it shares with it.  Conventions are the checkpoint's: t = 0 is noise,
tau = 1000 t, velocity = data - noise.  Source: arXiv 2506.23434; what its text leaves open was
fixed by pinned vectors.

Letters in shapes: B samples, F frames, C channels, H, W a frame's sides; n sequences of N tokens.
Every layer works on ``[B, C, F, H, W]``.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfd_fast.models.occfm.embeddings import time_features, trajectory_features
from mfd_fast.models.occfm.network import OccfmNetwork


def velocity(network: OccfmNetwork, sequence: Tensor, tau: Tensor, trajectory: Tensor) -> Tensor:
    """``data - noise`` of all frames.

    Args:
        sequence: scaled latents, history then noised future, ``[B, F, C, H, W]``.
        tau: 1000 t, ``[B]``.
        trajectory: ego steps in metres, ``[B, F, 2]``.
    """
    *_, (_, out) = stages(network, sequence, tau, trajectory)
    return out.transpose(1, 2)


def stages(
    network: OccfmNetwork, sequence: Tensor, tau: Tensor, trajectory: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Every part's name and result, in order; the last one is the velocity ``[B, C, F, H, W]``.

    Images are ``[B, C, F, H, W]``; tokens ``[B F, H W, C]`` after attention in space (``x.2``) and
    ``[B H W, F, C]`` after attention in time (``x.3``).
    """
    bias = _temporal_bias(network)
    yield "time_rel_pos_bias", bias
    x0 = _conv(network.init_conv, sequence.transpose(1, 2))
    yield "init_conv", x0
    y = x0 + _attention_in_time(network.init_temporal_attn, x0, bias)
    yield "init_temporal_attn", y
    x = kept = x0 + y  # the residual is added twice

    e = yield from _condition(network, tau, trajectory)

    skips = []
    tables = [(network.pos_embed, network.temp_embed), None]
    for i, blocks in enumerate(network.downs):
        x = yield from _level(f"downs.{i}", blocks, x, e, tables[i])
        skips.append(x)
        if i == 0:
            x = _conv(blocks[5], x)
            yield "downs.0.5", x

    x = _res_block(network.mid_block1, x, e)
    yield "mid_block1", x
    x = x + _attention_in_space(network.mid_spatial_attn, x)
    yield "mid_spatial_attn", x
    x = x + _attention_in_time(network.mid_temporal_attn, x, bias)
    yield "mid_temporal_attn", x
    x = _res_block(network.mid_block2, x, e)
    yield "mid_block2", x

    for i, blocks in enumerate(network.ups):
        x = torch.cat([x, skips.pop()], dim=1)
        x = yield from _level(f"ups.{i}", blocks, x, e, None)
        if i == 0:
            up = blocks[4]
            x = F.conv_transpose3d(x, up.weight, up.bias, up.stride, up.padding)
            yield "ups.0.4", x

    x = _res_block(network.final_conv[0], torch.cat([x, kept], dim=1), None)
    yield "final_conv.0", x
    yield "final_conv", _conv(network.final_conv[1], x)


def _temporal_bias(network: OccfmNetwork) -> Tensor:
    """``[heads, F, F]``: the row |i - j| of the table, + 16 if key j is after query i."""
    table = network.time_rel_pos_bias["relative_attention_bias"].weight
    frame = torch.arange(network.config.frames, device=table.device)
    distance = frame[:, None] - frame
    return table[distance.abs() + 16 * (distance < 0)].permute(2, 0, 1)


def _condition(
    network: OccfmNetwork, tau: Tensor, trajectory: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """The embeddings of time and trajectory; returns their sum ``[B, width]``."""
    config, dtype = network.config, network.init_conv.weight.dtype
    from_time = network.t_embedder(time_features(tau, config.condition_width).to(dtype))
    yield "t_embedder", from_time
    steps = trajectory[:, : config.trajectory_length]
    features = trajectory_features(steps, config.trajectory_frequencies)
    from_trajectory = network.traj_encoder(features.to(dtype))
    yield "traj_encoder", from_trajectory
    return from_time + from_trajectory


def _level(
    name: str,
    blocks: nn.ModuleList,
    x: Tensor,
    e: Tensor,
    tables: tuple[Tensor, Tensor] | None,
) -> Iterator[tuple[str, Tensor]]:
    """Two residual blocks, a DiT block over space, one over time; returns images."""
    for i in (0, 1):
        x = _res_block(blocks[i], x, e)
        yield f"{name}.{i}", x
    samples, _, length, height, width = x.shape
    tokens = x.permute(0, 2, 3, 4, 1).flatten(2, 3).flatten(0, 1)
    tokens = tokens if tables is None else tokens + tables[0]
    tokens = _dit_block(blocks[2], tokens, e)
    yield f"{name}.2", tokens
    tokens = tokens.unflatten(0, (samples, length)).transpose(1, 2).flatten(0, 1)
    tokens = tokens if tables is None else tokens + tables[1]
    tokens = _dit_block(blocks[3], tokens, e)
    yield f"{name}.3", tokens
    return tokens.unflatten(0, (samples, height, width)).permute(0, 4, 3, 1, 2)


def _conv(conv: nn.Conv3d, x: Tensor) -> Tensor:
    return F.conv3d(x, conv.weight, conv.bias, conv.stride, conv.padding)


def _res_block(block: nn.Module, x: Tensor, e: Tensor | None) -> Tensor:
    h = _rms_norm(_conv(block.block1.proj, x), block.block1.norm.gamma)
    if e is not None:
        scale, shift = _rows(block.mlp["1"], e)[:, :, None, None, None].chunk(2, dim=1)
        h = h * (1 + scale) + shift
    h = F.silu(h)
    h = F.silu(_rms_norm(_conv(block.block2.proj, h), block.block2.norm.gamma))
    is_same = isinstance(block.res_conv, nn.Identity)
    return h + (x if is_same else _conv(block.res_conv, x))


def _rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    return F.normalize(x, dim=1, eps=1e-12) * x.shape[1] ** 0.5 * gamma


def _rows(rows: nn.Module, e: Tensor) -> Tensor:
    return F.linear(F.silu(e), rows.weight, rows.bias)


def _dit_block(block: nn.Module, x: Tensor, e: Tensor) -> Tensor:
    """Tokens ``[n, N, C]`` of B samples, n / B sequences of each."""
    rows = _rows(block.adaLN_modulation["1"], e).repeat_interleave(len(x) // len(e), dim=0)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = rows[:, None].chunk(6, dim=2)
    h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale_a) + shift_a
    q, k, v = _split_heads(block.attn.qkv(h), block.attn.heads)
    out = F.scaled_dot_product_attention(q, k, v)  # [n, heads, N, C / heads]
    merged = out.contiguous().view(x.shape)  # row-major, as the weights were trained
    x = x + gate_a * block.attn.proj(merged)
    h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale_m) + shift_m
    return x + gate_m * block.mlp.fc2(F.gelu(block.mlp.fc1(h), approximate="tanh"))


def _split_heads(qkv: Tensor, heads: int) -> Tensor:
    """``[n, N, 3 heads d]`` -> q, k, v, each ``[n, heads, N, d]``."""
    return qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def _legacy_attention(block: nn.Module, tokens: Tensor, bias: Tensor | None) -> Tensor:
    """Tokens ``[n, N, C]`` normed already; the usual merge of heads."""
    q, k, v = _split_heads(block.layers["to_qkv"](tokens), block.heads)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return block.layers["to_out"](out.transpose(1, 2).flatten(2))


def _channel_norm(block: nn.Module, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * block.fn["norm"].gamma


def _attention_in_time(block: nn.Module, x: Tensor, bias: Tensor) -> Tensor:
    samples, _, _, height, width = x.shape
    tokens = _channel_norm(block, x).permute(0, 3, 4, 2, 1).flatten(0, 2)
    out = _legacy_attention(block, tokens, bias)
    return out.unflatten(0, (samples, height, width)).permute(0, 4, 3, 1, 2)


def _attention_in_space(block: nn.Module, x: Tensor) -> Tensor:
    samples, _, length, height, width = x.shape
    tokens = _channel_norm(block, x).permute(0, 2, 3, 4, 1).flatten(2, 3).flatten(0, 1)
    out = _legacy_attention(block, tokens, None)
    return out.unflatten(0, (samples, length)).unflatten(2, (height, width)).permute(0, 4, 1, 2, 3)
