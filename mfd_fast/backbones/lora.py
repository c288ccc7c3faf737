"""The parts of an AdapterBank: a target layer, an adapter's flat storage, and y += s B A x.

A target is an ``nn.Linear`` or a 1x1 ``nn.Conv2d``; both are seen as matrices ``[rows, P, in]``.
Without gradients y is updated in place: two matmuls and nothing else, on strided views of
the rows concerned.  With gradients the same two matmuls, out of place.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from mfd_fast.backbones.quantized import FrozenLinear


@dataclass(frozen=True)
class Target:
    """A layer that gets factors A ``[r, in_features]`` and B ``[out_features, r]``."""

    name: str
    module: nn.Linear | nn.Conv2d
    in_features: int
    out_features: int
    is_conv: bool

    @staticmethod
    def of(name: str, module: nn.Module) -> "Target":
        """``ValueError`` if the layer is neither linear nor a plain 1x1 convolution."""
        if isinstance(module, nn.Linear):
            return Target(name, module, module.in_features, module.out_features, is_conv=False)
        if isinstance(module, nn.Conv2d) and _is_pointwise(module):
            return Target(name, module, module.in_channels, module.out_channels, is_conv=True)
        what = type(module).__name__ if [*module.children()] else module
        raise ValueError(
            "an adapter's target must be nn.Linear or a 1x1 nn.Conv2d with groups 1, stride 1 and "
            f"no padding; {name} is {what}. Narrow the targets"
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight, whatever it is stored as."""
        is_frozen = isinstance(self.module, FrozenLinear)
        return self.module.dtype if is_frozen else self.module.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        is_frozen = isinstance(self.module, FrozenLinear)
        return (self.module.stored if is_frozen else self.module.weight).device

    def own_weight(self) -> nn.Parameter:
        """The weight that a merge changes; ``ValueError`` if the layer computes it from others."""
        weight = self.module._parameters.get("weight")
        if weight is None:
            raise ValueError(
                f"the weight of {self.name} is computed (quantised, a parametrization or "
                "weight_norm), so nothing can be merged into it: remove that first "
                '(nn.utils.parametrize.remove_parametrizations(layer, "weight")), or keep the '
                "adapter apart (adapter_state_dict)"
            )
        return weight

    def repeat(self, length: int, rows: int | None, num_lanes: int) -> int:
        """repeat of an input of ``length`` = n * L * repeat rows; ``rows``: n * L, if known."""
        known = length if rows is None else rows
        if known % num_lanes or length % known:
            raise ValueError(
                f"{self.name} got {length} rows; with {num_lanes} lanes it must get n * "
                f"{num_lanes}{'' if rows is None else f' = {rows}, or a multiple'}"
            )
        return length // known


def _is_pointwise(conv: nn.Conv2d) -> bool:
    no_padding = conv.padding in ((0, 0), "valid", "same")
    return conv.kernel_size == conv.stride == (1, 1) and conv.groups == 1 and no_padding


