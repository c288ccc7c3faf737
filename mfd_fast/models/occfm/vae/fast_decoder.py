"""The decoder of a frozen VAE, for speed: the function of :mod:`.decoder`, less work.

After distillation to one step the decoder is more than half of a forecast.  What differs:

    Swin bias         16 sigmoid(network(offsets))[index] and the shift's mask do not depend on the
                      input: one tensor per block, made once
    windows           tokens stay in the order of the windows; between two blocks one gather leads
                      from one block's order to the next, in place of two rolls and two copies
    dense attention   one product for q, k and v, fused attention; the projection and the 1 x 1
                      convolution behind it are one matrix
    doubling          nearest doubling and a 3 x 3 convolution are one transposed convolution with
                      stride 2 and a 4 x 4 kernel: 4/9 of the products, no doubled image
    layout            images are channels-last, so that images, tokens and voxels are views
    class head        scores and their argmax in pieces that stay in the cache

Letters in shapes: B frames, R side, N = R^2 tokens, C channels, H heads, n windows, L = 25 tokens.
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfd_fast.models.occfm.vae.blocks import ConvResidual, DenseAttention
from mfd_fast.models.occfm.vae.decoder import Decoder, Upsample, class_scores
from mfd_fast.models.occfm.vae.swin import TOKENS, SwinBlock, SwinStage, cut_windows
from mfd_fast.models.occfm.vae.vae import OccupancyVae

NORM_FLOOR = 1e-12  # of the norms of queries and keys
# Voxels scored at once: on a CPU 2.4 MB of fp32 scores for 18 classes, which a core's cache holds;
# on a GPU more than a frame, enough to fill it.
HEAD_ROWS = {"cpu": 1 << 15, "cuda": 1 << 20}


class Constants(nn.Module):
    """A module of tensors that were made once: buffers, which follow a move or a cast."""

    def keep(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach().clone(), persistent=False)

    def keep_image(self, **kernels: Tensor) -> None:
        """The same for kernels of convolutions, channels-last."""
        for name, kernel in kernels.items():
            self.keep(**{name: kernel.detach().contiguous(memory_format=torch.channels_last)})


class FastConv(Constants):
    """A 3 x 3 convolution."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.keep_image(weight=conv.weight)
        self.keep(bias=conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=1)


class FastNorm(Constants):
    """A group norm."""

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        self.keep(weight=norm.weight, bias=norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.groups, self.weight, self.bias, self.eps)


class FastConvResidual(nn.Module):
    """See ``ConvResidual``."""

    def __init__(self, block: ConvResidual):
        super().__init__()
        self.conv1, self.conv2 = FastConv(block.conv1), FastConv(block.conv2)
        self.norm = FastNorm(block.norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.silu(self.norm(self.conv1(x)))).add_(x)


class FastUpsample(Constants):
    """Nearest doubling and convolution as one transposed convolution.

    An output pixel sees four input pixels; kernel entries that meet the same one are added.
    """

    def __init__(self, block: Upsample):
        super().__init__()
        flipped = block.conv.weight.detach().flip(2, 3).transpose(0, 1)
        shifts = [(a, 1 - a, b, 1 - b) for a in (0, 1) for b in (0, 1)]
        self.keep_image(weight=torch.stack([F.pad(flipped, shift) for shift in shifts]).sum(0))
        self.keep(bias=block.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)


class FastDenseAttention(Constants):
    """See ``DenseAttention``."""

    def __init__(self, block: DenseAttention):
        super().__init__()
        self.heads, self.norm = block.heads, FastNorm(block.norm)
        attention, conv = block.attention, block.proj_out
        self.keep(
            qkv=torch.cat([attention.to_q.weight, attention.to_kv.weight]),
            out=conv.weight.flatten(1) @ attention.to_out.weight,
            out_bias=conv.bias,
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)
        qkv = F.linear(tokens, self.qkv).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        merged = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        projected = F.linear(merged, self.out, self.out_bias)
        return projected.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2).add_(x)


class FastSwinBlock(Constants):
    """See ``SwinBlock``; tokens ``[B, N, C]`` in the order of this block's windows."""

    def __init__(self, block: SwinBlock):
        super().__init__()
        attn = block.attn
        self.heads = attn.heads
        bias = attn.position_bias()
        if block.attn_mask is not None:
            bias = bias + block.attn_mask[:, None]  # [n, H, L, L]
        scale = attn.scale()  # of queries and, of keys, 1: [2, 1, 1, H, 1, 1]
        self.keep(
            score_bias=bias,
            scales=torch.stack([scale, torch.ones_like(scale)])[:, None, None],
            qkv=attn.qkv.weight,
            qkv_bias=attn.qkv_bias(),
            proj=attn.proj.weight,
            proj_bias=attn.proj.bias,
        )
        self.norm1, self.norm2, self.mlp = (
            deepcopy(part).requires_grad_(False) for part in (block.norm1, block.norm2, block.mlp)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self._attend(x)).add_(x)
        return self.norm2(self.mlp(x)).add_(x)

    def _attend(self, x: Tensor) -> Tensor:
        windows = x.unflatten(1, (-1, TOKENS))
        qkv = F.linear(windows, self.qkv, self.qkv_bias).unflatten(-1, (3, self.heads, -1))
        qkv = qkv.permute(3, 0, 1, 4, 2, 5).contiguous()  # [3, B, n, H, L, D]
        lengths = torch.linalg.vector_norm(qkv[:2], dim=-1, keepdim=True).clamp_min(NORM_FLOOR)
        q, k = qkv[:2] * (self.scales / lengths)
        scores = (q @ k.mT).add_(self.score_bias)
        merged = (scores.softmax(dim=-1) @ qkv[2]).transpose(2, 3).reshape(x.shape)
        return F.linear(merged, self.proj, self.proj_bias)


