"""Ranks share an update: the same samples, the same step; a killed rank costs nothing."""

import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from rank_worker import UPDATES, own_loop, steps, weights
from recorded_graph import RecordedGraph
from safetensors.torch import load_file
from small_runs import assert_same, make_backbone, make_distiller, make_shared, run

from mfd_fast import CapturedDistiller, DistillConfig, Distiller
from mfd_fast.distill.ranks import FlatGradients, Ranks, ranks_of
from mfd_fast.flow.solvers import plan
from mfd_fast.run.checkpoint import checkpoints_in, read
from mfd_fast.run.launch import shard_networks
from mfd_fast.testing.numerics import assert_as_accurate

TESTS = Path(__file__).parents[1] / "support"
ENV = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parents[1]}", "OMP_NUM_THREADS": "1"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on_ranks(world, case, folder):
    """Run a case of ``rank_worker`` on this many processes."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    command = [sys.executable, str(TESTS / "rank_worker.py"), case, str(folder)]
    children = [
        subprocess.Popen(command, env={**ENV, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    assert [child.wait(300) for child in children] == [0] * world


def alone(dtype, case="result"):
    """The run of ``rank_worker.replicas``, or of its ``library``, in one process."""
    options = {"micro_batches": 2, "student_steps": 2, "aux_draws_per_sample": 2}
    options["aux_samples"] = "cycle"
    is_own = case == "library"
    distiller = own_loop(dtype) if is_own else make_distiller(dtype=dtype, **options)
    losses, norms = steps(distiller)
    flat = torch.cat([p.detach().flatten() for p in weights(distiller)])
    return {"weights": flat, "losses": losses, "norms": norms}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two ranks left: means, strings and votes between them were checked there."""
    folder = tmp_path_factory.mktemp("two")
    on_ranks(2, "two_ranks", folder)
    return folder


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    on_ranks(4, "replicas", folder)
    return folder


@pytest.mark.parametrize(
    ("ranks", "case"),
    [("two_ranks", "result"), ("four_ranks", "result"), ("two_ranks", "library")],
)
def test_ranks_give_the_updates_of_one_process(ranks, case, request):
    result = load_file(request.getfixturevalue(ranks) / f"{case}.safetensors")
    eager, exact = alone(torch.float32, case), alone(torch.float64, case)
    for name in ("weights", "losses", "norms"):
        assert_as_accurate(result[name], eager[name], exact[name].double())


@pytest.mark.parametrize(
    ("case", "make", "files"), [("sharded", make_backbone, 2), ("shared", make_shared, 1)]
)
def test_shards_give_the_run_of_one_process_and_their_checkpoint_loads_in_one(
    two_ranks, tmp_path, case, make, files
):
    """fsdp on two ranks: stopped, continued on shards, read here and continued here.  Of a shared
    network only the frozen weights are shards: the checkpoint is that of replicas.
    """
    first, second = checkpoints_in(two_ranks / case)
    assert len(list(first.glob(f"tensors-*-of-0000{files}.safetensors"))) == files
    for path, updates in ((first, UPDATES), (second, UPDATES + 1)):
        state = read(path)["distiller"]
        eager, exact = (
            run(
                tmp_path / f"{dtype}-{updates}",
                updates=updates,
                student_steps=2,
                backbone=make(dtype),
            )[0]
            for dtype in (torch.float32, torch.float64)
        )
        eager, exact = eager.state_dict(), exact.state_dict()
        for name in ("aux", "student", "ema"):
            got, one, true = (torch.cat([p.flatten() for p in s[name]])
                              for s in (state, eager, exact))  # fmt: skip
            assert_as_accurate(got, one, true.double())
        for got, one, true in zip(*(moments(s) for s in (state, eager, exact)), strict=True):
            assert_as_accurate(got, one, true.double())
    options = {"resumed": True, "student_steps": 2, "backbone": make()}
    continued, _ = run(two_ranks / case, updates=UPDATES + 2, **options)
    assert continued.num_updates["student"] == UPDATES + 2


def test_a_killed_rank_is_started_again_and_the_run_ends_the_same(two_ranks, tmp_path):
    """torchrun starts the group anew after a SIGKILL; it goes on from the last checkpoint."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = ["--nproc-per-node", "2", "--max-restarts", "1"]
    worker = [str(TESTS / "rank_worker.py"), "elastic", str(tmp_path)]
    subprocess.run([*launcher, *options, *worker], env=ENV, check=True, timeout=300)
    ends = [read(checkpoints_in(f)[-1]) for f in (tmp_path, two_ranks / "elastic")]
    for end in ends:
        end["progress"].pop("seconds")
    assert_same(*ends)


def moments(state):
    """Every moment of both optimizers."""
    return [
        value
        for role in ("aux", "student")
        for entry in state["optimizers"][role]["state"].values()
        for key, value in sorted(entry.items())
        if key != "step"
    ]


# One process is enough for these.


def random_table(batch):
    """Trajectories of different lengths, in descending order."""
    generator = torch.Generator().manual_seed(0)
    t, r = torch.rand(batch, generator=generator), torch.rand(batch, generator=generator)
    table = plan(torch.maximum(t, r), torch.minimum(t, r), step_size=0.1)
    return table.assigned_in_order()


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_tables_of_ranks_are_that_of_the_batch(world, is_sharded):
    """Together the ranks' trajectories are the whole table: no step is lost or done twice."""
    whole = random_table(12)
    shares = [Ranks(rank, world, is_sharded=is_sharded).table(whole) for rank in range(world)]
    for rank, share in enumerate(shares):
        steps = len(share.active)
        assert torch.equal(share.times, whole.times[:steps, rank::world])
        assert torch.equal(share.span, whole.span[rank::world])
        for k, active in enumerate(share.active):
            is_moving = whole.coef[k, rank::world, 1] != 0
            assert is_moving[active:].sum() == 0 and (is_sharded or is_moving[:active].all())
        late = whole.coef[steps:, rank::world]
        assert (late[..., 0] == 1).all() and (late[..., 1:] == 0).all()  # all stand still
    if is_sharded:  # every rank evaluates as often: a gather never waits for ever
        assert {len(share.active) for share in shares} == {len(whole.active)}
    else:
        assert sum(share.num_evaluations for share in shares) == whole.num_evaluations


