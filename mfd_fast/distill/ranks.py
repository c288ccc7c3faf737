"""Several processes, one run: the ranks that torchrun starts.

A batch of conditions, noise and times is that of the whole run; rank i of n takes its rows i,
i + n, i + 2n, ...  Every rank draws all random numbers and keeps its rows, so that what a run
learns from does not depend on how many ranks share the work.  Rows are interleaved because a solver
table is sorted by length: every rank gets trajectories of about the same number of steps.

    replicas   every rank holds the model; the gradients of a role are views of one flat buffer,
               which one all-reduce adds up before the optimizer's step
    fsdp       networks too large for one device.  Full copies: ``fully_shard`` spreads parameters,
               gradients and optimizer state; it averages the gradients itself.  A shared frozen
               network: its parameters alone are spread, the adapters are replicas
"""

import os
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from mfd_fast.backbones.lanes import ROLES, Backbone
from mfd_fast.flow.solvers import SolverTable

ALIGNMENT = 64  # elements: every view of a flat buffer starts aligned for vector loads


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; alone by default.

    rank, world: this process and how many there are.
    control: gloo group for host values, which never waits for a device; None: the default group.
    is_sharded: networks are spread over the ranks (fsdp), which then evaluate together.
    """

    rank: int = 0
    world: int = 1
    control: Any = field(default=None, repr=False)
    is_sharded: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this rank logs, writes and evaluates."""
        return self.rank == 0

    def check_batch(self, batch_size: int, micro_batches: int) -> None:
        """``ValueError`` unless every part of the batch divides into equal shares."""
        if batch_size % (micro_batches * self.world):
            raise ValueError(
                f"train.batch_size must be a multiple of {self.world} ranks x "
                f"distill.micro_batches={micro_batches}, got {batch_size}"
            )

    def rows(self, tree: Any) -> Any:
        """This rank's rows of a pytree of tensors ``[B * world, ...]``."""
        if self.world == 1:
            return tree
        return tree_map(lambda leaf: leaf[self.rank :: self.world].contiguous(), tree)

    def whole(self, rows: Tensor) -> Tensor:
        """``[B * world, ...]`` of which every rank has its rows; a collective call."""
        if self.world == 1:
            return rows
        every = [torch.empty_like(rows) for _ in range(self.world)]
        dist.all_gather(every, rows.contiguous())
        return torch.stack(every, dim=1).flatten(0, 1)

    def table(self, table: SolverTable) -> SolverTable:
        """This rank's trajectories of the table of the whole batch.

        Sharded ranks evaluate together: the one that has arrived takes a sample that stands still
        along, until all have arrived.
        """
        if self.world == 1:
            return table
        if table.order is not None:
            raise ValueError(
                "the objective's table must be assigned to samples in its own order on several "
                "ranks; call assigned_in_order() in draw"
            )
        mine = [len(range(self.rank, active, self.world)) for active in table.active]
        active = tuple(max(n, 1) if self.is_sharded else n for n in mine if n or self.is_sharded)
        steps = len(active)
        return replace(
            table,
            times=self._columns(table.times[:steps]),
            coef=self._columns(table.coef[:steps]),
            active=active,
            span=self.rows(table.span),
            start_weight=self.rows(table.start_weight),
        )

    def _columns(self, values: Tensor) -> Tensor:
        return values[:, self.rank :: self.world].contiguous()

    def mean(self, values: list[float]) -> list[float]:
        """The mean over ranks of host numbers; a collective call."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return (total / self.world).tolist()

    def of_all(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Device tensors ``[]`` of all ranks, each ``[world]``, bit for bit; nobody waits for them.

        Alone: the tensors themselves.  A collective call; :meth:`own` takes a rank's back.
        """
        if self.world == 1:
            return tensors
        mine = torch.stack([value.double() for value in tensors.values()])
        every = mine.new_zeros(self.world, len(mine))
        every[self.rank] = mine
        dist.all_reduce(every)
        return {
            name: column.to(value.dtype)
            for (name, value), column in zip(tensors.items(), every.unbind(1), strict=True)
        }

    def own(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's of what :meth:`of_all` gave; the mean, if it was another number of ranks."""
        return {
            name: value[self.rank] if value.shape == (self.world,) else value.mean()
            for name, value in tensors.items()
        }

    def gather(self, values: Tensor) -> list[Tensor]:
        """Equally shaped CPU tensors of all ranks, in their order; a collective call."""
        if self.world == 1:
            return [values]
        gathered = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(gathered, values, group=self.control)
        return gathered

    def broadcast_text(self, text: str) -> str:
        """Rank 0's string on every rank; a collective call."""
        if self.world == 1:
            return text
        data = torch.tensor(list(text.encode()), dtype=torch.uint8)
        size = torch.tensor([len(data)])
        dist.broadcast(size, 0, group=self.control)
        data = data if self.is_main else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, 0, group=self.control)
        return bytes(data.tolist()).decode()

    def align(self, tensors: list[Tensor]) -> None:
        """Give every replica rank 0's weights and buffers; a collective call."""
        for tensor in tensors if self.world > 1 else ():
            if not is_sharded(tensor):
                dist.broadcast(tensor.data, 0)


