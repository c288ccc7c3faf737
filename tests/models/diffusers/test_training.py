"""Updates of the engine on the families: gradients, recomputation, and what can be captured."""

import pytest
import torch
from tiny_pipelines import PIPELINES
from tiny_runs import made

from mfd_fast import (
    AUX,
    TEACHER,
    TEACHER_UNCOND,
    DistillConfig,
    Distiller,
    interpolate,
    mean_velocity,
    mfd_loss,
)
from mfd_fast.backbones import activation as policies
from mfd_fast.distill.graphs import check_capture_safe
from mfd_fast.models.diffusers.sampler import student_sampler
from mfd_fast.testing.numerics import assert_as_accurate

PROMPTS = ["a red fox", "a much longer prompt: a cat on the snow under the stars"]
BOUND = 1e-3  # of the gradient's size
KINDS = {
    "linear": ("sd3", "aura-flow"),
    "renormalised": ("qwen-image", "lumina2"),
    "embedded": ("flux1-dev", "flux2-dev"),
    "lists, 1 + s": ("z-image", "krea2"),
    "own lengths": ("cogview4", "kandinsky5-t2i", "kandinsky5-t2v"),
    "from t = 80/81": ("cosmos2",),
    "a call for every length": ("omnigen",),
    "videos": ("wan", "wan2.2-a14b", "mochi"),
}


def noise_of(family, seed):
    return torch.randn(2, *family.sample_shape, generator=torch.Generator().manual_seed(seed))


def literal_samples(velocity, z, schedule):
    """The student's Euler steps from noise of one sample."""
    z = schedule.start * z
    for k, time in enumerate(schedule.times):
        step = schedule.nodes[k] - schedule.nodes[k + 1]
        z = z - step * velocity("student", z, torch.tensor([time]))
    return z


def literal_aux_gradient(family, backbone, cond, z, eps, t, schedule):
    """The flow-matching loss, a sample at a time."""
    bank, grads = backbone.adapters, 0.0
    for i in range(len(z)):
        row = slice(i, i + 1)
        c = {name: leaf[row] for name, leaf in cond.items()}

        def velocity(role, x, time, c=c):
            with bank.lanes(((role,),)):
                return backbone.network(x, time, c)

        with torch.no_grad():
            x0 = literal_samples(velocity, z[row], schedule)
        v = velocity("aux", interpolate(x0, eps[row], t[row]), t[row])
        loss = (v - (eps[row] - x0)).square().mean() / len(z)
        grads = grads + torch.autograd.grad(loss, bank.parameters_of("aux"))[0]
    return grads


def literal_gradient(family, backbone, cond, z, eps, table, schedule):
    """One network, one role and one sample at a time, called as the family calls it."""
    network, bank, grads = backbone.network, backbone.adapters, 0.0
    t = table.times[0]
    r = t - table.span * table.start_weight
    for i in range(len(z)):
        row = slice(i, i + 1)
        c = {name: leaf[row] for name, leaf in cond.items()}

        def velocity(role, x, time, c=c):
            with bank.lanes(((role,) if role else (),)):
                return network(x, time, c)

        def teacher(x, time, c=c):
            v = velocity("", x, time, c)
            if family.guidance == 1.0:
                return v
            u = velocity("", x, time, family.null(c))
            w = family.guidance
            return u + w * (v - u) if family.combine is None else family.combine(v, u, w)

        x0 = literal_samples(velocity, z[row], schedule)
        x_t = interpolate(x0, eps[row], t[row])
        ends = (x_t, t[row], r[row])
        with torch.no_grad():
            u_teacher = mean_velocity(teacher, *ends, step_size=0.2)
            u_aux = mean_velocity(lambda *a: velocity("aux", *a), *ends, step_size=0.2)
        loss = mfd_loss(x_t, u_teacher, u_aux) / len(z)
        grads = grads + torch.autograd.grad(loss, bank.parameters_of("student"))[0]
    return grads


@pytest.mark.parametrize("name", [name for names in KINDS.values() for name in names])
def test_student_gradients_are_those_of_a_sequential_transcription(name):
    family, backbone, cond = made(name, PROMPTS)
    schedule = student_sampler(family, cond, 2).schedule
    config = DistillConfig(student_steps=2, guidance=family.guidance, step_size=0.2)
    distiller = Distiller(backbone, config, schedule=schedule)
    table = distiller.objective.draw(2, torch.Generator().manual_seed(1))
    z, eps = noise_of(family, 1), noise_of(family, 2)
    prepared = backbone.prepare(cond)
    x0 = distiller._sample_student(z, prepared)
    loss, _ = distiller.objective.student_loss(backbone, prepared, x0, eps, table)
    (ours,) = torch.autograd.grad(loss, backbone.parameters_of("student"))
    theirs = literal_gradient(family, backbone, cond, z, eps, table, schedule)
    assert theirs.norm() > 0
    assert (ours - theirs).norm() < BOUND * theirs.norm()