class _Unpack(torch.autograd.Function):
    """A flat vector as the matrices packed in it; the backward is one concatenation.

    ``split_with_sizes`` would fill one tensor with zeros for every matrix that was not used, e.g.
    those of keys and values that were prepared in another call.
    """

    @staticmethod
    def forward(ctx: Any, flat: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        ctx.sizes = sizes
        ctx.set_materialize_grads(False)
        return flat.split_with_sizes(sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        given = next((grad for grad in grads if grad is not None), None)
        if given is None:
            return None, None
        unused = [size for size, grad in zip(ctx.sizes, grads, strict=True) if grad is None]
        zeros = given.new_zeros(max(unused, default=0))
        parts = zip(ctx.sizes, grads, strict=True)
        return torch.cat([zeros[:size] if grad is None else grad for size, grad in parts]), None


class Adapter(nn.Module):
    """Factors of all targets in one flat vector A_0, B_0, A_1, B_1, ...

    ``master`` is the parameter: float32 (float64 under a float64 network), or the model's dtype if
    the adapter is frozen.  ``working`` is its copy in the model's dtype; None where the master
    itself has that dtype.
    """

    def __init__(self, targets: list[Target], *, rank: int, alpha: float, is_trained: bool):
        super().__init__()
        self.rank, self.scale = rank, alpha / rank
        pairs = (((rank, t.in_features), (t.out_features, rank)) for t in targets)
        self.shapes = [shape for pair in pairs for shape in pair]
        self.sizes = [rows * columns for rows, columns in self.shapes]
        model = targets[0].dtype
        dtype = torch.promote_types(model, torch.float32) if is_trained else model
        flat = torch.zeros(sum(self.sizes), dtype=dtype, device=targets[0].device)
        self.master = nn.Parameter(flat, requires_grad=is_trained)
        working = None if dtype == model else flat.to(model)
        self.register_buffer("working", working, persistent=False)
        self.factors = self._views()

    def initialise(self, generator: Generator | None) -> None:
        """A ~ N(0, 1/r^2), B = 0; draws on the generator's device, target by target."""
        device = self.master.device if generator is None else generator.device
        for a, b in self.split(self.master.detach()):
            a.copy_(torch.randn(a.shape, generator=generator, device=device) / self.rank)
            b.zero_()
        self.refresh()

    def split(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(A ``[r, in]``, B ``[out, r]``) of every target, views of ``flat``."""
        return self._paired(flat.split_with_sizes(self.sizes))

    def factors_with_grad(self) -> list[tuple[Tensor, Tensor]]:
        """The factors in the model's dtype, leading to the master: one cast, one split."""
        dtype = self.master.dtype if self.working is None else self.working.dtype
        return self._paired(_Unpack.apply(self.master.to(dtype), self.sizes))

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the master into ``working``, in place."""
        if self.working is not None:
            self.working.copy_(self.master)

    def _paired(self, parts: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
        matrices = [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return list(zip(matrices[::2], matrices[1::2], strict=True))

    def _views(self) -> list[tuple[Tensor, Tensor]]:
        return self.split(self.master.detach() if self.working is None else self.working)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "factors"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy gets views of its own storage."""
        super().__setstate__(state)
        self.factors = self._views()

    def _apply(self, fn: Any, recurse: bool = True) -> "Adapter":
        """Moving or casting makes new storage, so the views are made again."""
        super()._apply(fn, recurse)
        self.factors = self._views()
        return self


class Given(NamedTuple):
    """What a target adds in one call: (A, B, scale, lanes or None for all) of every adapter; its
    input has n * num_lanes * repeat rows.
    """

    target: Target
    runs: tuple[tuple[Tensor, Tensor, float, tuple[int, ...] | None], ...]
    num_lanes: int
    repeat: int

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """y, the target's result of x, plus the adapters."""
        for a, b, scale, lanes in self.runs:
            if lanes is None:
                y = add_to_rows(self.target, x, y, a, b, scale)
            else:
                n = len(x) // (self.num_lanes * self.repeat)
                split = (n, self.num_lanes, self.repeat)
                y = add_to_lanes(self.target, x, y, a, b, scale, lanes, split)
        return y


def add_to_rows(target: Target, x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """y + scale B A x for all rows; y itself, updated, where that is allowed."""
    if target.is_conv:
        if _is_in_place(target, y, b):
            positions = y.shape[-2] * y.shape[-1]
            _accumulate(_conv_matrices(x, positions), _conv_matrices(y, positions), a, b, scale)
            return y
        inner = F.conv2d(x, a[:, :, None, None])
        return torch.add(y, F.conv2d(inner, b[:, :, None, None]), alpha=scale)
    if _is_in_place(target, y, b):
        if x.ndim == 3 and not x.is_contiguous():
            _accumulate(x, y, a, b, scale)
        else:
            rows = x.reshape(-1, target.in_features)
            _accumulate(rows, y.view(-1, target.out_features), a, b, scale)
        return y
    rows = x.reshape(-1, target.in_features)
    out = y.reshape(-1, target.out_features)
    return torch.addmm(out, torch.mm(rows, a.t()), b.t(), alpha=scale).view(y.shape)


def add_to_lanes(
    target: Target,
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    lanes: tuple[int, ...],
    split: tuple[int, int, int],
) -> Tensor:
    """y + scale B A x on the rows of ``lanes``; x and y have n * L * repeat = ``split`` rows."""
    n, num_lanes, repeat = split
    if not _is_in_place(target, y, b):
        parts = list(y.unflatten(0, split).unbind(1))
        inputs = x.unflatten(0, split)
        for lane in lanes:
            rows, out = inputs[:, lane].flatten(0, 1), parts[lane].flatten(0, 1)
            parts[lane] = add_to_rows(target, rows, out, a, b, scale).unflatten(0, (n, repeat))
        return torch.stack(parts, dim=1).flatten(0, 2)
    if target.is_conv:
        positions = y.shape[-2] * y.shape[-1]
        size = (n, num_lanes * repeat)
        x_rows = _conv_matrices(x, positions).unflatten(0, size)
        y_rows = _conv_matrices(y, positions).unflatten(0, size)
        places = [lane * repeat + k for lane in lanes for k in range(repeat)]
    else:
        x_rows = x.reshape(n, num_lanes, -1, target.in_features)
        y_rows = y.view(n, num_lanes, -1, target.out_features)
        places = lanes
    for place in places:
        _accumulate(x_rows[:, place], y_rows[:, place], a, b, scale)
    return y


def _conv_matrices(x: Tensor, positions: int) -> Tensor:
    """``[rows, C, H, W]`` as ``[rows, P, C]``, a view of either memory format."""
    return x.reshape(x.shape[0], x.shape[1], positions).transpose(1, 2)


def _is_in_place(target: Target, y: Tensor, b: Tensor) -> bool:
    """No gradient, no autocast, and y can be seen as matrices without copying it."""
    device = y.device.type
    is_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if torch.is_grad_enabled() or is_autocast or y.dtype != b.dtype:
        return False
    channels_last = target.is_conv and y.is_contiguous(memory_format=torch.channels_last)
    return y.is_contiguous() or channels_last


def _accumulate(x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """y += scale (x A^T) B^T in place; x ``[..., in]`` and y ``[..., out]`` of 2 or 3 dimensions.

    Strides are free, so the rows of one lane are not copied; a single sample or a single position
    is one matrix, not a batch.
    """
    if x.ndim == 3 and x.shape[0] == 1:
        x, y = x[0], y[0]
    elif x.ndim == 3 and x.shape[1] == 1:
        x, y = x[:, 0], y[:, 0]
    if x.ndim == 2:
        y.addmm_(torch.mm(x, a.t()), b.t(), alpha=scale)
        return
    batch = x.shape[0]
    inner = torch.bmm(x, a.t().expand(batch, -1, -1))
    y.baddbmm_(inner, b.t().expand(batch, -1, -1), alpha=scale)
