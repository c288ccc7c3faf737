"""What every rank of ``test_distributed.py`` runs: python rank_worker.py CASE FOLDER."""

import os
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import small_runs
import torch
from safetensors.torch import save_file
from small_runs import make_backbone, make_distiller, make_shared, next_cond, run
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from mfd_fast.distill.distiller import Distiller
from mfd_fast.distill.ranks import Ranks, ranks_of
from mfd_fast.distill.trained import TRAINED
from mfd_fast.run.checkpoint import checkpoints_in
from mfd_fast.run.launch import Vote, launched_ranks, num_restarts, shard_networks
from mfd_fast.run.resume import fingerprint

UPDATES, NUM_STEPS = 2, 6  # of the student; of both roles
ELASTIC = {"updates": 4, "checkpoint_every": 1}  # a checkpoint adds up over ranks: to rounding


def weights(distiller):
    return [p for role in TRAINED for p in distiller.backbone.parameters_of(role)]


def own_loop(dtype=torch.float32, *, moved_by=0.0):
    """A distiller with optimizers of one's own that is told nothing about ranks."""
    backbone = make_backbone(dtype)
    with torch.no_grad():
        for parameter in (*backbone.parameters_of("aux"), *backbone.parameters_of("student")):
            parameter.add_(moved_by)
    own = {
        role: torch.optim.SGD(backbone.parameters_of(role), lr=0.1, momentum=0.9)
        for role in TRAINED
    }
    return make_distiller(backbone=backbone, make=partial(Distiller, optimizers=own))


def steps(distiller, *, drops_gradients=False):
    """Losses and gradient norms of the first updates, of either role."""
    losses, norms = [], []
    for n in range(NUM_STEPS):
        role = distiller.next_role
        if drops_gradients:  # as many loops do before an update
            for optimizer in distiller.optimizers.values():
                optimizer.zero_grad()
        metrics = distiller.step(distiller.ranks.rows(next_cond(n)))
        losses.append(metrics[f"{role}_loss"].detach())
        norms.append(metrics[f"{role}_grad_norm"])
    return torch.stack(losses), torch.stack(norms)


def replicas(ranks, folder):
    """A short run; every rank's weights must be the same bits, and rank 0's go to the test."""
    options = {"micro_batches": 2, "student_steps": 2, "aux_draws_per_sample": 2}
    distiller = make_distiller(ranks, aux_samples="cycle", **options)
    finish(ranks, folder / "result.safetensors", distiller, *steps(distiller))


def library(ranks, folder):
    """A loop of one's own whose processes start with weights of their own."""
    distiller = own_loop(moved_by=float(ranks.rank))
    found = distiller.ranks
    assert (found.rank, found.world, found.is_sharded) == (ranks.rank, ranks.world, False)
    finish(
        ranks, folder / "library.safetensors", distiller, *steps(distiller, drops_gradients=True)
    )


def finish(ranks, path, distiller, losses, norms):
    flat = torch.cat([p.detach().flatten() for p in weights(distiller)])
    assert all(torch.equal(flat, other) for other in ranks.gather(flat))
    losses = torch.tensor(ranks.mean(losses.tolist()))
    if ranks.is_main:
        result = {"weights": flat, "losses": losses, "norms": norms}
        save_file(result, path)


def host_values(ranks, folder):
    """Means, gathered tensors, strings and votes; weights that start apart become the same."""
    world, rank = ranks.world, ranks.rank
    assert ranks.mean([float(rank), 1.0]) == [(world - 1) / 2, 1.0]
    assert [int(x) for x in ranks.gather(torch.tensor(rank))] == list(range(world))
    rows = torch.arange(3 * world, dtype=torch.float64)
    assert torch.equal(ranks.whole(ranks.rows(rows)), rows)
    assert ranks.broadcast_text("runs/ä" if ranks.is_main else "") == "runs/ä"
    vote = Vote(ranks)
    answers = [vote(15 if rank == 1 and n == 2 else 0) for n in range(5)]
    assert answers == [0, 0, 0, 15, 0] and vote.result() == 0
    backbone = make_backbone(seed=100 + rank)
    make_distiller(ranks, backbone=backbone)
    flat = torch.cat([p.detach().flatten() for p in backbone.parameters_of("student")])
    assert all(torch.equal(flat, other) for other in ranks.gather(flat))


