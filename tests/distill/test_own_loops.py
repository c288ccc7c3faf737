"""A distiller in a loop of one's own: optimizers and their rates, skipped updates, times on a grid,
what a step returns, and the student as a network of its own.
"""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from recorded_graph import RecordedGraph
from safetensors.torch import load_model, save_model
from small_networks import (
    ALPHA,
    NETWORKS,
    RANK,
    SAMPLE_SHAPE,
    draw_adapter,
    image_inputs,
    make_bank,
    null_text,
)
from small_runs import (
    BATCH,
    DIM,
    CondNetwork,
    assert_same,
    make_backbone,
    make_distiller,
    next_cond,
)
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

from mfd_fast import (
    CapturedDistiller,
    CopiedBackbone,
    DistillConfig,
    Distiller,
    OptimConfig,
    SharedBackbone,
    sample_times,
)
from mfd_fast.backbones.lanes import STUDENT
from mfd_fast.baselines.batch import Batch
from mfd_fast.distill.objectives import aux_times
from mfd_fast.distill.optim import is_capturable
from mfd_fast.testing.numerics import assert_as_accurate

GUIDE = (Path(__file__).parents[2] / "docs" / "your-model.md").read_text()
ROLES = ("aux", "student")
NAN = torch.full((BATCH, 1), float("nan"))
MAKERS = {"eager": Distiller, "captured": partial(CapturedDistiller, graph=RecordedGraph)}


def weights(distiller, *roles):
    """Copies of what the roles train."""
    of = distiller.backbone.parameters_of
    return [parameter.detach().clone() for role in roles or ROLES for parameter in of(role)]


def is_same(a, b):
    return [torch.equal(x, y) for x, y in zip(a, b, strict=True)]


def own_distiller(make_optimizer, make=Distiller, **settings):
    """A distiller with an optimizer of each role's parameters."""
    backbone = make_backbone()
    own = {role: make_optimizer(backbone.parameters_of(role)) for role in ROLES}
    plain = {f"{role}_optim": OptimConfig(lr=0.5) for role in ROLES}
    return make_distiller(
        backbone=backbone, make=partial(make, optimizers=own), **(plain | settings)
    )


# Optimizers of one's own ---------------------------------------------------------------------

OWN = {
    "groups": lambda ps: SGD([{"params": ps[:2], "lr": 0.3}, {"params": ps[2:], "lr": 0.01}]),
    "adamw": lambda ps: AdamW(ps, lr=3e-4),
    "a rate in a tensor": lambda ps: AdamW(ps, lr=torch.tensor(3e-4), fused=True),
}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("own", OWN)
def test_own_optimizers_own_their_rates(own, make):
    """Only a scheduler changes them, from the rates that were typed."""

    def rates(role):
        return [float(group["lr"]) for group in distiller.optimizers[role].param_groups]

    distiller = own_distiller(OWN[own], MAKERS[make])
    typed = {role: rates(role) for role in ROLES}
    scheduler = LambdaLR(distiller.optimizers["student"], lambda n: 0.5**n)
    for n in range(3 * distiller.cycle_length):
        role = distiller.next_role
        distiller.step(next_cond(n))
        halved = 0.5 ** (distiller.num_updates["student"] - (role == "student"))
        assert rates("student") == pytest.approx([rate * halved for rate in typed["student"]])
        assert rates("aux") == typed["aux"]
        if role == "student":
            scheduler.step()


@pytest.mark.parametrize("make", MAKERS)
def test_a_rate_of_zero_trains_nothing(make):
    """What the rate of an own group is, is what its weights move by."""
    distiller = own_distiller(
        lambda ps: SGD([{"params": ps[:2], "lr": 0.0}, {"params": ps[2:], "lr": 0.1}]), MAKERS[make]
    )
    before = weights(distiller, "student")
    for n in range(4 * distiller.cycle_length):
        distiller.step(next_cond(n))
    stayed = is_same(before, weights(distiller, "student"))
    assert stayed == [True] * 2 + [False] * (len(before) - 2)


