"""Gradients of a step against literal transcriptions: separate evaluation, draws, micro-batches."""

import pytest
import torch
from test_distiller import DIM, cond_backbone, small_distiller

from mfd_fast import DistillConfig, Distiller, guided, interpolate, mean_velocity, mfd_loss
from mfd_fast.testing.numerics import assert_as_accurate


def separate_gradients(backbone, config, table, cond, z, eps):
    """A literal transcription of method.md section 4: one network, one trajectory at a time."""
    t, order = table.times[0], torch.arange(len(cond))
    r = t - table.span * table.start_weight
    x0, k = z, config.student_steps
    for step in range(k):
        x0 = x0 - backbone.student(x0, torch.full((len(z),), 1 - step / k), cond) / k
    x_t = interpolate(x0, eps.to(x0.dtype), t)
    null = torch.zeros_like(cond)
    u_aux, u_teacher = [], []
    for i in order:
        c, n, row = cond[i : i + 1], null[i : i + 1], slice(i, i + 1)

        def aux(x, time, c=c):
            return backbone.aux(x, time, c)

        teacher = guided(
            lambda x, time, c=c: backbone.teacher(x, time, c),
            lambda x, time, n=n: backbone.teacher(x, time, n),
            config.guidance,
        )
        with torch.no_grad():
            arguments = (x_t[row], t[row], r[row])
            kwargs = {"step_size": config.step_size}
            u_aux.append(mean_velocity(aux, *arguments, **kwargs))
            u_teacher.append(mean_velocity(teacher, *arguments, **kwargs))
    mfd_loss(x_t, torch.cat(u_teacher), torch.cat(u_aux)).backward()
    return [p.grad for p in backbone.student.parameters()]


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("student_steps", [1, 4])
@pytest.mark.parametrize("objective", ["mfd", "vsd"])
def test_student_gradients_equal_separate_evaluation(guidance, batch, objective, student_steps):
    backbone = cond_backbone()
    config = DistillConfig(
        guidance=guidance,
        step_size=0.1,
        objective=objective,
        equal_fraction=0.2,
        student_steps=student_steps,
    )
    distiller = Distiller(backbone, config)
    objective = distiller.objective
    table = objective.draw(batch, torch.Generator().manual_seed(batch))
    cond = torch.randn(batch, 1)
    z, eps = torch.randn(batch, DIM), torch.randn(batch, DIM)

    prepared = backbone.prepare(cond)
    x0 = distiller._sample_student(z, prepared)
    loss, _ = objective.student_loss(backbone, prepared, x0, eps, table)
    ours = torch.autograd.grad(loss, list(backbone.student.parameters()))

    eager = separate_gradients(backbone, config, table, cond, z, eps)
    eager = [g.clone() for g in eager]
    backbone.zero_grad()
    exact = separate_gradients(
        backbone.double(), config, table, cond.double(), z.double(), eps.double()
    )
    for actual, theirs, truth in zip(ours, eager, exact, strict=True):
        assert_as_accurate(actual, theirs, truth)


def test_draws_per_sample_average_the_gradients_of_single_draws():
    """k draws of (t, eps) on the same samples: the mean of the k single gradients."""
    draws, batch = 3, 4
    distiller = small_distiller(aux_draws_per_sample=draws)
    cond, t = torch.randn(batch, 1), torch.rand(batch * draws)
    z, eps = torch.randn(batch, DIM), torch.randn(batch * draws, DIM)
    numbers = [eps, z]
    distiller._noise = lambda *_: numbers.pop()
    distiller._aux_backward(cond, t)
    ours = [p.grad.clone() for p in distiller.backbone.parameters_of("aux")]

    def single_draws(dtype):
        backbone = distiller.backbone.to(dtype)
        with torch.no_grad():
            x0 = z.to(dtype) - backbone.student(z.to(dtype), torch.ones(batch), cond.to(dtype))
        total = 0.0
        for k in range(draws):
            rows = slice(k, None, draws)
            noise, time = eps[rows].to(dtype), t[rows].to(dtype)[:, None]
            x_t = (1 - time) * x0 + time * noise
            v = backbone.aux(x_t, t[rows].to(dtype), cond.to(dtype))
            total = total + (v - (noise - x0)).square().mean() / draws
        return torch.autograd.grad(total, backbone.parameters_of("aux"))

    eager, exact = single_draws(torch.float32), single_draws(torch.float64)
    for actual, theirs, truth in zip(ours, eager, exact, strict=True):
        assert_as_accurate(actual, theirs, truth)


def test_micro_batches_average_the_gradients_of_the_parts():
    """The same samples in one batch or in two halves: the same auxiliary gradient."""
    cond, t = torch.randn(4, 1), torch.rand(4)
    z, eps = torch.randn(4, DIM), torch.randn(4, DIM)

    def gradients(parts, dtype=torch.float32):
        distiller = small_distiller(micro_batches=parts)
        distiller.backbone.to(dtype).dtype = dtype
        for c, time, noise, mixed in zip(*(x.chunk(parts) for x in (cond, t, z, eps)), strict=True):
            numbers = [mixed.to(dtype), noise.to(dtype)]
            distiller._noise = lambda *_, numbers=numbers: numbers.pop()
            distiller._aux_backward(c.to(dtype), time)
        return [p.grad for p in distiller.backbone.parameters_of("aux")]

    together = zip(gradients(2), gradients(1), gradients(1, torch.float64), strict=True)
    for halves, whole, exact in together:
        assert_as_accurate(halves, whole, exact)
    with pytest.raises(ValueError, match=r"must divide into distill\.micro_batches=3"):
        small_distiller(micro_batches=3).aux_step(cond)


def test_gradient_enters_only_the_chosen_sampler_step():
    """student_backprop = last or random: the other evaluations are constants."""
    for choice in ("last", "random"):
        distiller = small_distiller(student_steps=4, student_backprop=choice)
        grads = []
        forward = distiller.backbone.forward

        def watched(x, t, prepared, lanes, forward=forward, grads=grads):
            grads.append(torch.is_grad_enabled())
            return forward(x, t, prepared, lanes)

        distiller.backbone.forward = watched
        for _ in range(6):
            grads.clear()
            distiller.student_step(torch.randn(2, 1))
            assert sum(grads[:4]) == 1 and not any(grads[4:])
            assert grads[3] or choice == "random"