def window_order(side: int, shift: int) -> Tensor:
    """Where in the raster the tokens of the windows come from, ``[N]``."""
    raster = torch.arange(side * side).reshape(1, side, side, 1)
    return cut_windows(raster.roll((-shift, -shift), dims=(1, 2))).flatten()


class FastSwinStage(Constants):
    """See ``SwinStage``."""

    def __init__(self, stage: SwinStage, side: int):
        super().__init__()
        self.blocks = nn.ModuleList(FastSwinBlock(block) for block in stage.blocks)
        here, moves = torch.arange(side * side), []
        for shift in [block.shift for block in stage.blocks]:
            order = window_order(side, shift)
            moves.append(here.argsort()[order])
            here = order
        self.keep(moves=torch.stack([*moves, here.argsort()]))  # the last one back to the raster

    def forward(self, image: Tensor) -> Tensor:
        x = image.permute(0, 2, 3, 1).flatten(1, 2)
        for block, move in zip(self.blocks, self.moves, strict=False):
            x = block(x.index_select(1, move))
        x = x.index_select(1, self.moves[-1])
        return x.unflatten(1, image.shape[2:]).permute(0, 3, 1, 2)


class FastDecoder(nn.Module):
    """The decoder and class head of ``vae``; make it anew after the weights of ``vae`` change.

    Args:
        vae: in the dtype and on the device to run in.  It is not changed; constants and kernels in
            another layout are copies.  Gradients flow to latents only.

    ``ValueError`` for a 3-D VAE, whose decoder serves no forecast.
    """

    def __init__(self, vae: OccupancyVae):
        super().__init__()
        if vae.config.clip is not None:
            raise ValueError("FastDecoder: give the frame-by-frame VAE; got the 3-D VAE")
        decoder: Decoder = vae.decoder
        residual_1, attention, residual_2 = decoder.mid
        self.latent_shape = vae.config.latent_shape
        layers = [
            FastConv(decoder.conv_in),
            FastConvResidual(residual_1),
            FastDenseAttention(attention),
            FastConvResidual(residual_2),
        ]
        for stage, upsample in enumerate(decoder.upsample_blocks):
            swin, residual = decoder.net_blocks[2 * stage : 2 * stage + 2]
            layers += [
                FastSwinStage(swin, vae.config.latent_grid << stage),
                FastConvResidual(residual),
                FastUpsample(upsample),
            ]
        layers += [FastNorm(decoder.norm_out), nn.SiLU(), FastConv(decoder.conv_out)]
        self.layers = nn.Sequential(*layers)
        self.register_buffer("class_table", vae.embedding.class_embeds.weight.detach().clone())

    def decoded_map(self, latents: Tensor) -> Tensor:
        """``[B, Z E, X, Y]``, channels-last, of latents ``[B, C, R, R]``."""
        if latents.shape[1:] != self.latent_shape:
            raise ValueError(
                f"FastDecoder: latents must be [B, {', '.join(map(str, self.latent_shape))}]; "
                f"got {list(latents.shape)}"
            )
        return self.layers(latents.contiguous(memory_format=torch.channels_last))

    def forward(self, latents: Tensor) -> Tensor:
        """Class scores ``[B, X, Y, Z, K]``, with a gradient to the latents."""
        return class_scores(self.decoded_map(latents), self.class_table)

    @torch.no_grad()
    def decode_classes(self, latents: Tensor) -> Tensor:
        """The likeliest class ids, ``[B, X, Y, Z]`` int64; the scores never exist together."""
        decoded = self.decoded_map(latents).permute(0, 2, 3, 1)
        height = decoded.shape[3] // self.class_table.shape[1]
        voxels = decoded.reshape(-1, self.class_table.shape[1])
        ids = torch.empty(len(voxels), dtype=torch.int64, device=latents.device)
        rows = HEAD_ROWS[latents.device.type]
        for start in range(0, len(voxels), rows):
            piece = slice(start, start + rows)
            torch.argmax(voxels[piece] @ self.class_table.mT, dim=1, out=ids[piece])
        return ids.reshape(*decoded.shape[:3], height)
