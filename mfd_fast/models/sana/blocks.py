"""One SANA block: linear self-attention, attention to text, gated depthwise convolution.

Letters in shapes: R rows, T = height * width image tokens, C width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfd_fast.models.sana.attention import LinearSelfAttention, TextAttention
from mfd_fast.models.sana.config import SanaConfig
from mfd_fast.ops.gated_residual import gated_residual
from mfd_fast.ops.glu_depthwise import glu_depthwise
from mfd_fast.ops.layer_norm_modulate import layer_norm_modulate, residual_norm_modulate

MODULATIONS = 6  # shift, scale and gate of the self-attention, then of the convolution


class ConvWeights(nn.Module):
    """Weight and bias of a convolution that is computed as a product of tokens, or fused.

    Not an ``nn.Conv2d``: nothing calls it, so hooks and adapters on it would have no effect.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias

    def matrix(self) -> Tensor:
        """The weight as ``[out, in * kernel]``, a view."""
        return self.weight.flatten(1)


class GatedConvolution(nn.Module):
    """GLUMBConv: widen, SiLU, depthwise 3x3, gate, narrow; ``[R, T, C]`` to ``[R, T, C]``."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        both = 2 * hidden
        self.conv_inverted = ConvWeights(nn.Conv2d(width, both, 1))
        self.conv_depth = ConvWeights(nn.Conv2d(both, both, 3, padding=1, groups=both))
        self.conv_point = ConvWeights(nn.Conv2d(hidden, width, 1, bias=False))

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        wide = F.linear(x, self.conv_inverted.matrix())
        depth = self.conv_depth
        gated = glu_depthwise(
            wide, depth.weight, depth.bias, height, width, in_bias=self.conv_inverted.bias
        )
        return F.linear(gated, self.conv_point.matrix())


def finish(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The stream x with the branch that a block left to its successor, and its modulated norm."""
    if branch is None:
        return x, layer_norm_modulate(x, scale, shift, eps=eps)
    return residual_norm_modulate(x, branch, gate, scale, shift, eps=eps)


class SanaBlock(nn.Module):
    """One of the network's ``transformer_blocks``."""

    def __init__(self, config: SanaConfig):
        super().__init__()
        width, qk_norm = config.width, config.qk_norm is not None
        self.eps = config.norm_eps
        self.attn1 = LinearSelfAttention(
            config.num_attention_heads,
            config.attention_head_dim,
            bias=config.attention_bias,
            qk_norm=qk_norm,
        )
        self.attn2 = TextAttention(
            width,
            config.num_cross_attention_heads,
            config.cross_attention_head_dim,
            qk_norm=qk_norm,
        )
        self.ff = GatedConvolution(width, config.hidden)
        self.scale_shift_table = nn.Parameter(torch.randn(MODULATIONS, width) / width**0.5)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        keys_values: Tensor,
        bias: Tensor | None,
        height: int,
        width: int,
        branch: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The stream ``[R, T, C]``, the branch and the gate ``[R, C]`` that are still to be added.

        They are None where gradients are recorded: a policy would keep both for every block.

        Args:
            modulation: ``[R, 6, C]``, the block's table added to the time's rows.
            keys_values, bias: of the text (``TextAttention``).
            branch, gate: what the block before left.
        """
        shift_a, scale_a, gate_a, shift_c, scale_c, gate_c = modulation.unbind(1)
        x, normed = finish(x, branch, gate, scale_a, shift_a, self.eps)
        mixed, out_bias = self.attn1(normed)
        x = gated_residual(x, mixed, gate_a, out_bias)
        read, out_bias = self.attn2(x, keys_values, bias)
        x, normed = residual_norm_modulate(
            x, read, None, scale_c, shift_c, bias=out_bias, eps=self.eps
        )
        convolved = self.ff(normed, height, width)
        if torch.is_grad_enabled():
            return gated_residual(x, convolved, gate_c), None, None
        return x, convolved, gate_c