def test_the_clip_norm_of_the_config_holds_for_own_optimizers():
    clip = OptimConfig(clip_norm=2.0**-10)
    distiller = own_distiller(lambda ps: SGD(ps, lr=2.0**10), aux_optim=clip)
    before = weights(distiller, "aux")
    norm = distiller.aux_step(next_cond(0))["aux_grad_norm"]
    moved = [a - b for a, b in zip(before, weights(distiller, "aux"), strict=True)]
    assert norm > clip.clip_norm
    length = torch.cat([x.flatten() for x in moved]).norm().item()
    assert length == pytest.approx(1.0, rel=2e-6)  # torch's own clipping divides by norm + 1e-6


@pytest.mark.parametrize("role", ROLES)
def test_warm_up_of_own_optimizers_is_refused(role):
    warm = {f"{role}_optim": OptimConfig(warmup_updates=3)}
    with pytest.raises(ValueError, match=rf"{role}_optim.warmup_updates=3 .* set it to 0 and give"):
        own_distiller(lambda ps: SGD(ps, lr=0.1), **warm)


class Counting:
    """A wrapper as those of accelerate and Lightning: it counts steps and holds no state."""

    def __init__(self, optimizer):
        self.optimizer, self.steps = optimizer, 0

    def step(self):
        self.steps += 1
        self.optimizer.step()

    def __getattr__(self, name):
        return getattr(self.__dict__["optimizer"], name)


def accelerated(optimizer):
    return pytest.importorskip("accelerate").Accelerator().prepare(optimizer)


@pytest.mark.parametrize("wrap", [Counting, accelerated])
@pytest.mark.parametrize("is_fused", [True, False])
def test_wrapped_optimizers_are_the_ones_inside(is_fused, wrap):
    """The same numbers as without the wrapper, also through a skip and a restart."""

    def make(wrapper):
        return own_distiller(lambda ps: wrapper(AdamW(ps, lr=1e-2, fused=is_fused)))

    plain, wrapped = make(lambda optimizer: optimizer), make(wrap)
    for n, cond in enumerate([next_cond(0), NAN, *map(next_cond, range(2, 8))]):
        if n == 5:
            state, wrapped = wrapped.state_dict(), make(wrap)
            wrapped.load_state_dict(state)
        plain.step(cond), wrapped.step(cond)
        assert all(is_same(weights(plain), weights(wrapped)))
    assert_same(plain.state_dict(), wrapped.state_dict())
    assert plain.skipped.item() == 1.0


def test_every_step_goes_through_the_wrapper():
    make = partial(CapturedDistiller, graph=RecordedGraph)
    distiller = own_distiller(
        lambda ps: Counting(AdamW(ps, lr=torch.tensor(1e-2), fused=True)), make
    )
    assert not any(map(is_capturable, distiller.optimizers.values()))
    for n in range(12):
        distiller.step(next_cond(n))
    counted = {role: optimizer.steps for role, optimizer in distiller.optimizers.items()}
    assert counted == distiller.num_updates == {"aux": 8, "student": 4}


# A skipped update ----------------------------------------------------------------------------

SKIPPING = {
    "adamw of the config": lambda make: make_distiller(make=make),
    "own momentum and decay": lambda make: own_distiller(
        lambda ps: SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1), make
    ),
}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("kind", SKIPPING)
def test_a_skipped_update_changes_nothing_of_the_model(kind, make):
    """Neither weights nor average, of both roles, before and after capture."""
    distiller = SKIPPING[kind](MAKERS[make])
    for n in range(30):
        is_bad = n in (4, 5, 18, 19, 20)
        before = weights(distiller), [average.clone() for average in distiller.ema]
        role = distiller.next_role
        distiller.step(NAN if is_bad else next_cond(n))
        after = weights(distiller, role)
        start = weights(distiller), distiller.ema
        if is_bad:
            assert all(is_same(before[0], start[0])) and all(is_same(before[1], start[1]))
            continue
        of_role = before[0][: len(after)] if role == "aux" else before[0][-len(after) :]
        assert not any(is_same(of_role, after))
        assert any(is_same(before[1], start[1])) == (role == "aux")
    assert distiller.skipped.item() == 5.0 and sum(distiller.num_updates.values()) == 30


