"""The parts of OccFM's transition network, on frames that lie channels last.

Letters in shapes: R rows (samples), F frames, H, W a frame's sides, C channels; N sequences of T
tokens.  Frames are ``[R F, H, W, C]``, tokens of all frames at a pixel ``[R H W, F, C]``; rows of
modulation are per sample.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfd_fast.ops import (
    gated_residual,
    layer_norm_modulate,
    rms_norm_modulate_silu,
    short_attention_qkv,
)

CHANNEL_NORM_EPS = 1e-5
DIT_NORM_EPS = 1e-6
MODULATIONS = 6  # shift, scale and gate of the attention, then of the MLP


def pixels(frames: Tensor, length: int) -> Tensor:
    """``[R F, H, W, C]`` -> ``[R H W, F, C]`` with F = ``length``, a copy."""
    return frames.unflatten(0, (-1, length)).permute(0, 2, 3, 1, 4).contiguous().flatten(0, 2)


def frames_of(tokens: Tensor, height: int, width: int) -> Tensor:
    """``[R H W, F, C]`` -> ``[R, F, H, W, C]``, a view."""
    return tokens.unflatten(0, (-1, height, width)).permute(0, 3, 1, 2, 4)


class FrameConv(nn.Conv3d):
    """A 1 x k x k convolution, computed in 2-D; its weight has five dimensions, channels last."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1):
        padding = (kernel - 1) // 2
        sizes = (1, kernel, kernel), (1, stride, stride), (0, padding, padding)
        super().__init__(inputs, outputs, *sizes)
        self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last_3d)

    def forward(self, frames: Tensor) -> Tensor:
        weight, images = self.weight.squeeze(2), frames.permute(0, 3, 1, 2)
        out = F.conv2d(images, weight, self.bias, self.stride[1:], self.padding[1:])
        return out.permute(0, 2, 3, 1).contiguous()