def ranks_of(backbone: Backbone) -> Ranks:
    """This process among those of ``torch.distributed``, for a loop that has initialised it.

    Alone if it is not initialised.  ``ValueError`` if several processes were launched and it is
    not, or if it cannot reach the backbone's device.
    """
    device = backbone.device.type
    if device == "meta":
        return Ranks()
    if not (dist.is_available() and dist.is_initialized()):
        launched = int(os.environ["WORLD_SIZE"]) if is_launched() else 1
        if launched > 1:
            raise ValueError(
                f"{launched} processes were launched, and each would train a student of its own: "
                "call torch.distributed.init_process_group() before Distiller, or pass "
                "ranks=Ranks() if that is meant"
            )
        return Ranks()
    rank, world, backends = dist.get_rank(), dist.get_world_size(), dist.get_backend_config()
    if world > 1 and f"{device}:" not in backends:
        raise ValueError(
            f"torch.distributed was initialised with {backends}, which does not reach a backbone "
            f"on {device}: call init_process_group with gloo for a CPU and nccl for GPUs, or move "
            "the network first"
        )
    weights = [p for role in ROLES for p in backbone.parameters_of(role)]
    weights += backbone.parameters() if isinstance(backbone, nn.Module) else []
    return Ranks(rank, world, is_sharded=world > 1 and any(map(is_sharded, weights)))


class FlatGradients:
    """The gradients of some parameters as views of one buffer (one per dtype).

    Autograd adds into the views, so an all-reduce needs no copies, and its addresses stay: it may
    be captured.  A parameter that no loss reaches has a gradient of zeros here, not None.  A loop
    that puts other gradients in the views' place (``zero_grad`` sets None) costs a copy.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        self.buffers = []
        self.views: list[tuple[nn.Parameter, Tensor]] = []
        for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
            members = [parameter for parameter in parameters if parameter.dtype == dtype]
            sizes = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in members]
            flat = torch.zeros(sum(sizes), dtype=dtype, device=members[0].device)
            for parameter, part in zip(members, flat.split(sizes), strict=True):
                strides = torch.empty_like(parameter, device="meta").stride()  # channels-last too
                parameter.grad = part[: parameter.numel()].as_strided(parameter.shape, strides)
                self.views.append((parameter, parameter.grad))
            self.buffers.append(flat)

    def all_reduce(self) -> None:
        """Add up the gradients of all ranks, in place."""
        for parameter, view in self.views:
            if parameter.grad is not view:
                view.zero_() if parameter.grad is None else view.copy_(parameter.grad)
                parameter.grad = view
        for flat in self.buffers:
            dist.all_reduce(flat)


def placed_like(value: Tensor, target: Tensor) -> Tensor:
    """A whole tensor as this rank's part of it if the target is sharded, in the target's layout.

    Files keep no strides, and a fused optimizer walks a weight and its moments in memory order: of
    a channels-last weight they must be channels-last too.
    """
    if not is_sharded(target):
        is_like = value.shape == target.shape and value.stride() != target.stride()
        return torch.empty_like(target, dtype=value.dtype).copy_(value) if is_like else value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        value.to(target.device), target.device_mesh, target.placements, src_data_rank=None
    )


def placed_state(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state with whole tensors cut to the pieces of sharded parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    placed = {
        index: {
            key: placed_like(value, parameters[index])
            if torch.is_tensor(value) and value.shape == parameters[index].shape
            else value
            for key, value in entry.items()
        }
        for index, entry in state["state"].items()
    }
    return {**state, "state": placed}


def local(tensors: list[Tensor]) -> list[Tensor]:
    """What of the tensors lies in this process: the pieces of sharded ones."""
    return [x.to_local() if is_sharded(x) else x for x in tensors]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, told without importing that class."""
    return hasattr(tensor, "to_local")


def is_launched() -> bool:
    """Whether torchrun (or anything that sets its variables) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ
