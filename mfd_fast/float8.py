"""FP8 for lanes without gradient: the frozen network's large products in e4m3.  Off by default.

    y = (x8 w8^T) sx sw + b        x8, sx: x by rows, at every call;  w8, sw: the weight, once

Only products: adapters, norms, attentions, biases and everything between them keep the network's
dtype, and so does every call with gradients.  A copy of a weight takes 1 byte a number, beside the
2 of bf16 that the calls with gradient read.

Which products: K terms, M rows and N outputs cost 2 M K N operations, and quantising x moves 3 M K
bytes.  An H100 (798 TFLOP/s of bf16 measured, fp8 taken as twice that, 3.0 TB/s) saves
M K N / 798e12 seconds and spends 3 M K / 3.0e12, so N must be above 798; with fewer than
798 / 3.0 = 266 rows or terms a product waits for its weight or its result and not for its
operations.  Not measured on a GPU.  Only products of tokens ``[R, T, K]``: what has one row a
sample or a time, ``[R, K]`` (time embeddings, tables of them), decides about all tokens and costs
little.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from mfd_fast.backbone import Backbone, batch_size
from mfd_fast.distiller import Distiller
from mfd_fast.integrate import integrate
from mfd_fast.ops.modulation import MAX_CHANNELS
from mfd_fast.ops.quantize_rows import quantize_rows
from mfd_fast.shared_backbone import SharedBackbone
from mfd_fast.solvers import plan

MIN_OUTPUTS = 798
MIN_SIDE = 266
MULTIPLE = 16  # of terms and outputs: what the device's products take
MIN_CAPABILITY = (8, 9)  # Ada, Hopper, Blackwell
TURN_OFF = "or turn it off: --train.no-float8"


class Rows(NamedTuple):
    """A matrix by rows: values ``[M, K]`` e4m3, scale ``[M, 1]`` float32."""

    values: Tensor
    scale: Tensor


def product(x: Rows, weight: Rows, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x W^T + bias in ``dtype``: ``[M, N]``, sums in float32.

    On a CPU the same numbers are multiplied in float32, slowly.
    """
    if x.values.device.type == "cpu":
        return reference_product(x, weight, bias, dtype)
    return torch._scaled_mm(
        x.values,
        weight.values.t(),
        scale_a=x.scale,
        scale_b=weight.scale.t(),
        bias=bias,
        out_dtype=dtype,
    )