def test_gradients_are_views_of_one_buffer():
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last), torch.nn.Linear(6, 7)
    )
    x, y = torch.randn(2, 3, 4, 8), list(network.parameters())
    network(x).square().sum().backward()
    expected = [p.grad.clone() for p in y]
    flat = FlatGradients(y)
    addresses = [p.grad.data_ptr() for p in y]
    network(x).square().sum().backward()
    (buffer,) = flat.buffers
    assert [p.grad.data_ptr() for p in y] == addresses
    assert all(buffer.data_ptr() <= at < buffer.data_ptr() + 4 * len(buffer) for at in addresses)
    assert all(p.grad.stride() == p.stride() for p in y)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(y, expected, strict=True))
    assert buffer.double().sum() == sum(grad.double().sum() for grad in expected)


@pytest.fixture
def one_gloo_process(monkeypatch):
    """``torch.distributed`` with this process alone: its collectives change nothing."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_gradients_that_left_the_buffer_are_put_back(one_gloo_process):
    network = torch.nn.Linear(3, 2)
    flat = FlatGradients([network.weight, network.bias])
    views = [network.weight.grad, network.bias.grad]
    network(torch.randn(5, 3)).square().sum().backward()
    expected = network.weight.grad.clone()
    network.weight.grad, network.bias.grad = expected.clone(), None
    flat.all_reduce()
    assert network.weight.grad is views[0] and network.bias.grad is views[1]
    assert torch.equal(views[0], expected) and not views[1].any()


def test_one_process_of_torch_distributed_is_alone(one_gloo_process):
    assert ranks_of(make_backbone()) == Ranks()


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (None, r"2 processes were launched, and each would train a student of its own: call "
               r"torch\.distributed\.init_process_group\(\) before Distiller, or pass ranks="),
        ("cuda:nccl", "initialised with cuda:nccl, which does not reach a backbone on cpu"),
    ],
)  # fmt: skip
def test_processes_that_would_train_apart_are_refused(backend, message, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    if backend:
        facts = {"is_initialized": True, "get_rank": 1, "get_world_size": 2}
        for name, value in (facts | {"get_backend_config": backend}).items():
            monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    config = DistillConfig()
    for make in (Distiller, partial(CapturedDistiller, graph=RecordedGraph)):
        with pytest.raises(ValueError, match=message):
            make(make_backbone(), config)
    assert Distiller(make_backbone(), config, ranks=Ranks()).ranks.world == 1


def test_what_cannot_be_shared_out_is_refused():
    with pytest.raises(ValueError, match=r"a multiple of 3 ranks x distill.micro_batches=2, got 9"):
        Ranks(0, 3).check_batch(9, 2)
    with pytest.raises(ValueError, match=r"fsdp spreads the networks of .* is a Linear: use"):
        shard_networks(torch.nn.Linear(1, 1), torch.device("cpu"))
    backbone = make_shared()
    backbone.network.prepare = lambda cond: cond
    with pytest.raises(ValueError, match=r"CondNetwork reads weights outside its forward: use"):
        shard_networks(backbone, torch.device("cpu"))
    backbone.compiler = "eager"
    with pytest.raises(ValueError, match=r"blocks are compiled \(leave compile off\): use"):
        shard_networks(backbone, torch.device("cpu"))


def test_a_sharded_run_ends_with_its_table_and_pictures(tmp_path):
    """The teacher was sharded, too: the one process that evaluates needs a whole one."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = ["--nproc-per-node", "2", "-m", "mfd_fast", "distill", "digits", "--out", str(tmp_path)]
    small = ["--train.updates", "1", "--train.batch-size", "2", "--distill.aux-updates", "1"]
    argv = [*launcher, *run, *small, "--train.shard", "fsdp", "--num-eval-samples", "4"]
    subprocess.run(argv, env=ENV, check=True, timeout=300)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"student.safetensors", "results.json", "samples_grid.png"} <= names


@pytest.mark.parametrize(("world", "expected"), [(2, [2.0, 5.0]), (3, [3.5, 3.5, 3.5])])
def test_every_rank_continues_with_its_own_sums(world, expected):
    """Another number of ranks takes their mean; a run alone kept a number and no list."""
    saved = {"aux_loss_sum": torch.tensor([2.0, 5.0])}
    got = [float(Ranks(rank, world).own(saved)["aux_loss_sum"]) for rank in range(world)]
    assert got == expected
    assert Ranks().own({"x": torch.tensor(4.0)}) == {"x": 4.0}
