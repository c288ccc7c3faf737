"""Samples that serve several auxiliary updates: exact in a cycle, stale over cycles, counted."""

from collections import Counter
from functools import partial

import pytest
import torch
from recorded_graph import RecordedGraph
from small_runs import StopAfter, assert_same, make_backbone, make_distiller, next_cond, run

from mfd_fast.backbones.lanes import STUDENT
from mfd_fast.baselines.config import ComparisonConfig
from mfd_fast.baselines.distiller import ComparisonDistiller
from mfd_fast.cost.cycle import evaluations_of_lane, forward_evaluations
from mfd_fast.distill.captured import CapturedDistiller
from mfd_fast.distill.config import DistillConfig
from mfd_fast.flow.integrate import generate


def made_now(distiller, noise, cond):
    """What the student, as it is, makes of this noise."""
    prepared = distiller.backbone.prepare(cond)

    def velocity(x, t):
        return distiller.backbone.forward(x[:, None], t, prepared, (STUDENT,))[:, 0]

    with torch.no_grad():
        return generate(velocity, noise, steps=distiller.config.student_steps)


def noises(distiller):
    """The list to which every noise that is drawn from now on is added."""
    drawn, draw = [], distiller._noise

    def noted(*shape):
        drawn.append(draw(*shape))
        return drawn[-1]

    distiller._noise = noted
    return drawn


def learned_from(distiller):
    """The list to which the samples and the condition of every auxiliary update are added."""
    seen, backward = [], distiller._aux_backward

    def noted(cond, t, x0=None):
        loss, samples = backward(cond, t, x0)
        seen.append((samples, cond, t))
        return loss, samples

    distiller._aux_backward = noted
    return seen


def test_within_a_cycle_the_kept_samples_are_those_of_the_student_as_it_is():
    """Exact: at every auxiliary update of a cycle they are bit for bit what the student makes of
    the noise of the first; each update has times of its own; the student's update drops them.
    """
    distiller = make_distiller(aux_samples="cycle", aux_updates=4, student_steps=2)
    for cycle in range(3):
        drawn, seen = noises(distiller), learned_from(distiller)
        conds = [next_cond(5 * cycle + n) for n in range(5)]
        for cond in conds[:4]:
            distiller.step(cond)
            expected = made_now(distiller, drawn[0], conds[0])
            assert torch.equal(seen[-1][0], expected) and torch.equal(seen[-1][1], conds[0])
        assert len({t[0].item() for _, _, t in seen}) == 4
        assert len(drawn) == 1 + 4  # one for the samples, one for every update's x_t
        del distiller._noise, distiller._aux_backward
        distiller.step(conds[4])
        assert distiller.kept == []


def test_the_students_samples_are_stale_by_the_update_that_they_made():
    """They are what the student before its update made, with that update's condition; the student
    that is there makes others.
    """
    distiller = make_distiller(aux_samples="student", aux_updates=2, aux_kept=2)
    for n in range(5):
        distiller.step(next_cond(n))
    drawn, cond = noises(distiller), next_cond(5)
    before = distiller.backbone.student.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    distiller.student_step(cond)
    newest, older = distiller.kept
    assert not torch.equal(made_now(distiller, drawn[0], cond), newest[0])
    distiller.backbone.student.load_state_dict(before)
    assert torch.equal(made_now(distiller, drawn[0], cond), newest[0])
    assert torch.equal(newest[1], cond) and torch.equal(older[1], next_cond(2))
    seen = learned_from(distiller)
    for _ in range(4):
        distiller.aux_step(next_cond(9))
    taken = [int(torch.equal(samples, newest[0])) for samples, _, _ in seen]
    assert taken in ([0, 1] * 2, [1, 0] * 2)


KEEPING = {
    "cycle": {"aux_samples": "cycle", "aux_updates": 3},
    "student": {"aux_samples": "student", "aux_updates": 3},
    "two updates, parts": {"aux_samples": "student", "aux_kept": 2, "micro_batches": 2},
}


@pytest.mark.parametrize("name", KEEPING)
@pytest.mark.parametrize("n", [1, 5])
def test_a_run_with_kept_samples_continues_bit_for_bit(name, n, tmp_path):
    """Stopped where samples are kept, in the middle of a cycle; captured from there on, too."""
    whole, _ = run(tmp_path / "whole", updates=4, **KEEPING[name])
    first, _ = run(tmp_path / "parts", updates=4, stop=StopAfter(n), **KEEPING[name])
    assert first.kept
    make = {"make": partial(CapturedDistiller, graph=RecordedGraph)} if n == 5 else {}
    options = KEEPING[name] | make
    second, _ = run(tmp_path / "parts", updates=4, resumed=True, **options)
    assert_same(second.state_dict(), whole.state_dict())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"aux_samples": "cycle", "student_steps": 4, "student_updates": 2},
        {"aux_samples": "student", "aux_draws_per_sample": 3, "student_steps": 2},
        {"solver": "heun", "student_steps": 2, "student_solver": "heun", "guidance": 1.0},
    ],
)
def test_evaluations_of_a_cycle_are_those_that_a_run_makes(settings):
    """Counted at the backbone, phase by phase; E[N] is that of the tables which were drawn."""
    distiller = make_distiller(**{"aux_updates": 3} | settings)
    config, counts, tables, phases = distiller.config, Counter(), [], []
    for _ in range(config.aux_updates + config.student_updates):
        distiller.step(next_cond(0))  # what is kept from here on is that of a cycle before
    forward, draw = distiller.backbone.forward, distiller._draw_table

    class Phase:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            phases.append(self.name)

        def __exit__(self, *_):
            phases.pop()

    def counted(x, t, prepared, lanes):
        counts[phases[-1]] += x.shape[0] * len(lanes)
        return forward(x, t, prepared, lanes)

    def noted(cond):
        tables.append(draw(cond))
        return tables[-1]

    distiller.backbone.forward, distiller._draw_table, distiller.phase = counted, noted, Phase
    for _ in range(config.aux_updates + config.student_updates):
        distiller.step(next_cond(0))
    of_lane = sum(table.num_evaluations for table in tables) / config.student_updates / 8
    expected = forward_evaluations(config, of_lane)
    assert {phase: count for phase, count in expected.items() if count} == {
        phase: pytest.approx(count / 8) for phase, count in counts.items()
    }


def test_expected_evaluations_of_a_lane_are_the_mean_of_many_tables():
    """Without spread every pair is (1/2, 1/2): one evaluation; the same of a capped interval."""
    assert evaluations_of_lane(DistillConfig(time_std=0.0)) == 1.0
    config = DistillConfig(step_size=0.25, max_interval=0.25, time_distribution="uniform")
    assert evaluations_of_lane(config, rows=4) == 1.0


def test_an_objective_whose_auxiliary_generates_itself_refuses_kept_samples():
    config = ComparisonConfig(objective="dmd2", aux_samples="cycle")
    with pytest.raises(ValueError, match=r"aux_samples must be new for .*'dmd2'.*got 'cycle'"):
        ComparisonDistiller(make_backbone(), config)