@pytest.mark.parametrize("make", MAKERS)
def test_an_update_has_the_rate_and_the_times_of_its_number(make):
    """The update after a skipped one is the one that it would be after any other."""
    optim = OptimConfig(lr=0.4, warmup_updates=4)
    a, b = (make_distiller(make=MAKERS[make], aux_optim=optim) for _ in range(2))
    a.aux_step(NAN)
    b.aux_step(next_cond(0))
    assert torch.equal(a._draw_aux_times(NAN), b._draw_aux_times(NAN))
    rates = []
    for n in range(1, 6):
        a.aux_step(next_cond(n))
        rates.append(a.optimizers["aux"].param_groups[0]["lr"].item())
    assert rates == pytest.approx([0.2, 0.3, 0.4, 0.4, 0.4])
    assert a.num_updates["aux"] == 6 and a.skipped.item() == 1.0


# Times on a grid -----------------------------------------------------------------------------


class RoundingNetwork(CondNetwork):
    """Shows itself rounded times, as networks with a table of times do."""

    GRID = 8

    def forward(self, x, t, cond):
        return super().forward(x, torch.round(t * self.GRID) / self.GRID, cond)


@pytest.mark.parametrize("draws", [1, 3])
def test_gradient_of_the_auxiliary_on_a_grid_is_the_literal_one(draws):
    """Noised to the time that the network sees; coarse, so that another time cannot pass."""
    grid = RoundingNetwork.GRID
    config = DistillConfig(guidance=1.0, grid=grid, aux_draws_per_sample=draws, seed=7)

    def backbone(dtype):
        torch.manual_seed(1)
        return CopiedBackbone(*(RoundingNetwork().to(dtype) for _ in range(3)), sample_shape=(DIM,))

    def literal(dtype):
        networks, cond = backbone(dtype), next_cond(0).to(dtype)
        host, device = (torch.Generator().manual_seed(7) for _ in range(2))
        t = sample_times(BATCH * draws, generator=host).to(dtype)
        t = torch.round(t * grid) / grid
        noise = torch.randn(BATCH, 1, DIM, generator=device).to(dtype)[:, 0]
        eps = torch.randn(BATCH, draws, DIM, generator=device).to(dtype).flatten(0, 1)
        with torch.no_grad():
            x0 = noise - networks.student(noise, torch.ones(BATCH, dtype=dtype), cond)
        x0, cond = (x.repeat_interleave(draws, dim=0) for x in (x0, cond))
        x_t = (1 - t[:, None]) * x0 + t[:, None] * eps
        (networks.aux(x_t, t, cond) - (eps - x0)).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in networks.parameters_of("aux")])

    distiller = Distiller(backbone(torch.float32), config)
    distiller._aux_backward(next_cond(0), distiller._draw_aux_times(next_cond(0)))
    ours = torch.cat([p.grad.flatten() for p in distiller.backbone.parameters_of("aux")])
    assert_as_accurate(ours, literal(torch.float32), literal(torch.float64))


@pytest.mark.parametrize("grid", [16, 1000, 0])
def test_every_drawn_time_is_on_the_grid(grid):
    config = DistillConfig(grid=grid)
    batch = Batch(None, None, None, torch.Generator().manual_seed(0), 0, None, 64, "cpu")
    drawn = [
        aux_times(64, config, torch.Generator().manual_seed(0)),
        batch.times(config),
        *batch.time_pairs(config),
    ]
    for t in drawn:
        assert t.dtype == torch.float32
        is_on = (t.double() * (grid or 1000)).round() / (grid or 1000)
        assert torch.equal(is_on.float(), t) == bool(grid)


# What a step returns -------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("objective", ["mfd", "vsd"])
def test_metrics_are_those_of_the_guide(objective, make):
    rows = re.findall(r"^\| (auxiliary|student) \| (.*) \|$", GUIDE, re.MULTILINE)
    roles = {"auxiliary": "aux", "student": "student"}
    told = {roles[row]: set(re.findall(r"`(\w+)`", names)) for row, names in rows}
    distiller = make_distiller(make=MAKERS[make], objective=objective)
    for n in range(2 * distiller.cycle_length):
        role = distiller.next_role
        metrics = distiller.step(next_cond(n))
        assert set(metrics) == told[role]
        assert all(value.shape == () for value in metrics.values())


