"""What an estimate says about formats of the frozen base and blocks on the host."""

import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from frozen_bases import PROMPTS, TOKENS, family_with, flux, plan_of
from tiny_pipelines import tiny_pipeline

from mfd_fast import DistillConfig, Distiller
from mfd_fast.backbones.quantized import COMPARED
from mfd_fast.backbones.swap import PLACES, BlockSwap
from mfd_fast.cost import estimate, plans
from mfd_fast.cost.cycle import network_calls
from mfd_fast.cost.devices import assumed, device_named
from mfd_fast.cost.table import text
from mfd_fast.models import preset
from mfd_fast.models.diffusers.backbone import backbone_of

pytest.importorskip("bitsandbytes")
predictions = sys.modules["mfd_fast.cost.estimate"]  # whose name is the function's, too


@pytest.mark.parametrize("enters", ["last", "all"])
def test_the_bytes_of_a_cycle_are_the_copied_ones(enters):
    """At least the passes less what is there already where a pass turns back."""
    network = flux("int8")
    plan = plan_of(network, 0.4)
    family, cond = family_with("flux1-dev", network, TOKENS)
    backbone = backbone_of(family, rank=2)
    swap = BlockSwap(backbone.network, plan, torch.device("cpu"))
    config = DistillConfig(
        **{"objective": "vsd", "guidance": 1.0, "student_steps": 2, "student_backprop": enters},
        aux_updates=2,
    )
    distiller = Distiller(backbone, config)
    for _ in range(2 * distiller.cycle_length):
        distiller.step(cond)
    calls = network_calls(config, len(PROMPTS))
    passes = 2 * sum(calls.values()) * plan.host_bytes
    backwards = 2 * (calls["aux/backward"] + calls["student/backward"])
    less = backwards * 2 * PLACES * plan.place
    assert passes - less <= swap.moved <= passes + backwards * plan.place + plan.place
    assert swap.missed <= 1 + backwards


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "flux1-dev"
    tiny_pipeline("flux1-dev").save_pretrained(folder)
    made = preset(str(folder))
    return replace(made, pipeline=replace(made.pipeline, resolution="64x64")).resolved()


@pytest.fixture(scope="module", autouse=True)
def traced_once():
    """The same cycle is asked for again and again."""
    once = cache(plans.cycle_of)
    with pytest.MonkeyPatch.context() as patch:
        for module in (plans, predictions):
            patch.setattr(module, "cycle_of", once)
        yield


def predicted(config, memory):
    return estimate(config, device_named("rtx4090", memory=memory), assumed(is_captured=False))


def with_base(config, **options):
    return replace(config, pipeline=replace(config.pipeline, **options))


def test_every_format_has_a_plan_and_smaller_ones_need_less(config):
    run = predicted(config, 24e9)
    assert tuple(plan.base for plan in run.bases) == COMPARED
    sizes = [plan.bytes for plan in run.bases]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    for plan in run.bases:
        own = predicted(with_base(config, base=plan.base), 24e9).bases[0]
        assert own.base == plan.base
        assert own.bytes == pytest.approx(plan.bytes, rel=0.01)  # of what is traced on the format
        assert own.seconds.high == pytest.approx(plan.seconds.high, rel=0.02)
    printed = text(run)
    assert "host blocks, GB" in printed
    assert f"--base {run.cheapest.base} --train.activation" in printed


def test_where_nothing_fits_blocks_go_to_the_host_and_pcie_may_bound(config, monkeypatch):
    small = with_base(config, base="int8")
    own = [plan for plan in predicted(small, 24e9).bases if plan.base == "int8"]
    least = min(plan.bytes for plan in predicted(small, 1.0).bases)
    limit = least - 2000
    run = predicted(small, limit)
    assert run.cheapest.swap is not None and run.cheapest.swap.swapped
    assert run.cheapest.bytes <= limit < own[0].bytes
    budget = run.cheapest.swap.resident
    asked = with_base(config, base=run.cheapest.base, base_memory=budget / 1e9)
    kept = replace(asked.train, activation=run.cheapest.activation)
    as_asked = predicted(replace(asked, train=kept), limit)
    assert as_asked.swap == run.cheapest.swap
    assert "on the host" in text(as_asked) and "--base-memory" in text(run)
    assert run.cheapest.bound != "PCIe"
    monkeypatch.setattr("mfd_fast.cost.devices.ASSUMED_PCIE", 1e-9)
    slow = predicted(replace(asked, train=kept), limit)
    assert {phase.bound for phase in slow.phases.values()} >= {"PCIe"}
    assert slow.cycle_seconds.low > as_asked.cycle_seconds.high
    assert slow.phases["student/optimizer"] == as_asked.phases["student/optimizer"]
