"""The engine computes what the literal diffusers + PEFT loop computes with the published settings.

The literal loop takes one sample after the other; the engine takes all of them in one batch, with
intervals of different length (one of them of none), so this is also a test of lane packing.
"""

import copy
import math

import pytest
import torch
from sana_models import (
    ALPHA,
    RANK,
    inputs,
    lora_keys,
    make_bank,
    make_exact,
    make_ours,
    make_theirs,
    pooled,
)

from mfd_fast import DistillConfig, Distiller, dpm_flow_schedule
from mfd_fast.backbones.shared import SharedBackbone
from mfd_fast.distill.objectives import MeanFlowDistillation
from mfd_fast.flow.solvers import plan
from mfd_fast.testing.numerics import assert_as_accurate

peft = pytest.importorskip("peft")
baseline = pytest.importorskip("bench.updates.literal")

SETTINGS = baseline.OfficialSettings(rank=RANK, alpha=ALPHA)
CONFIG = DistillConfig(
    guidance=4.5, step_size=0.02, grid=1000, student_steps=4, student_solver="dpmpp_2m"
)
INTERVALS = ((637, 385), (180, 95), (241, 241))  # 13, 5 and 0 steps
AUX_TIMES = (3, 500, 997)


class ExactScheduler:
    """DPM-Solver++ 2M of a flow in float64; diffusers' own keeps its states in float32."""

    def set_timesteps(self, steps, device):
        grid = [0.999 * (1 - k / steps) for k in range(steps)]
        self.sigmas = [*(3 * s / (1 + 2 * s) for s in grid), 0.0]
        self.timesteps = [math.floor(1000 * sigma) for sigma in self.sigmas[:-1]]
        self.data = []

    def step(self, v, timestep, x, return_dict):
        k = len(self.data)
        sigma, following = self.sigmas[k], self.sigmas[k + 1]
        data = x - sigma * v
        mean = data
        if k > 0 and following > 0:
            snr = [math.log((1 - s) / s) for s in self.sigmas[k - 1 : k + 2]]
            mean = data + (data - self.data[-1]) * (snr[2] - snr[1]) / (snr[1] - snr[0]) / 2
        self.data.append(data)
        ratio = following / sigma
        return (ratio * x + ((1 - following) - (1 - sigma) * ratio) * mean,)


class Case:
    """One draw of everything: weights, adapters, noise, prompts."""

    def __init__(self):
        torch.manual_seed(0)
        self.theirs = make_theirs()
        self.network = make_ours(self.theirs, time_table=True)
        self.bank = make_bank(self.network)
        x, _, self.cond = inputs(len(INTERVALS))
        drawn = torch.Generator().manual_seed(CONFIG.seed)  # what the engine will draw
        self.noise, self.eps = (torch.randn(x.shape, generator=drawn) for _ in range(2))
        self.null = {"text": torch.randn_like(self.cond["text"][:1])}
        self.null["mask"] = torch.arange(self.null["text"].shape[1])[None] < 1

    def literal(self, model, scheduler):
        """The literal loop on a model, with this case's adapters."""
        loop = baseline.LiteralLoop(model, scheduler, SETTINGS)
        for name in (baseline.AUX, baseline.STUDENT):
            state = self.bank.adapter_state_dict(name, prefix="")
            result = peft.set_peft_model_state_dict(model, state, adapter_name=name)
            assert not result.unexpected_keys
        return loop

    def eager(self):
        return self.literal(copy.deepcopy(self.theirs), baseline.flow_scheduler())

    def exact(self):
        return self.literal(make_exact(self.theirs), ExactScheduler())

    def samples(self, dtype):
        """Noise, eps, prompt and empty prompt of one sample after the other."""
        null = baseline.Prompt(self.null["text"].to(dtype), self.null["mask"])
        for i in range(len(INTERVALS)):
            one = slice(i, i + 1)
            prompt = baseline.Prompt(self.cond["text"][one].to(dtype), self.cond["mask"][one])
            yield self.noise[one].to(dtype), self.eps[one].to(dtype), prompt, null

    def ours(self):
        def null(cond):
            return {key: value.expand_as(cond[key]) for key, value in self.null.items()}

        backbone = SharedBackbone(
            self.network, adapters=self.bank, sample_shape=(4, 8, 6), null_cond=null
        )
        distiller = Distiller(backbone, CONFIG, schedule=dpm_flow_schedule(4))
        distiller.objective = FixedIntervals(CONFIG)
        return distiller


