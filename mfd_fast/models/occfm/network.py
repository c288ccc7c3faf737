"""OccFM's transition network as a velocity network: fused, channels last, future frames only.

The same function as ``reference.velocity``, seen from the engine: t = 1 is noise, the velocity is
noise - data, and a sample is the future half of a window, its latents times ``latent_scale``.  What
a trajectory does not change is made once (:meth:`OccfmNetwork.prepare`).

Letters in shapes: R rows, F frames of a window, C channels of a latent, H, W its sides.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfd_fast.flow.times import Schedule, shifted_schedule
from mfd_fast.models.occfm.blocks import (
    DitBlock,
    FrameConv,
    FrameConvTranspose,
    LegacyAttention,
    Pointwise,
    ResBlock,
    frames_of,
    pixels,
)
from mfd_fast.models.occfm.config import OccfmConfig
from mfd_fast.models.occfm.embeddings import (
    BIAS_ROWS,
    TIMESTEPS,
    bias_rows,
    frame_table,
    position_table,
    time_features,
    trajectory_features,
)

BLOCKS = r"(downs|ups)\.\d\.[0-3]|mid_block\d|final_conv\.0"  # for an activation policy


class OccfmNetwork(nn.Module):
    """``network(x, t, cond) -> v``; parameters and buffers have the names of a checkpoint.

    cond is ``{"history": [R, F/2, C, H, W], "trajectory": [R, F, 2]}``: latents as the VAE makes
    them, zeros where a frame is missing, and ego steps in metres.  The null condition is a history
    of zeros (:func:`null_condition`).

    Args:
        config: sizes and variants.
        compute_dtype: matmuls run in this dtype under autocast while the weights keep theirs, for
            training in half precision; None for no autocast.
    """

    def __init__(self, config: OccfmConfig, *, compute_dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        base, outer, inner = config.widths
        width, heads = config.condition_width, config.heads
        self.register_buffer("pos_embed", position_table(config.grid, outer))
        self.register_buffer("temp_embed", frame_table(config.frames, outer))
        self.register_buffer("_bias_rows", bias_rows(config.frames), persistent=False)

        def level(inputs: int, outputs: int, is_last: bool = False) -> list[nn.Module]:
            return [
                ResBlock(inputs, outputs, width),
                ResBlock(outputs, outputs, width),
                DitBlock(outputs, heads, width, is_temporal=False),
                DitBlock(outputs, heads, width, is_temporal=True, second_half=is_last),
            ]

        half = [nn.Identity(), FrameConv(outer, outer, 4, stride=2)]
        double = [FrameConvTranspose(outer, outer)]
        downs = [level(base, outer) + half, level(outer, inner)]
        ups = [level(2 * inner, outer) + double, level(2 * outer, base, is_last=True)]
        self.downs = nn.ModuleList(map(nn.ModuleList, downs))
        self.ups = nn.ModuleList(map(nn.ModuleList, ups))
        self.t_embedder = _condition_mlp(width, width)
        self.time_rel_pos_bias = nn.ModuleDict(
            {"relative_attention_bias": nn.Embedding(BIAS_ROWS, heads)}
        )
        self.init_conv = FrameConv(config.latent_channels, base, config.first_kernel)
        self.init_temporal_attn = LegacyAttention(base, heads, config.head_width)
        self.mid_block1 = ResBlock(inner, inner, width)
        self.mid_spatial_attn = LegacyAttention(inner, heads, config.head_width)
        self.mid_temporal_attn = LegacyAttention(inner, heads, config.head_width)
        self.mid_block2 = ResBlock(inner, inner, width)
        self.final_conv = nn.ModuleList(
            [ResBlock(2 * base, base, None), Pointwise(base, config.latent_channels)]
        )
        features = 4 * config.trajectory_frequencies * config.trajectory_length
        self.traj_encoder = _condition_mlp(features, width)
        self._initialise()

    def _initialise(self) -> None:
        """Linear layers Xavier-uniform with zero bias, then the time embedding N(0, 0.02^2)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for index in (0, 2):
            nn.init.normal_(self.t_embedder[index].weight, std=0.02)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.init_conv.weight.dtype

    def schedule(self, steps: int | None = None) -> Schedule:
        """The times of the model's own Euler sampler, in ``config.sample_steps`` steps if None."""
        steps = self.config.sample_steps if steps is None else steps
        return shifted_schedule(steps, shift=self.config.sample_shift)

    def prepare(self, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What stays the same along a trajectory; takes the place of cond.

        The first convolution of the history ``[R, F/2, H, W, width]`` and the embedding of the
        trajectory ``[R, width]``.  ``ValueError`` says what does not fit.
        """
        self._check_cond(cond)
        steps = cond["trajectory"][:, : self.config.trajectory_length]
        features = trajectory_features(steps, self.config.trajectory_frequencies)
        history = (cond["history"] * self.config.latent_scale).to(self.dtype)
        with self._precision():
            return {
                "history": self._first_conv(history),
                "trajectory_embedding": self.traj_encoder(features.to(self.dtype)),
            }

    def modulation(self, t: Tensor, trajectory_embedding: Tensor) -> Tensor:
        """All blocks' modulations at times ``[R]``, side by side from one product: ``[R, M]``.

        Where all times are known in advance, those of all steps are one product: give its rows to
        :meth:`forward` as ``"modulation"`` of the prepared condition.
        """
        features = time_features(TIMESTEPS * (1.0 - t), self.config.condition_width)
        layers = [block.condition for block in self._modulated_blocks()]
        weight = torch.cat([layer.weight for layer in layers])
        bias = torch.cat([layer.bias for layer in layers])
        with self._precision():
            embedding = F.silu(self.t_embedder(features.to(self.dtype)) + trajectory_embedding)
            return F.linear(embedding, weight, bias)

    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Velocity ``noise - data`` of the future frames.

        Args:
            x: the future, scaled latents or noise, ``[R, F/2, C, H, W]`` in the network's dtype.
            t: times ``[R]`` float32 in [0, 1], 1 = noise.
            cond: the condition, or what :meth:`prepare` made of it.

        Returns:
            Like x, in ``compute_dtype`` if there is one.  ``ValueError`` if a shape does not fit.
        """
        self._check(x, t)
        prepared = cond if "trajectory_embedding" in cond else self.prepare(cond)
        modulation = prepared.get("modulation")
        if modulation is None:
            modulation = self.modulation(t, prepared["trajectory_embedding"])
        with self._precision():
            return self._velocity(x, prepared["history"], self._by_block(modulation))

    def _velocity(self, x: Tensor, history: Tensor, rows: Mapping[nn.Module, Tensor]) -> Tensor:
        """The network behind its first convolution's history, modulated by ``rows``."""
        config, bias = self.config, self._temporal_bias()
        half, double = self.downs[0][5], self.ups[0][4]
        first = torch.cat([history, self._first_conv(x)], dim=1).flatten(0, 1)
        # The attention has added the residual already; published weights expect it twice.
        kept = first + self.init_temporal_attn.temporal(first, config.frames, bias)

        tables = self.pos_embed.to(kept.dtype), self.temp_embed.to(kept.dtype)
        outer = _stacked(self._level(self.downs[0], kept, rows, tables))
        inner = _stacked(self._level(self.downs[1], half(outer), rows))
        h = self.mid_block1(inner, rows[self.mid_block1])
        h = self.mid_spatial_attn.spatial(h)
        h = self.mid_temporal_attn.temporal(h, config.frames, bias)
        h = self.mid_block2(h, rows[self.mid_block2])
        h = _stacked(self._level(self.ups[0], torch.cat([h, inner], dim=-1), rows))
        h = self._level(self.ups[1], torch.cat([double(h), outer], dim=-1), rows)

        kept = kept.unflatten(0, (-1, config.frames))[:, config.history :]
        h = self.final_conv[0](_stacked(torch.cat([h, kept], dim=-1)))
        v = self.final_conv[1](h).unflatten(0, (-1, config.future))
        return -v.permute(0, 1, 4, 2, 3).contiguous()

    def _precision(self) -> AbstractContextManager:
        """Autocast without its cache of cast weights: each is read once, and a graph may run it."""
        if self.compute_dtype is None:
            return nullcontext()
        device = self.init_conv.weight.device.type
        return torch.autocast(device, dtype=self.compute_dtype, cache_enabled=False)

    def _level(
        self,
        blocks: nn.ModuleList,
        frames: Tensor,
        rows: Mapping[nn.Module, Tensor],
        tables: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Two residual blocks, attention in space, attention in time; tables are of positions.

        ``[R F, H, W, C_in]`` to ``[R, F, H, W, C]`` (half as many frames on the last level), a view
        of tokens in the order of the last attention.
        """
        for block in blocks[:2]:
            frames = block(frames, rows[block])
        height, width = frames.shape[1:3]
        spatial, temporal = blocks[2], blocks[3]
        tokens = frames.flatten(1, 2)
        tokens = spatial(tokens if tables is None else tokens + tables[0], rows[spatial])
        tokens = pixels(tokens.unflatten(1, (height, width)), self.config.frames)
        tokens = temporal(tokens if tables is None else tokens + tables[1], rows[temporal])
        return frames_of(tokens, height, width)

    def _first_conv(self, latents: Tensor) -> Tensor:
        """``[R, n, C, H, W]`` -> ``[R, n, H, W, base width]``."""
        frames = latents.permute(0, 1, 3, 4, 2).flatten(0, 1).contiguous()
        return self.init_conv(frames).unflatten(0, latents.shape[:2])

    def _modulated_blocks(self) -> list[nn.Module]:
        return [m for m in self.modules() if getattr(m, "condition", None) is not None]

    def _by_block(self, modulation: Tensor) -> dict[nn.Module, Tensor]:
        """Every block's columns of ``[R, M]``."""
        blocks = self._modulated_blocks()
        sizes = [len(block.condition.bias) for block in blocks]
        return dict(zip(blocks, modulation.split(sizes, dim=1), strict=True))

    def _temporal_bias(self) -> Tensor:
        """The bias of the legacy temporal attentions, ``[heads, F, F]``."""
        table = self.time_rel_pos_bias["relative_attention_bias"]
        return table(self._bias_rows).permute(2, 0, 1)

    def _check(self, x: Tensor, t: Tensor) -> None:
        if x.ndim != 5 or x.shape[1:] != self.config.sample_shape:
            raise ValueError(
                f"OccfmNetwork: x must be [R, {', '.join(map(str, self.config.sample_shape))}]; "
                f"got {list(x.shape)}"
            )
        if t.shape != x.shape[:1]:
            raise ValueError(
                f"OccfmNetwork: t must be [{x.shape[0]}], one time a row; got {list(t.shape)}"
            )

    def _check_cond(self, cond: Mapping[str, Tensor]) -> None:
        config = self.config
        shapes = {
            "history": (config.history, *config.latent_shape),
            "trajectory": (config.frames, 2),
        }
        if cond.keys() != shapes.keys():
            raise ValueError(
                f"OccfmNetwork: cond must have {sorted(shapes)}; got {sorted(cond.keys())}"
            )
        for name, shape in shapes.items():
            if cond[name].shape[1:] != shape:
                raise ValueError(
                    f"OccfmNetwork: cond[{name!r}] must be [R, {', '.join(map(str, shape))}]; "
                    f"got {list(cond[name].shape)}"
                )


def null_condition(cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The condition without history; the trajectory stays, as in the model's own guidance."""
    return {"history": torch.zeros_like(cond["history"]), "trajectory": cond["trajectory"]}


def _stacked(frames: Tensor) -> Tensor:
    """``[R, F, H, W, C]`` -> ``[R F, H, W, C]``, contiguous."""
    return frames.contiguous().flatten(0, 1)


def _condition_mlp(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))
