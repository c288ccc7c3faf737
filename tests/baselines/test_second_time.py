"""The student's second time, K-step samplers, and what the comparison costs those who do not use
it."""

import importlib.util
import subprocess
import sys
from typing import get_args

import pytest
import torch
from gaussian import GaussianNetwork
from test_objective_matching import ToyTokens, condition, toy_distiller

from mfd_fast import AdapterBank, CopiedBackbone, DistillConfig, Distiller, SharedBackbone
from mfd_fast.baselines.config import ComparisonConfig, ObjectiveName
from mfd_fast.baselines.distiller import ComparisonDistiller
from mfd_fast.baselines.objectives import COMPARED
from mfd_fast.baselines.sampling import StudentSampler, few_step, renoised_states
from mfd_fast.baselines.second_time import with_second_time
from mfd_fast.flow.times import uniform_schedule
from mfd_fast.models.digits.dit import DiT, DiTConfig, load_dit, save_dit
from mfd_fast.run.maker import make_distiller

SMALL = DiTConfig(width=16, depth=2, heads=2)


def random_dit():
    torch.manual_seed(0)
    model = DiT(SMALL).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def inputs(batch=4):
    torch.manual_seed(1)
    return torch.randn(batch, 1, 8, 8), torch.rand(batch), torch.arange(batch)


def test_a_student_with_a_second_time_starts_as_the_teacher_bit_for_bit():
    teacher = random_dit()
    student = with_second_time(teacher)
    x, t, label = inputs()
    for end in (None, torch.zeros(4), t, t / 2):
        assert torch.equal(student(x, t, label, end), teacher(x, t, label))


def test_the_second_time_is_learnt_from():
    """Its last layer has a gradient at once, and after a step the output depends on it."""
    student = with_second_time(random_dit())
    x, t, label = inputs()
    student(x, t, label, t / 2).square().sum().backward()
    assert student.span_mlp[-1].weight.grad.abs().sum() > 0
    with torch.no_grad():
        student.span_mlp[-1].weight -= 0.01 * student.span_mlp[-1].weight.grad
    assert not torch.equal(student(x, t, label, t / 2), student(x, t, label, t))


def test_a_saved_student_keeps_its_second_time(tmp_path):
    student = with_second_time(random_dit())
    save_dit(student, tmp_path / "student.safetensors")
    x, t, label = inputs()
    loaded = load_dit(tmp_path / "student.safetensors")
    assert torch.equal(loaded(x, t, label, t / 2), student(x, t, label, t / 2))


def test_a_one_time_network_refuses_a_second_time():
    x, t, label = inputs()
    with pytest.raises(ValueError, match=r"end needs a network with DiTConfig\.second_time"):
        random_dit()(x, t, label, t)


@pytest.mark.parametrize("sampler", ["flow", "map", "renoise"])
def test_one_step_is_noise_minus_velocity(sampler):
    noise = torch.randn(4, 3)
    x0 = few_step(sampler, lambda x, t, *end: x.sin(), noise, steps=1)
    assert torch.equal(x0, noise - noise.sin())


def test_a_map_is_told_where_each_step_ends():
    asked = []

    def velocity(x, t, end):
        asked.append((t[0].item(), end[0].item()))
        return torch.zeros_like(x)

    few_step("map", velocity, torch.randn(2, 3), steps=4)
    assert asked == [(1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)]


def test_renoising_mixes_the_prediction_with_fresh_noise():
    """A student that always predicts x_0 = c: the state at t is (1 - t) c + t eps."""
    c, fresh = 2.0, torch.full((2, 3), 5.0)
    states = renoised_states(
        lambda x, t: (x - c) / t[:, None], torch.ones(2, 3), uniform_schedule(4), lambda: fresh
    )
    for x, t in states:
        expected = torch.ones(2, 3) if t == 1.0 else (1 - t) * c + t * fresh
        assert torch.equal(x, expected)


@pytest.mark.parametrize("sampler", ["flow", "map", "renoise"])
def test_samples_can_be_repeated(sampler):
    network = ToyTokens()
    draw = StudentSampler(
        lambda x, t, cond, *end: network(x, t, cond), DistillConfig(student_steps=3), sampler
    )
    noise = torch.randn(4, 3)
    assert draw.nfe == 3
    assert torch.equal(draw(noise, None), draw(noise, None))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("objective", sorted(get_args(ObjectiveName)))
def test_every_objective_trains_and_samples(objective, steps):
    distiller = toy_distiller(objective, student_steps=steps)
    before = [p.detach().clone() for p in distiller.parameters_of("student")]
    for seed in range(3):
        distiller.step(condition(distiller, seed=seed))
    after = distiller.parameters_of("student")
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert torch.isfinite(distiller.generate(torch.randn(4, 3), torch.zeros(4, 1))).all()


def test_an_objective_without_an_auxiliary_keeps_none():
    distiller = toy_distiller("cd")
    assert distiller.roles == ("student",) and list(distiller.optimizers) == ["student"]
    assert not list(distiller.backbone.aux.parameters())
    assert distiller.next_role == "student" and "aux" not in distiller.state_dict()


def test_the_wrong_engine_says_what_to_call():
    backbone = CopiedBackbone(ToyTokens(), sample_shape=(3,))
    with pytest.raises(ValueError, match=r"objective='cd' call make_distiller"):
        Distiller(backbone, ComparisonConfig(objective="cd"))
    with pytest.raises(ValueError, match=r"'cd' cannot be captured; set train\.capture to auto"):
        make_distiller(backbone, ComparisonConfig(objective="cd"), capture="on")
    assert type(make_distiller(backbone, DistillConfig())) is Distiller


def test_a_shared_network_is_refused():
    network = GaussianNetwork(dim=3)
    network.layer = torch.nn.Linear(3, 3)
    bank = AdapterBank(network, rank=1, alpha=1.0, targets=("layer",))
    backbone = SharedBackbone(network, adapters=bank, sample_shape=(3,))
    with pytest.raises(ValueError, match="expected a CopiedBackbone, got SharedBackbone"):
        ComparisonDistiller(backbone, ComparisonConfig(objective="cd"))


def test_import_loads_none_of_the_compared_objectives():
    names = (*COMPARED, "objectives", "batch", "sampling", "distiller")
    modules = [f"mfd_fast.baselines.{name}" for name in names]
    assert all(importlib.util.find_spec(module) for module in modules)
    code = (
        "import sys, torch, mfd_fast; from mfd_fast import CopiedBackbone, DistillConfig; "
        "backbone = CopiedBackbone(torch.nn.Linear(1, 1), sample_shape=(1,)); "
        "mfd_fast.make_distiller(backbone, DistillConfig()); "
        f"print([m for m in {modules} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