def test_a_student_without_an_update_is_told():
    """A loader shorter than a cycle: the student is what it started as."""
    distiller, cond = make_distiller(aux_updates=4), next_cond(0)
    for _ in range(3):
        distiller.step(cond)
    message = r"a cycle of step\(\) is 4 updates of the auxiliary, then .* and 3 were made"
    for use in (distiller.student_network, lambda: distiller.generate(torch.randn(8, DIM), cond)):
        with pytest.warns(UserWarning, match=message) as caught:
            use()
        assert caught[0].filename == __file__


# The student as a network --------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("use_ema", [True, False])
def test_the_student_of_copies_is_a_network_of_its_own(use_ema, tmp_path):
    """It gives what generate gives, now, from a file, and when training has gone on."""
    distiller = make_distiller(ema_decay=0.5)
    for n in range(6):
        distiller.step(next_cond(n))
    noise, cond = torch.randn(BATCH, DIM), next_cond(0)
    expected = distiller.generate(noise, cond, use_ema=use_ema)
    assert not torch.equal(expected, distiller.generate(noise, cond, use_ema=not use_ema))
    student = distiller.student_network(use_ema=use_ema)
    save_model(student, tmp_path / "student.safetensors")
    read = CondNetwork()
    load_model(read, tmp_path / "student.safetensors")
    for n in range(6):
        distiller.step(next_cond(n))
    for network in (student, read):
        assert torch.equal(noise - network(noise, torch.ones(BATCH), cond), expected)
    assert not student.training


def adapted(kind, dtype, teacher_adapter):
    """A backbone whose adapters all do something, on a float32 network's numbers."""
    torch.manual_seed(2)
    network, bank = make_bank(NETWORKS[kind]().to(dtype))
    if teacher_adapter:
        _, other = make_bank(NETWORKS[kind]().to(dtype), names=("base",))
        state = other.adapter_state_dict("base")
        bank.add_frozen("base", state, alpha=ALPHA, rank=RANK)
    return SharedBackbone(
        network,
        adapters=bank,
        sample_shape=SAMPLE_SHAPE,
        null_cond=null_text,
        teacher_adapter="base" if teacher_adapter else None,
    )


@pytest.mark.parametrize("teacher_adapter", [False, True])
@pytest.mark.parametrize("kind", NETWORKS)
def test_the_student_of_adapters_is_the_network_with_them_merged(kind, teacher_adapter, tmp_path):
    def lane(backbone):
        inputs = x.to(backbone.dtype)[:, None], t
        with torch.no_grad():
            return backbone.forward(*inputs, backbone.prepare(cond), (STUDENT,))[:, 0]

    def forward(network):
        with torch.no_grad():
            prepared = network.prepare(cond) if hasattr(network, "prepare") else cond
            return network(x, t, prepared)

    x, t, cond = image_inputs(3)
    backbone = adapted(kind, torch.float32, teacher_adapter)
    eager, exact = lane(backbone), lane(adapted(kind, torch.float64, teacher_adapter))
    student = backbone.student_network()
    assert torch.equal(lane(backbone), eager)  # the network itself is what it was
    torch.save(student, tmp_path / "student.pt")  # nothing of the bank holds on to it
    torch.manual_seed(9)
    draw_adapter(backbone.adapters, "student", seed=5)
    assert not torch.equal(lane(backbone), eager)
    assert_as_accurate(forward(student), eager, exact)

    plain = NETWORKS[kind]()
    assert student.state_dict().keys() == plain.state_dict().keys()
    save_model(student, tmp_path / "student.safetensors")
    load_model(plain, tmp_path / "student.safetensors")
    assert torch.equal(forward(plain), forward(student))
    module = student.blocks[0].to_q
    assert not module._forward_hooks and not module._forward_hooks_with_kwargs


def test_backbones_follow_their_networks_to_another_device():
    """Trainers move a module after the backbone was made."""
    for backbone in (make_backbone(), adapted("plain", torch.float32, False)):
        assert backbone.device == torch.device("cpu")
        assert backbone.to("meta").device == torch.device("meta")