class FixedIntervals(MeanFlowDistillation):
    """The intervals of this file; keeps the mean velocities that the loss was made of."""

    def draw(self, batch, generator):
        t, r = torch.tensor(INTERVALS).float().div(1000).unbind(1)
        self.table = plan(t, r, step_size=self.config.step_size, grid=self.config.grid)
        assert self.table.order is None
        return self.table

    def loss(self, x_t, ends, t, span):
        weight, span_ = (y.view(-1, 1, 1, 1) for y in (self.table.start_weight, span))
        x = x_t.detach()
        self.u_teacher, self.u_aux = ((weight * x - end) / span_ for end in ends.unbind(1))
        return super().loss(x_t, ends, t, span)


def gradients(loop, role):
    return {key: parameter.grad for key, parameter in loop.parameters_of(role).items()}


def assert_same_gradients(bank, role, eager, exact):
    """Every factor of the role; the other role has none."""
    other = "aux" if role == "student" else "student"
    assert bank.parameters_of(other)[0].grad is None
    adapter = bank.adapters[role]
    pairs = adapter.split(adapter.master.grad)
    eager, exact = gradients(eager, role), gradients(exact, role)
    keys = [key for target in bank.targets for key in lora_keys(target.name)]
    assert sorted(keys) == sorted(eager)
    parts = zip(keys, [factor for pair in pairs for factor in pair], strict=True)
    triples = [(grad, eager[key], exact[key]) for key, grad in parts]
    assert all(bool(grad.any()) for grad, _, _ in triples)
    assert_as_accurate(*pooled(triples))


def student_update(loop, case, dtype):
    """u_A, u_T and the student's gradients of the batch, literally."""
    velocities = []
    real = loop.mean_velocities

    def recorded(*args):
        velocities.append(real(*args))
        return velocities[-1]

    loop.mean_velocities = recorded
    for (t, r), (noise, eps, prompt, null) in zip(INTERVALS, case.samples(dtype), strict=True):
        (loop.student_loss(noise, eps, t, r, prompt, null) / len(INTERVALS)).backward()
    return [torch.cat(parts) for parts in zip(*velocities, strict=True)]


def test_student_update_is_the_literal_one():
    case = Case()
    eager, exact, ours = case.eager(), case.exact(), case.ours()
    u_eager, u_exact = (
        student_update(eager, case, torch.float32),
        student_update(exact, case, torch.float64),
    )
    ours._student_backward(case.cond)
    u_ours = (ours.objective.u_aux, ours.objective.u_teacher)
    for actual, expected, reference in zip(u_ours, u_eager, u_exact, strict=True):
        assert_as_accurate(actual, expected, reference)
    assert_same_gradients(case.bank, "student", eager, exact)


def test_auxiliary_update_is_the_literal_one():
    case = Case()
    eager, exact, ours = case.eager(), case.exact(), case.ours()
    for loop, dtype in ((eager, torch.float32), (exact, torch.float64)):
        for t, (noise, eps, prompt, _) in zip(AUX_TIMES, case.samples(dtype), strict=True):
            (loop.aux_loss(noise, eps, t, prompt) / len(AUX_TIMES)).backward()
    ours._aux_backward(case.cond, torch.tensor(AUX_TIMES).float() / 1000)
    assert_same_gradients(case.bank, "aux", eager, exact)


def test_steps_of_the_literal_loop():
    assert baseline.euler_ends(637, 385, 20) == [
        637, 618, 598, 579, 559, 540, 521, 501, 482, 463, 443, 424, 404, 385
    ]  # fmt: skip
    assert baseline.euler_ends(50, 10, 20) == [50, 30, 10]
    assert baseline.euler_ends(241, 241, 20) == [241]