class FrameConvTranspose(nn.ConvTranspose3d):
    """A transposed 1 x 4 x 4 convolution that doubles both sides, computed in 2-D."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, (1, 4, 4), (1, 2, 2), (0, 1, 1))
        self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last_3d)

    def forward(self, frames: Tensor) -> Tensor:
        weight, images = self.weight.squeeze(2), frames.permute(0, 3, 1, 2)
        out = F.conv_transpose2d(images, weight, self.bias, self.stride[1:], self.padding[1:])
        return out.permute(0, 2, 3, 1).contiguous()


class Pointwise(nn.Conv3d):
    """A 1 x 1 x 1 convolution, computed as a product of ``[..., C]``."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class Rows(nn.Module):
    """Weight and bias of a linear layer of the condition, computed with all the others at once.

    Not an ``nn.Linear``: nothing calls it, so hooks and adapters on it would have no effect.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        linear = nn.Linear(inputs, outputs)
        nn.init.xavier_uniform_(linear.weight)
        self.weight, self.bias = linear.weight, nn.Parameter(torch.zeros(outputs))


class Gain(nn.Module):
    """The gain of a norm over the channels, in the shape ``axes`` that a checkpoint has."""

    def __init__(self, *axes: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(axes))


class NormedConv(nn.Module):
    """Convolution, RMS norm, modulation, SiLU."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.proj = FrameConv(inputs, outputs, 3)
        self.norm = Gain(outputs, 1, 1, 1)

    def forward(self, frames: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        gain = self.norm.gamma.flatten()
        return rms_norm_modulate_silu(self.proj(frames), gain, scale, shift)


class ResBlock(nn.Module):
    """Two convolutions beside a shortcut; the first is modulated if there is a condition."""

    def __init__(self, inputs: int, outputs: int, condition_width: int | None):
        super().__init__()
        if condition_width is not None:
            self.mlp = nn.ModuleDict({"1": Rows(condition_width, 2 * outputs)})
        self.block1 = NormedConv(inputs, outputs)
        self.block2 = NormedConv(outputs, outputs)
        self.res_conv = Pointwise(inputs, outputs) if inputs != outputs else nn.Identity()

    @property
    def condition(self) -> Rows | None:
        """What makes its rows of the conditioning vector."""
        return self.mlp["1"] if hasattr(self, "mlp") else None

    def forward(self, frames: Tensor, rows: Tensor | None = None) -> Tensor:
        """``[R F, H, W, C_in]`` to ``[R F, H, W, C]``; rows ``[R, 2 C]``: scale, shift."""
        scale, shift = (None, None) if rows is None else rows.chunk(2, dim=1)
        h = self.block2(self.block1(frames, scale, shift), None, None)
        return h + self.res_conv(frames)


class DitAttention(nn.Module):
    """Attention whose heads are merged row-major: token i gathers H (head, token) pairs from H i.

    The published weights were trained so: the result ``[N, H, T, D]`` is read as ``[N, T, H D]`` as
    it lies in memory.
    """

    def __init__(self, width: int, heads: int, *, is_temporal: bool):
        super().__init__()
        self.heads, self.is_temporal = heads, is_temporal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, second_half: bool) -> Tensor:
        """``[N, T, C]`` to ``[N, T, C]``, or the second half of the tokens ``[N, T / 2, C]``."""
        qkv = self.qkv(tokens).unflatten(-1, (3, self.heads, -1))
        if second_half:  # row-major, the second half of the tokens is that of the heads
            qkv = qkv[:, :, :, self.heads // 2 :]
        if self.is_temporal:
            out = short_attention_qkv(qkv, merge="row_major")
        else:
            out = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        return self.proj(out.reshape(len(tokens), -1, tokens.shape[-1]))


class Mlp(nn.Module):
    """Four times as wide, tanh GELU, and back."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DitBlock(nn.Module):
    """Attention and MLP, modulated and gated: over the pixels of a frame or the frames of a pixel.

    ``second_half`` leaves out what belongs to the first half of the tokens of the output.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        condition_width: int,
        *,
        is_temporal: bool,
        second_half: bool = False,
    ):
        super().__init__()
        self.second_half = second_half
        self.attn = DitAttention(width, heads, is_temporal=is_temporal)
        self.mlp = Mlp(width)
        self.adaLN_modulation = nn.ModuleDict({"1": Rows(condition_width, MODULATIONS * width)})

    @property
    def condition(self) -> Rows:
        """What makes its rows of the conditioning vector."""
        return self.adaLN_modulation["1"]

    def forward(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """``[N, T, C]`` to ``[N, T, C]`` or ``[N, T / 2, C]``; rows ``[R, 6 C]``."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = rows.chunk(MODULATIONS, dim=1)
        normed = layer_norm_modulate(tokens, scale_a, shift_a, eps=DIT_NORM_EPS)
        mixed = self.attn(normed, self.second_half)
        if self.second_half:
            tokens = tokens[:, tokens.shape[1] // 2 :].contiguous()
        tokens = gated_residual(tokens, mixed, gate_a)
        normed = layer_norm_modulate(tokens, scale_m, shift_m, eps=DIT_NORM_EPS)
        return gated_residual(tokens, self.mlp(normed), gate_m)


class LegacyAttention(nn.Module):
    """Normed attention without biases in its matmuls and with the usual merge of heads.

    The nesting of its modules is that of a checkpoint's names.
    """

    def __init__(self, width: int, heads: int, head_width: int):
        super().__init__()
        self.heads, inner = heads, heads * head_width
        layers = {
            "to_qkv": nn.Linear(width, 3 * inner, bias=False),
            "to_out": nn.Linear(inner, width, bias=False),
        }
        attention = nn.ModuleDict({"fn": nn.ModuleDict(layers)})
        self.fn = nn.ModuleDict({"norm": Gain(1, width, 1, 1, 1), "fn": attention})

    @property
    def layers(self) -> nn.ModuleDict:
        """``to_qkv`` and ``to_out``."""
        return self.fn["fn"]["fn"]

    def _normed(self, frames: Tensor) -> Tensor:
        gain = self.fn["norm"].gamma.flatten()
        return F.layer_norm(frames, gain.shape, gain, eps=CHANNEL_NORM_EPS)

    def spatial(self, frames: Tensor) -> Tensor:
        """frames + attention between the pixels of each, ``[R F, H, W, C]``."""
        normed = self._normed(frames).flatten(1, 2)
        qkv = self.layers["to_qkv"](normed).unflatten(-1, (3, self.heads, -1))
        out = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        return frames + self.layers["to_out"](out.transpose(1, 2).flatten(2)).view_as(frames)

    def temporal(self, frames: Tensor, length: int, bias: Tensor) -> Tensor:
        """frames + attention between the ``length`` frames of every pixel, ``[R F, H, W, C]``.

        bias is ``[heads, F, F]``.
        """
        normed = pixels(self._normed(frames), length)
        qkv = self.layers["to_qkv"](normed).unflatten(-1, (3, self.heads, -1))
        out = self.layers["to_out"](short_attention_qkv(qkv, bias=bias))
        mixed = frames_of(out, *frames.shape[1:3])
        return (frames.unflatten(0, (-1, length)) + mixed).flatten(0, 1)
