"""Continuing a run: which checkpoint, whether it belongs to this run, and putting it back.

A continued run is bit for bit the uninterrupted one on the same machine, versions, number of
threads and of ranks.  With another number of ranks the samples are the same ones and sums are added
in another order: equal to rounding.
"""

import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mfd_fast.backbones.lanes import Backbone
from mfd_fast.distill.config import DistillConfig
from mfd_fast.distill.distiller import Distiller
from mfd_fast.distill.optim import make_optimizer, set_lr
from mfd_fast.distill.ranks import Ranks, is_sharded, local
from mfd_fast.distill.trained import TRAINED
from mfd_fast.run.checkpoint import (
    Counts,
    DamagedCheckpointError,
    latest_good,
    pack,
    read,
    read_header,
    verify,
)
from mfd_fast.run.checkpoint_writer import Checkpointer
from mfd_fast.run.config import RunConfig, leaves, to_dict
from mfd_fast.run.loop import Progress

# Settings that may change but change the order in which numbers are added.
CHANGES_ROUNDING = (
    "train.float8",
    "train.activation",
    "train.shard",
    "pipeline.compile",
    "pipeline.attention",
    "sana.encode_ahead",
    "sana.text_length",
    "sana.text_multiple",
)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def locate(folder: Path, wanted: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from, None for a run that has none yet; and remarks.

    Args:
        folder: the run's checkpoints.
        wanted: one of them, or ``""`` for the newest that is not damaged.

    ``DamagedCheckpointError`` if the wanted one is damaged, naming the one before it, or if all
    are.
    """
    if not wanted:
        path, damage = latest_good(folder)
        if path is None and damage:
            raise DamagedCheckpointError(
                f"{damage[0]}; no other checkpoint in {folder} is good either. Start again in "
                "another folder with --out"
            )
        return path, [f"{error}; an earlier one is taken" for error in damage]
    path = Path(wanted)
    if Counts.of(path) is None or not path.is_dir() or not path.parent.samefile(folder):
        raise ValueError(
            f"--resume takes a run folder or a checkpoint like {folder}/student-000100-aux-001000; "
            f"got {wanted}"
        )
    try:
        verify(path)
    except DamagedCheckpointError as error:
        before, _ = latest_good(path.parent, before=Counts.of(path))
        offer = "there is no earlier one" if before is None else f"type --resume {before}"
        raise DamagedCheckpointError(f"{error}; {offer}") from None
    return path, []


def header(config: RunConfig, backbone: Backbone, ranks: Ranks, data: str = "") -> dict[str, Any]:
    """What a checkpoint tells besides the state: whom it belongs to and what made it.

    data: checksum of what the conditions are made from.
    """
    return {
        "config": to_dict(config),
        "data": data,
        "model": fingerprint(backbone, ranks),
        "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
        "device": backbone.device.type,
        "threads": torch.get_num_threads(),
        "world": ranks.world,
    }


def fingerprint(backbone: Backbone, ranks: Ranks) -> dict[str, Any]:
    """Shapes of what is trained, and exact integer sums over the bits of every frozen parameter.

    Integer sums do not depend on their order, so every device and every number of ranks gives the
    same ones.
    """
    trained = {role: [list(p.shape) for p in backbone.parameters_of(role)] for role in TRAINED}
    frozen = list(_frozen(backbone))
    parameters = [parameter for _, parameter in frozen]
    sums = [_bit_sum(x) for x in local(parameters)]
    total = torch.stack([x.cpu() for x in sums]) if sums else torch.zeros(0, dtype=torch.int64)
    if ranks.is_sharded:  # what every rank has whole is rank 0's to add
        is_mine = [ranks.is_main or is_sharded(parameter) for parameter in parameters]
        total = total * torch.tensor(is_mine, dtype=torch.int64)
        total = torch.stack(ranks.gather(total)).sum(0)
    names = [f"{name} {list(parameter.shape)} {parameter.dtype}" for name, parameter in frozen]
    return {"trained": trained, "frozen": dict(zip(names, total.tolist(), strict=True))}


def _frozen(backbone: Backbone) -> Iterator[tuple[str, Tensor]]:
    if isinstance(backbone, nn.Module):
        for name, parameter in backbone.named_parameters():
            if not parameter.requires_grad:
                yield name, parameter


def _bit_sum(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(INTEGERS[x.element_size()]).sum(dtype=torch.int64)


def check_config(saved: dict[str, Any], config: RunConfig) -> list[str]:
    """Remarks about settings that changed; ``ValueError`` names one that must not."""
    unset = dict(leaves(to_dict(type(config)(preset=config.preset))))  # settings are added
    before, now = unset | dict(leaves(saved)), dict(leaves(to_dict(config)))
    remarks = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if key not in (*config.MAY_CHANGE, *config.LEARNS_ON, *config.PATHS):
            raise ValueError(
                f"the checkpoint was made with {key} {old!r}, this run has {new!r}; give the "
                "same value, or start a new run in another folder"
            )
        if key in CHANGES_ROUNDING:
            remarks.append(f"{key} was {old!r} and is {new!r}: from here on equal to rounding")
        if key in config.LEARNS_ON:
            remarks.append(f"{key} was {old!r} and is {new!r}: from here on the run learns by it")
    return remarks


def check_header(saved: dict[str, Any], mine: dict[str, Any]) -> list[str]:
    """Remarks about another machine or version; ``ValueError`` for another model, data, device."""
    for kind, what in (("trained", "trains"), ("frozen", "has frozen")):
        old, new = saved["model"][kind], mine["model"][kind]
        if old != new:
            key = next(k for k in [*old, *new] if old.get(k) != new.get(k))
            raise ValueError(
                f"the checkpoint belongs to another model: this one {what} something else at "
                f"{key}; give the teacher that the run was started with, wherever it lies now"
            )
    if saved.get("data", mine["data"]) != mine["data"]:
        raise ValueError(
            "the checkpoint's run learned from other data; give the prompts or the store that it "
            "was started with, wherever they lie now"
        )
    if saved["device"] != mine["device"]:
        raise ValueError(
            f"the checkpoint's random numbers are those of {saved['device']}, this run is on "
            f"{mine['device']}; set train.device {saved['device']}"
        )
    remarks = []
    for key in ("versions", "threads", "world"):
        if saved[key] != mine[key]:
            remarks.append(f"{key} was {saved[key]}, is {mine[key]}: from here equal to rounding")
    return remarks


def restore(state: dict[str, Any], distiller: Distiller, progress: Progress, ranks: Ranks) -> None:
    """Put everything back: weights, optimizers, counters, random states of this rank.

    The learning rates are those of the distiller's config, which may have changed; optimizers of
    one's own keep theirs.
    """
    distiller.load_state_dict(state["distiller"])
    for role, trained in distiller.trained.items():
        if trained.sets_lr:
            set_lr(trained.optimizer, distiller.config.optim_of(role).lr)
    progress.load_state_dict(state["progress"], ranks)
    for kind, set_state in (("cpu", torch.set_rng_state), ("cuda", torch.cuda.set_rng_state)):
        states = state["rng"].get(kind)
        if states:
            set_state(states[ranks.rank if len(states) == ranks.world else 0])


def resume_from(checkpointer: Checkpointer, distiller: Distiller) -> Progress:
    """The progress that ``train`` goes on from, with the newest good checkpoint put back if there
    is one.

    ``DamagedCheckpointError`` if there are some and none is good.
    """
    progress, ranks = Progress(distiller), distiller.ranks
    found = locate(checkpointer.folder, "")[0] if ranks.is_main else None
    if chosen := ranks.broadcast_text(str(found or "")):
        restore(read(Path(chosen)), distiller, progress, ranks)
        checkpointer.continues(Counts.of(Path(chosen)))
    return progress


def check_optimizers(config: DistillConfig, parameters: Mapping[str, Tensor]) -> None:
    """Try, before anything is learned, that the state of every optimizer fits a checkpoint.

    Args:
        config: names the optimizers.
        parameters: role -> one of its parameters, where it will be trained; it is left alone.

    ``ImportError`` or ``ValueError`` names the role's setting.
    """
    for role, parameter in parameters.items():
        scratch = nn.Parameter(torch.zeros_like(parameter))
        scratch.grad = torch.zeros_like(parameter)
        try:
            optimizer = make_optimizer([scratch], config.optim_of(role))
            optimizer.step()
            pack(optimizer.state_dict())
        except (ValueError, ImportError) as error:
            key = f"distill.{role}_optim.kind"
            raise type(error)(f"{key} {config.optim_of(role).kind}: {error}") from None


def check_teacher(checkpoints: Path, backbone: Backbone) -> None:
    """``ValueError`` if the frozen weights are not those that a run's newest checkpoint knows."""
    path, _ = latest_good(checkpoints)
    if path is None:
        raise ValueError(
            f"{checkpoints} has no good checkpoint to compare a teacher with; put the teacher back "
            "where it was"
        )
    saved = read_header(path)["model"]["frozen"]
    if saved != fingerprint(backbone, Ranks())["frozen"]:
        raise ValueError(
            "the teacher is another one than that of the run; give the one that the run was "
            "started with, wherever it lies now"
        )