def sharded(ranks, folder):
    """Two student updates on shards, then one more from their checkpoint on other weights."""
    ranks = replace(ranks, is_sharded=True)
    distiller = on_shards(ranks, folder, make_backbone)
    backbone = distiller.backbone
    held = sum(p.to_local().numel() for p in backbone.parameters_of("student"))
    assert held < 0.7 * sum(p.numel() for p in backbone.parameters_of("student"))
    with pytest.raises(ValueError, match=r"weights are spread over ranks: inside averaged_student"):
        distiller.student_network()
    with distiller.averaged_student():
        whole = get_model_state_dict(
            backbone.student, options=StateDictOptions(full_state_dict=True)
        )
    averages = [average.full_tensor() for average in distiller.ema]
    assert all(torch.equal(a, b) for a, b in zip(whole.values(), averages, strict=True))


def shared_base(ranks, folder):
    """The same of adapters, which are whole on every rank, on a frozen network of shards."""
    ranks = replace(ranks, is_sharded=True)
    distiller = on_shards(ranks, folder, make_shared)
    weights = list(distiller.backbone.network.parameters())
    assert sum(p.to_local().numel() for p in weights) < 0.7 * sum(p.numel() for p in weights)
    assert all(p.grad is None for p in weights)
    for role in TRAINED:
        (flat,) = distiller.backbone.parameters_of(role)
        assert all(torch.equal(flat, other) for other in ranks.gather(flat.detach()))


def on_shards(ranks, folder, make):
    """The distiller of the second of two runs, the first one's checkpoint in it."""
    for updates in (UPDATES, UPDATES + 1):
        backbone = make()
        before = fingerprint(backbone, Ranks())
        if updates > UPDATES:
            torch._foreach_zero_([p.data for role in TRAINED for p in backbone.parameters_of(role)])
        shard_networks(backbone, torch.device("cpu"))
        assert fingerprint(backbone, ranks) == before
        distiller, _ = run(
            folder,
            updates=updates,
            resumed=updates > UPDATES,
            ranks=ranks,
            backbone=backbone,
            student_steps=2,
        )
    found = ranks_of(backbone)
    assert found.is_sharded and found.world == ranks.world
    return distiller


def two_ranks(ranks, folder):
    """All that two ranks are asked, in one start."""
    host_values(ranks, folder)
    replicas(ranks, folder)
    library(ranks, folder)
    sharded(ranks, folder / "sharded")
    shared_base(ranks, folder / "shared")
    run(folder / "elastic", **ELASTIC, ranks=ranks)


def elastic(ranks, folder):
    """A run whose second rank dies at once after five updates, the first time."""
    cond, dies = next_cond, ranks.rank == 1 and num_restarts() == 0

    def cond_or_die(n):
        if dies and n == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return cond(n)

    small_runs.next_cond = cond_or_die
    has_checkpoint = bool(checkpoints_in(folder))
    assert has_checkpoint == (num_restarts() > 0)
    run(folder, **ELASTIC, resumed=has_checkpoint, ranks=ranks)


def nodes(ranks, folder):
    """A run whose second node, torchrun and all, dies after five updates, the first time."""
    cond, died = next_cond, folder / "died"

    def cond_or_die(n):
        if ranks.rank == 1 and n == 5 and not died.exists():
            died.touch()
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        return cond(n)

    small_runs.next_cond = cond_or_die
    run(folder, **ELASTIC, resumed=bool(checkpoints_in(folder)), ranks=ranks)


if __name__ == "__main__":
    case = {f.__name__: f for f in (replicas, two_ranks, elastic, nodes)}[sys.argv[1]]
    with launched_ranks("cpu") as joined:
        case(joined, Path(sys.argv[2]))
