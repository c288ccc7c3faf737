"""SANA's transformer as a velocity network, with fused operators between its matmuls.

Computes diffusers' ``SanaTransformer2DModel`` (Xie et al., "SANA", 2024) and takes its state dict
as it is.  Written for integrating many times under one prompt: what depends on the text alone is
made once (:meth:`SanaNetwork.prepare`), what depends on the time alone can come from a table.

Letters in shapes: R rows, L text tokens, T image tokens, C width, N blocks.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfd_fast.backbones.adapters import AdapterBank
from mfd_fast.models.sana.attention import Gain
from mfd_fast.models.sana.blocks import MODULATIONS, SanaBlock, finish
from mfd_fast.models.sana.config import SanaConfig
from mfd_fast.models.sana.embeddings import TIMESTEPS, Mlp, PatchEmbedding, TimeEmbedding
from mfd_fast.models.sana.packing import PackedModule, joined, share_storage

BLOCKS = r"transformer_blocks\.\d+"  # the repeated blocks, for an activation policy
CAPTION_NORM_EPS = 1e-5
HEAD_NORM_EPS = 1e-6
MASKED = -10000.0  # added to the scores of padding; exp of it is 0 in every dtype
ALIGNMENT = 8  # elements; what fused attention asks of the rows of a bias


class SanaNetwork(PackedModule):
    """``network(x, t, cond) -> v``; a state dict has the names and shapes of diffusers.

    Args:
        config: sizes and variants.
        time_table: take the time modulation from a table of the 1,001 times k / 1000; every t is
            rounded to the nearest.  Made at the first call after the weights changed.

    cond is ``{"text": [R, L, channels], "mask": [R, L] bool}``, True where a token is real; without
    ``mask`` all are.  With guidance embedding also ``"guidance": [R]``, the scale times
    ``config.guidance_embeds_scale``.  Padding costs time and changes nothing: drop it first
    (:func:`mfd_fast.models.sana.text.trim.trim_text`).
    """

    DERIVED = ("_tables", "_times")

    def __init__(self, config: SanaConfig, *, time_table: bool = False):
        super().__init__()
        if time_table and config.guidance_embeds:
            raise ValueError(
                "time_table must be off for a network with guidance embedding: its modulation "
                "depends on time and guidance together"
            )
        self.config = config
        self.has_time_table = time_table
        width = config.width
        self.patch_embed = PatchEmbedding(config)
        self.time_embed = TimeEmbedding(
            width, has_guidance=config.guidance_embeds, timestep_scale=config.timestep_scale
        )
        self.caption_projection = Mlp(config.caption_channels, width, nn.GELU("tanh"))
        self.caption_norm = Gain(width, CAPTION_NORM_EPS)
        self.transformer_blocks = nn.ModuleList(SanaBlock(config) for _ in range(config.num_layers))
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.proj_out = nn.Linear(width, config.patch_size**2 * config.in_channels)
        self.pack()

    def pack(self) -> None:
        """All blocks' tables as one; the table of times is made when it is next needed."""
        self._tables = share_storage([block.scale_shift_table for block in self.transformer_blocks])
        self._times: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.scale_shift_table.dtype

    def use_adapters(self, bank: AdapterBank) -> None:
        """Add the bank's adapters to the packed products; without it its hooks add them one by one.

        The bank must have been made with this network.
        """
        rows: dict = {}
        for block in self.transformer_blocks:
            block.attn1.group_adapters(bank, rows)
            block.attn2.group_adapters(bank, rows)

    def prepare(self, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        """What stays the same along a trajectory, with R rows each; takes the place of cond.

        Keys and values of every block ``[R, L, 2 * C]``, the bias of the scores ``[R, 1, 1, L]`` if
        there is a mask, and the guidance's part of the time embedding ``[R, C]`` if it is an input.
        ``ValueError`` says what cond lacks.
        """
        self._check_cond(cond)
        text = self.caption_norm(self.caption_projection(cond["text"].to(self.dtype)))
        prepared: dict[str, Any] = {
            "keys_values": [block.attn2.keys_values(text) for block in self.transformer_blocks]
        }
        if "mask" in cond:
            prepared["bias"] = mask_bias(cond["mask"], self.dtype)
        if self.config.guidance_embeds:
            prepared["guidance"] = self.time_embed.guide(cond["guidance"])
        return prepared

    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
        """Velocity ``v = eps - x_0`` at the state x and the time t.

        Args:
            x: latents ``[R, C_in, H, W]`` in the network's dtype; H and W multiples of the patch.
            t: times ``[R]`` float32 in [0, 1], 1 = noise; the timestep is 1000 t.
            cond: the condition, or what :meth:`prepare` made of it.

        Returns:
            ``[R, C_in, H, W]``.  ``ValueError`` if a shape does not fit.
        """
        self._check(x, t)
        prepared = cond if "keys_values" in cond else self.prepare(cond)
        patch = self.config.patch_size
        height, width = x.shape[2] // patch, x.shape[3] // patch
        modulation, embedding = self._time(t, prepared.get("guidance"))
        blocks = self.transformer_blocks
        tables = joined([block.scale_shift_table for block in blocks], self._tables)
        modulation = tables.unflatten(0, (-1, MODULATIONS)) + modulation.unflatten(
            1, (1, MODULATIONS, -1)
        )
        tokens, left = self.patch_embed(x), (None, None)
        for block, rows, kv in zip(
            blocks, modulation.unbind(1), prepared["keys_values"], strict=True
        ):
            tokens, *left = block(tokens, rows, kv, prepared.get("bias"), height, width, *left)
        shift, scale = (self.scale_shift_table + embedding[:, None]).unbind(1)
        _, tokens = finish(tokens, *left, scale, shift, HEAD_NORM_EPS)
        return self.patch_embed.restore(self.proj_out(tokens), height, width)

    def _time(self, t: Tensor, guidance: Tensor | None) -> tuple[Tensor, Tensor]:
        """Modulation ``[R, 6 * C]`` and embedding ``[R, C]`` of the times ``[R]``."""
        if not self._uses_table():
            return self.time_embed(t * TIMESTEPS, guidance)
        if self._times is None:
            self._times = self._make_time_table()
        rows = self._times.index_select(0, (t * TIMESTEPS).round().long())
        width = self.config.width
        return rows[:, : MODULATIONS * width], rows[:, MODULATIONS * width :]

    def _uses_table(self) -> bool:
        """Not where the time embedding is trained or has adapters: it is no constant then."""
        if not self.has_time_table:
            return False
        is_trained = any(p.requires_grad for p in self.time_embed.parameters())
        has_hooks = any(module._forward_hooks for module in self.time_embed.modules())
        return not (is_trained and torch.is_grad_enabled()) and not has_hooks

    @torch.no_grad()
    def _make_time_table(self) -> Tensor:
        grid = torch.arange(TIMESTEPS + 1, dtype=torch.float32, device=self._tables.device)
        return torch.cat(self.time_embed(grid, None), dim=1)

    def _check(self, x: Tensor, t: Tensor) -> None:
        channels, patch = self.config.in_channels, self.config.patch_size
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % patch or x.shape[3] % patch:
            raise ValueError(
                f"SanaNetwork: x must be [R, {channels}, H, W] with H and W multiples of {patch}; "
                f"got {list(x.shape)}"
            )
        if x.dtype != self.dtype:
            raise ValueError(
                f"SanaNetwork: x must have the network's dtype {self.dtype}; got {x.dtype}"
            )
        if t.shape != x.shape[:1]:
            raise ValueError(
                f"SanaNetwork: t must be [{x.shape[0]}], one time a row; got {list(t.shape)}"
            )

    def _check_cond(self, cond: Mapping[str, Tensor]) -> None:
        wanted = {"text", "guidance"} if self.config.guidance_embeds else {"text"}
        if missing := sorted(wanted - cond.keys()):
            raise ValueError(f"SanaNetwork: cond must have {sorted(wanted)}; it lacks {missing}")
        if unknown := sorted(cond.keys() - wanted - {"mask"}):
            raise ValueError(
                f"SanaNetwork: this network has no use for {unknown} in cond; it takes "
                f"{[*sorted(wanted), 'mask']}"
            )
        text, channels = cond["text"], self.config.caption_channels
        if text.ndim != 3 or text.shape[2] != channels:
            raise ValueError(
                f"SanaNetwork: cond['text'] must be [R, L, {channels}]; got {list(text.shape)}"
            )
        if "mask" in cond and cond["mask"].shape != text.shape[:2]:
            raise ValueError(
                f"SanaNetwork: cond['mask'] must be {list(text.shape[:2])}; "
                f"got {list(cond['mask'].shape)}"
            )


def mask_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 for real tokens, -10000 for padding: ``[R, L]`` bool to ``[R, 1, 1, L]``, aligned rows."""
    bias = (1 - mask.to(dtype)) * MASKED
    length = bias.shape[1]
    return F.pad(bias, (0, -length % ALIGNMENT))[:, None, None, :length]