@pytest.mark.parametrize("name", KINDS["own lengths"])
def test_auxiliary_gradients_are_those_of_a_sequential_transcription(name):
    family, backbone, cond = made(name, PROMPTS)
    schedule = student_sampler(family, cond, 2).schedule
    config = DistillConfig(student_steps=2, guidance=family.guidance)
    distiller, t = Distiller(backbone, config, schedule=schedule), torch.tensor([0.3, 0.8])
    noises = iter([noise_of(family, 1), noise_of(family, 2)])
    distiller._noise = lambda *shape: next(noises)
    distiller._backward = lambda role, loss: loss.backward()
    distiller._aux_backward(cond, t)
    (ours,) = (parameter.grad for parameter in backbone.parameters_of("aux"))
    theirs = literal_aux_gradient(
        family, backbone, cond, noise_of(family, 1), noise_of(family, 2), t, schedule
    )
    assert theirs.norm() > 0
    assert (ours - theirs).norm() < BOUND * theirs.norm()


@pytest.mark.parametrize("name", PIPELINES)
def test_recomputed_blocks_give_the_same_gradient(name):
    grads = []
    for activation in ("none", "block"):
        family, backbone, cond = made(name, PROMPTS, activation=activation)
        x, prepared = noise_of(family, 1)[:, None], backbone.prepare(cond)
        v = backbone.forward(x, torch.tensor([0.9, 0.4]), prepared, (AUX,))
        grads.append(torch.autograd.grad(v.square().mean(), backbone.parameters_of("aux"))[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("name", ["wan", "cosmos2", "z-image"])
def test_mlps_in_pieces_give_as_accurate_a_gradient(name, monkeypatch):
    monkeypatch.setattr(policies, "CHUNK", 5)
    grads = []
    for policy, dtype in (
        ("chunk", torch.float32),
        ("none", torch.float32),
        ("none", torch.double),
    ):
        family, backbone, cond = made(name, PROMPTS, activation=policy)
        backbone.to(dtype).dtype = dtype
        cond = {k: v.to(dtype) if v.is_floating_point() else v for k, v in cond.items()}
        x, prepared = noise_of(family, 1).to(dtype)[:, None], backbone.prepare(cond)
        v = backbone.forward(x, torch.tensor([0.9, 0.4]), prepared, (AUX,))
        grads.append(torch.autograd.grad(v.square().mean(), backbone.parameters_of("aux"))[0])
    assert_as_accurate(*grads)


def test_the_experts_of_hidream_keep_their_gradient():
    """Against a central difference along the gradient; in eval mode it is another."""
    family, backbone, cond = made("hidream", PROMPTS)
    backbone.double().dtype = torch.float64
    cond = {name: leaf.double() for name, leaf in cond.items()}
    x, prepared = noise_of(family, 1).double()[:, None], backbone.prepare(cond)
    (master,) = backbone.parameters_of("aux")

    def loss():
        return backbone.forward(x, torch.tensor([0.9, 0.4]), prepared, (AUX,)).square().mean()

    def error():
        (grad,) = torch.autograd.grad(loss(), [master])
        before, ends = master.detach().clone(), []
        for size in (1e-4, -1e-4, 0.0):
            with torch.no_grad():
                master.copy_(before + size * grad / grad.norm())
            ends.append(float(loss().detach()))
        return abs((ends[0] - ends[1]) / 2e-4 / float(grad.norm()) - 1)

    right = error()
    backbone.eval()
    wrong = error()
    assert 100 * right < wrong


@pytest.mark.parametrize("name", PIPELINES)
def test_what_can_be_captured_is_what_the_family_says(name):
    family, backbone, cond = made(name, PROMPTS)
    lanes = (TEACHER, TEACHER_UNCOND, AUX) if family.guidance != 1.0 else (TEACHER, AUX)
    prepared, t = backbone.prepare(cond), torch.tensor([0.9, 0.4])
    noise = [noise_of(family, i) for i in range(2)]

    def step(i):
        x = noise[i][:, None].expand(-1, len(lanes), *family.sample_shape)
        with torch.no_grad():
            backbone.forward(x, t, prepared, lanes)

    step(0)
    eager = ("lumina2", "hidream", "hidream-euler", "z-image", "chroma", "qwen-image")
    eager += ("wan2.2-a14b", "hunyuan-video", "mochi", "omnigen", *KINDS["own lengths"])
    assert bool(family.why_eager) == (name in eager)
    if family.why_eager:
        with pytest.raises(ValueError, match="a captured step may not"):
            check_capture_safe(step)
    else:
        assert check_capture_safe(step) > 0
