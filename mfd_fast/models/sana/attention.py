"""SANA's two attentions on channels-last tokens: linear over the image, softmax over the text.

Letters in shapes: R rows, T image tokens, L text tokens, C width, H heads, D width of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfd_fast.backbones.adapters import AdapterBank
from mfd_fast.models.sana.adapter_groups import AdapterGroup
from mfd_fast.models.sana.packing import PackedModule, joined, share_storage
from mfd_fast.ops.linear_attention import linear_attention

QK_NORM_EPS = 1e-5  # diffusers' Attention


class Gain(nn.Module):
    """The weight of an RMS norm over all channels; the norm itself is :meth:`forward`."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Projections(PackedModule):
    """to_q, to_k, to_v; those that share an input are computed in one product.

    ``GROUPS`` says which.  Adapters are added by group once :meth:`group_adapters` got their bank;
    a layer with any other forward hook, or put in place of one, is called by itself.
    """

    GROUPS: tuple[tuple[str, ...], ...]
    DERIVED = ("_weights", "_biases")

    def __init__(self, *, inputs: int, outputs: int, out: int, bias: bool, qk_norm: bool):
        super().__init__()
        self.to_q = nn.Linear(inputs, outputs, bias=bias)
        self.to_k = nn.Linear(inputs, outputs, bias=bias)
        self.to_v = nn.Linear(inputs, outputs, bias=bias)
        self.norm_q = Gain(outputs, QK_NORM_EPS) if qk_norm else None
        self.norm_k = Gain(outputs, QK_NORM_EPS) if qk_norm else None
        self.to_out = nn.ModuleList([nn.Linear(outputs, out)])
        self._adapters: dict[tuple[str, ...], AdapterGroup] = {}
        self.pack()

    def pack(self) -> None:
        """Lay the weights of every group side by side."""
        self._weights, self._biases = {}, {}
        for names in self.GROUPS:
            layers = [getattr(self, name) for name in names]
            if any(type(layer) is not nn.Linear for layer in layers):
                continue
            self._weights[names] = share_storage([layer.weight for layer in layers])
            if layers[0].bias is not None:
                self._biases[names] = share_storage([layer.bias for layer in layers])

    def group_adapters(self, bank: AdapterBank, rows: dict) -> None:
        """Add the adapters of the bank's targets by group; ``rows`` is shared by all groups."""
        groups = {names: [getattr(self, name) for name in names] for names in self.GROUPS}
        found = {names: AdapterGroup.of(bank, group, rows) for names, group in groups.items()}
        self._adapters = {names: group for names, group in found.items() if group is not None}

    def project(self, names: tuple[str, ...], x: Tensor) -> Tensor:
        """The outputs of the layers of a group side by side, ``[R, T, G * out]``."""
        layers = [getattr(self, name) for name in names]
        adapters = self._adapters.get(names)
        if adapters is None and any(
            type(layer) is not nn.Linear or layer._forward_hooks for layer in layers
        ):
            return torch.cat([layer(x) for layer in layers], dim=-1)
        bias = None
        if layers[0].bias is not None:
            bias = joined([layer.bias for layer in layers], self._biases[names])
        y = F.linear(x, joined([layer.weight for layer in layers], self._weights[names]), bias)
        return y if adapters is None else adapters.add(x, y)

    def output(self, mixed: Tensor) -> tuple[Tensor, Tensor | None]:
        """The output projection ``[R, T, C]``, and its bias if that is still to be added."""
        out = self.to_out[0]
        if type(out) is not nn.Linear or out._forward_hooks:
            return out(mixed), None
        return F.linear(mixed, out.weight), out.bias


class LinearSelfAttention(Projections):
    """ReLU linear attention of all image tokens."""

    GROUPS = (("to_q", "to_k", "to_v"),)

    def __init__(self, heads: int, head_width: int, *, bias: bool, qk_norm: bool):
        width = heads * head_width
        super().__init__(inputs=width, outputs=width, out=width, bias=bias, qk_norm=qk_norm)
        self.heads = heads

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``[R, T, C]`` to ``[R, T, C]``, and the bias that is still to be added."""
        qkv = self.project(self.GROUPS[0], x).unflatten(2, (3, -1))
        q, k, v = qkv.unbind(2)
        if self.norm_q is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        return self.output(linear_attention(*(y.unflatten(2, (self.heads, -1)) for y in (q, k, v))))


class TextAttention(Projections):
    """Softmax attention of image tokens to text tokens."""

    GROUPS = (("to_q",), ("to_k", "to_v"))

    def __init__(self, width: int, heads: int, head_width: int, *, qk_norm: bool):
        inner = heads * head_width
        super().__init__(inputs=width, outputs=inner, out=width, bias=True, qk_norm=qk_norm)
        self.heads = heads

    def keys_values(self, text: Tensor) -> Tensor:
        """Keys and values of projected text ``[R, L, C]``, side by side: ``[R, L, 2 * H * D]``."""
        both = self.project(self.GROUPS[1], text)
        if self.norm_k is None:
            return both
        k, v = both.chunk(2, dim=-1)
        return torch.cat([self.norm_k(k), v], dim=-1)

    def forward(
        self, x: Tensor, keys_values: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What x ``[R, T, C]`` reads, and the bias that is still to be added.

        The argument bias ``[R, 1, 1, L]`` is added to the scores.
        """
        q = self.project(self.GROUPS[0], x)
        q = q if self.norm_q is None else self.norm_q(q)
        k, v = keys_values.chunk(2, dim=-1)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        return self.output(softmax_attention(q, k, v, bias).transpose(1, 2).flatten(2))


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """``softmax(q k^T / sqrt(D) + bias) v``, ``[R, H, T, D]``, in one operator.

    Args:
        q: ``[R, H, T, D]``; k, v: ``[R, H, L, D]``.
        bias: ``[R, 1, 1, L]`` in their dtype, its rows aligned to 8 elements, or None.

    With a bias a GPU has one fused operator for it, named here because PyTorch's own choice on
    tensors without storage (where launches are counted) is the unfused one.
    """
    is_named = q.device.type == "meta" or (q.device.type == "cuda" and bias is not None)
    if not is_named or q.dtype == torch.float64:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    if bias is not None:
        bias = bias.expand(*q.shape[:3], k.shape[2])
    keeps_sums = torch.is_grad_enabled() and any(y.requires_grad for y in (q, k, v))
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, keeps_sums)[0]
