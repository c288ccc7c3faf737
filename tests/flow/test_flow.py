import math

import pytest
import torch

from mfd_fast.flow.times import (
    dpm_flow_schedule,
    sample_time_pairs,
    sample_times,
    shifted_schedule,
    uniform_schedule,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_logit_normal_has_its_quantiles():
    t = sample_times(100_000, "logit_normal", mean=-0.4, std=1.0, generator=generator())
    assert t.dtype == torch.float32
    for z in (-1.0, 0.0, 1.0):  # quantiles of the normal, through the sigmoid
        level = 0.5 * (1 + math.erf(z / math.sqrt(2)))
        share = (t <= torch.sigmoid(torch.tensor(-0.4 + z))).double().mean().item()
        assert abs(share - level) < 5 * math.sqrt(level * (1 - level) / len(t))  # five sigma


def test_pairs_of_uniforms_are_max_and_min():
    t, r = sample_time_pairs(100_000, "uniform", generator=generator())
    assert bool((t >= r).all())
    # E[max] = 2/3 and E[min] = 1/3 with variance 1/18; five standard errors.
    bound = 5 * math.sqrt(1 / 18 / len(t))
    assert abs(t.mean().item() - 2 / 3) < bound and abs(r.mean().item() - 1 / 3) < bound


def test_expected_number_of_steps_is_that_of_the_design():
    """E[N] at h = .02: 17.2 for uniform pairs, 12.5 for logit-normal(0, 1) ones."""
    from mfd_fast.flow.solvers import num_steps

    for distribution, expected in (("uniform", 17.2), ("logit_normal", 12.5)):
        t, r = sample_time_pairs(50_000, distribution, generator=generator())
        assert num_steps(t, r, step_size=0.02).mean() == pytest.approx(expected, abs=0.15)


def test_interval_limits():
    t, r = sample_time_pairs(
        5000, "uniform", min_interval=0.1, max_interval=0.3, generator=generator()
    )
    assert (t - r).min() >= 0.1 - 1e-7 and (t - r).max() <= 0.3 + 1e-7
    t, r = sample_time_pairs(20_000, "uniform", equal_fraction=0.25, generator=generator())
    share = (t == r).double().mean().item()
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 20_000)
    t, r = sample_time_pairs(50, equal_fraction=1.0, generator=generator())
    assert torch.equal(t, r)


def test_same_seed_same_times():
    assert torch.equal(
        sample_times(9, generator=generator(3)), sample_times(9, generator=generator(3))
    )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"distribution": "beta"}, "one of"),
        ({"equal_fraction": 1.5}, r"equal_fraction must be in \[0, 1\], got 1.5"),
        ({"min_interval": 1.0}, "min_interval must be"),
        ({"max_interval": 0.1, "min_interval": 0.2}, "max_interval must be above min_interval 0.2"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        sample_time_pairs(4, generator=generator(), **kwargs)


def test_unreachable_min_interval_says_so(monkeypatch):
    monkeypatch.setattr("mfd_fast.flow.times.MAX_REDRAWS", 5)
    with pytest.raises(ValueError, match="lower min_interval or widen"):
        sample_time_pairs(4, "logit_normal", std=0.0, min_interval=0.5, generator=generator())


def test_schedules():
    assert uniform_schedule(4).nodes == (1.0, 0.75, 0.5, 0.25, 0.0)
    shifted = shifted_schedule(2, shift=3.0).nodes
    assert shifted == pytest.approx((1.0, 0.75, 0.0))
    sana = dpm_flow_schedule(4)
    assert [round(s, 4) for s in sana.nodes] == [0.9997, 0.8996, 0.7496, 0.4997, 0.0]
    assert [round(1000 * t) for t in sana.times] == [999, 899, 749, 499]
    with pytest.raises(ValueError, match="steps >= 1"):
        uniform_schedule(0)