def reference_product(x: Rows, weight: Rows, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """:func:`product` on any device."""
    y = (x.values.float() @ weight.values.float().t()) * x.scale * weight.scale.t()
    return (y if bias is None else y + bias).to(dtype)


class Float8Products(TorchFunctionMode):
    """Inside the block ``F.linear`` without gradients takes e4m3 copies of frozen weights.

    Args:
        network: its frozen parameters are what is copied, each at the first call that pays: before
            a graph is captured, and never again.  They must not change afterwards.
        min_side, min_outputs: least rows and terms, and least outputs, of a product that pays.

    ``copies``: (storage, offset, shape) of a weight -> its copy.  Nothing is read back from the
    device and no shape depends on a value, so the block can be captured.  Not captured, every call
    of torch in the block passes through Python once more.
    """

    def __init__(self, network: nn.Module, *, min_side: int, min_outputs: int):
        super().__init__()
        self.min_side, self.min_outputs = min_side, min_outputs
        self.frozen = [p.detach() for p in network.parameters() if not p.requires_grad]
        self.copies: dict[tuple, Rows] = {}
        self._storages = {p.untyped_storage()._cdata for p in self.frozen}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        if func is F.linear and not torch.is_grad_enabled():
            return self.linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``F.linear``, in e4m3 if it pays."""
        if not self._pays(input, weight):
            return F.linear(input, weight, bias)
        rows = Rows(*quantize_rows(input.reshape(-1, input.shape[-1]).contiguous()))
        y = product(rows, self._copy_of(weight), bias, input.dtype)
        return y.unflatten(0, input.shape[:-1])

    def _pays(self, x: Tensor, weight: Tensor) -> bool:
        outputs, terms = weight.shape
        return (
            x.ndim > 2
            and outputs >= self.min_outputs
            and terms >= self.min_side
            and x.numel() >= self.min_side * terms
            and outputs % MULTIPLE == terms % MULTIPLE == 0
            and terms <= MAX_CHANNELS
            and x.dtype == weight.dtype
            and weight.untyped_storage()._cdata in self._storages
        )

    def _copy_of(self, weight: Tensor) -> Rows:
        key = (weight.untyped_storage()._cdata, weight.storage_offset(), weight.shape)
        if key not in self.copies:
            self.copies[key] = Rows(*quantize_rows(weight.detach().contiguous()))
        return self.copies[key]


def use_float8(
    backbone: Backbone, *, min_side: int = MIN_SIDE, min_outputs: int = MIN_OUTPUTS
) -> Float8Products:
    """Evaluate lanes without gradient in e4m3 from now on; returns what does it.

    To be called when the network is where it will run, and again if its frozen weights change.
    ``ValueError`` for a backbone of full copies, whose weights are trained, and for a device or
    dtype without such products.
    """
    if not isinstance(backbone, SharedBackbone):
        raise ValueError(
            "float8 keeps copies of frozen weights, so it needs a SharedBackbone (adapters on one "
            f"network); got {type(backbone).__name__}, whose weights are trained: distil adapters, "
            f"{TURN_OFF}"
        )
    check_device(backbone.device, next(backbone.network.parameters()).dtype)
    backbone.float8 = Float8Products(backbone.network, min_side=min_side, min_outputs=min_outputs)
    return backbone.float8


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """``ValueError`` if a network of ``dtype`` cannot be evaluated in e4m3 there."""
    if dtype == torch.float64:
        raise ValueError(f"float8 stands in for at most 32 bits; got {dtype}: cast, {TURN_OFF}")
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        raise ValueError(
            f"float8 needs a GPU of compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or "
            f"newer; {torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}: "
            f"take another one, {TURN_OFF}"
        )
    if dtype != torch.bfloat16:
        raise ValueError(f"float8 needs a bfloat16 network on a GPU; got {dtype}: cast, {TURN_OFF}")


@contextmanager
def without_float8(backbone: SharedBackbone) -> Iterator[None]:
    """Inside the block the backbone is evaluated in its own dtype."""
    products, backbone.float8 = backbone.float8, None
    try:
        yield
    finally:
        backbone.float8 = products


@torch.no_grad()
def velocity_error(distiller: Distiller, cond: Any, *, r: float = 0.0) -> dict[str, float]:
    """``|u8 - u| / |u|`` of the mean velocities from noise (t = 1) to r, over all samples of cond.

    u is integrated in the network's dtype and u8 in e4m3, from the same noise, with the solver and
    steps of the run: of the guided ``teacher`` and of the ``auxiliary`` as they are now.  Draws
    nothing from the distiller's generators.  Waits for the device.

    ``ValueError`` if float8 is off, or no product of the network is large enough for it.
    """
    backbone, config, objective = distiller.backbone, distiller.config, distiller.objective
    products = getattr(backbone, "float8", None)
    if products is None:
        raise ValueError("float8 is off: call use_float8(backbone) first")
    prepared = backbone.prepare(cond)
    interval = torch.ones(prepared.batch), torch.full((prepared.batch,), r)
    table = plan(
        *interval, step_size=config.step_size, solver=config.solver, grid=config.grid or None
    ).to(backbone.device)
    generator = Generator().manual_seed(config.seed)
    noise = torch.randn(prepared.batch, *backbone.sample_shape, generator=generator)
    starts = objective.starts(noise.to(backbone.device))

    def displacement() -> Tensor:
        ends = integrate(
            lambda x, t: objective.velocity(backbone, prepared, x, t),
            starts,
            table,
            guidance=config.guidance,
            num_lanes=len(objective.lanes),
            dtype=backbone.dtype,
        )
        return starts - ends  # (t - r) u

    rounded = displacement()
    if not products.copies:
        raise ValueError(
            "float8 changes nothing here: no product has "
            f"{products.min_side} rows and terms and {products.min_outputs} outputs; turn it off: "
            "--train.no-float8"
        )
    with without_float8(backbone):
        exact = displacement()
    difference = (rounded - exact).transpose(0, 1).flatten(1).norm(dim=1)
    errors = difference / exact.transpose(0, 1).flatten(1).norm(dim=1)
    return dict(zip(("teacher", "auxiliary"), errors.tolist(), strict=True))


def described(distiller: Distiller, cond: Any) -> str:
    """:func:`velocity_error` of the first solver step in words, of the samples of cond that a step
    evaluates at once: two evaluations of the network, not two trajectories.
    """
    parts = distiller.ranks.world * distiller.config.micro_batches
    size = max(1, batch_size(cond) // parts)
    step = max(distiller.config.step_size, 1 / (distiller.config.grid or math.inf))
    rows = tree_map(lambda leaf: leaf[:size], cond)
    errors = velocity_error(distiller, rows, r=max(0.0, 1.0 - step))
    copies = distiller.backbone.float8.copies.values()
    size = sum(math.prod(copy.values.shape) + 4 * len(copy.scale) for copy in copies)
    listed = ", ".join(f"{role} {error:.2%}" for role, error in errors.items())
    return (
        f"{len(copies)} weights in e4m3, {size / 1e6:.3g} MB; error of the velocity at the "
        f"noise, the first step: {listed}"
    )
