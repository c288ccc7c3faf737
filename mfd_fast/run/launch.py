"""The ranks that torchrun starts: joining them, spreading a model over them, and their votes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mfd_fast.backbones.lanes import ROLES, Backbone, CopiedBackbone
from mfd_fast.backbones.shared import SharedBackbone
from mfd_fast.distill.ranks import Ranks, is_launched


@contextmanager
def launched_ranks(device: str, *, is_sharded: bool = False) -> Iterator[Ranks]:
    """Join the ranks that torchrun started, for the length of the block; alone without torchrun.

    Args:
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``; NCCL on a GPU, one per local rank, else gloo.
    """
    if not is_launched():
        if is_sharded:
            raise ValueError(
                "train.shard fsdp spreads a model over ranks, but torchrun did not start this "
                "process; type torchrun --nproc-per-node N -m mfd_fast distill ..."
            )
        yield Ranks()
        return
    store, rank, world = next(dist.rendezvous("env://"))
    # torchrun may keep one store over restarts: addresses of dead ranks must not be found in it.
    # Where it does not, a node that was launched again joins ranks that counted a restart.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.PrefixStore(f"start-{num_restarts()}", store)
    joining: dict[str, Any] = {"store": store, "rank": rank, "world_size": world}
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        index = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(index)
        dist.init_process_group("nccl", device_id=torch.device("cuda", index), **joining)
    else:
        dist.init_process_group("gloo", **joining)
    ranks = Ranks(rank, world, None, is_sharded)
    try:
        control = dist.new_group(backend="gloo", timeout=timedelta(hours=1))
        object.__setattr__(ranks, "control", control)
        yield ranks
        dist.barrier(control)  # who leaves first would close the connections of the others
    finally:
        # The group's threads must end now: at the interpreter's exit they would abort the process.
        control = None
        object.__setattr__(ranks, "control", None)
        dist.destroy_process_group()


def num_restarts() -> int:
    """How often torchrun started this group of ranks again after one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def shard_networks(backbone: Backbone, device: torch.device) -> None:
    """Spread the networks of a backbone over the ranks (FSDP2), and put the rest on the device.

    Of a ``CopiedBackbone`` all three, with what is trained; of a ``SharedBackbone`` the frozen one,
    whose adapters every rank has whole.  Every element of an outermost ``nn.ModuleList`` is
    gathered and freed on its own, so a rank never needs the device to hold a whole network; the
    rest of a network is one more group.  ``ValueError`` for another backbone, with compiled blocks,
    and for a shared network with a ``prepare`` or adapters of its own: only its forward gathers.
    """
    from torch.distributed.device_mesh import init_device_mesh  # here: they take a second to load
    from torch.distributed.fsdp import fully_shard

    if isinstance(backbone, CopiedBackbone):
        networks = [getattr(backbone, role) for role in ROLES]
    elif why := _why_whole(backbone):
        raise ValueError(
            "train.shard fsdp spreads the networks of a CopiedBackbone or a SharedBackbone; "
            f"{why}: use train.shard none"
        )
    else:
        networks = [backbone.network]
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for network in networks:
        for block in _blocks(network):
            fully_shard(block, mesh=mesh)
        fully_shard(network, mesh=mesh, reshard_after_forward=len(networks) == 1 or None)
    backbone.to(device)


def _why_whole(backbone: Backbone) -> str:
    """Why a backbone's network cannot be spread, if it cannot."""
    if not isinstance(backbone, SharedBackbone):
        return f"this backbone is a {type(backbone).__name__}"
    if backbone.compiler is not None:
        return "this one's blocks are compiled (leave compile off)"
    if any(getattr(backbone.network, name, None) for name in ("prepare", "use_adapters")):
        return f"{type(backbone.network).__name__} reads weights outside its forward"
    return ""


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    for module in network.children():
        yield from module if isinstance(module, nn.ModuleList) else _blocks(module)


class Vote:
    """The largest of a host number over ranks, known one call later, so that nobody waits for it.

    Every rank sees the same answer at the same call: that is how all of them stop at one update.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self._work: Any = None
        self._sent = torch.zeros(1, dtype=torch.int64)

    def __call__(self, value: int) -> int:
        if self.ranks.world == 1:
            return value
        result = self.result()
        self._sent = torch.tensor([value])
        self._work = dist.all_reduce(
            self._sent, dist.ReduceOp.MAX, group=self.ranks.control, async_op=True
        )
        return result

    def result(self) -> int:
        """What the last call's vote gave; 0 before the first."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return int(self._sent[0])
