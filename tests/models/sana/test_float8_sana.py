"""FP8 in a whole SANA: which products, the error of its velocities, distilling it, capturing it."""

import json
import math
import re
from functools import partial

import pytest
import torch
from recorded_graph import RecordedGraph

from mfd_fast import DistillConfig, Distiller, SharedBackbone
from mfd_fast.backbones import float8
from mfd_fast.backbones.float8 import use_float8
from mfd_fast.backbones.lanes import AUX, STUDENT, TEACHER, TEACHER_UNCOND
from mfd_fast.distill.captured import CapturedDistiller
from mfd_fast.distill.graphs import check_capture_safe
from mfd_fast.ops import reference
from mfd_fast.run.config import TrainConfig
from mfd_fast.run.float8_error import velocity_error, without_float8

TRIPLE = (TEACHER, TEACHER_UNCOND, AUX)
SMALL = {"min_side": 1, "min_outputs": 16}  # every product of a small network pays

sana_models = pytest.importorskip("sana_models", reason="needs diffusers")


def sana_backbone(dtype=torch.float32, theirs=None):
    network = sana_models.make_ours(theirs or sana_models.make_theirs(), time_table=True).to(dtype)
    bank = sana_models.make_bank(network)
    return SharedBackbone(
        network,
        adapters=bank,
        sample_shape=(4, 8, 6),
        null_cond=lambda cond: cond | {"text": torch.zeros_like(cond["text"])},
    )


def sana_distiller(backbone, kind=Distiller, **options):
    config = DistillConfig(
        aux_updates=1, student_steps=2, step_size=0.2, grid=1000, student_updates=1
    )
    return kind(backbone, config, **options)


PRODUCTS = 6  # of a block: q k v, two outputs, q for the text, the two ends of the convolution


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_large_product_of_a_sana_block_is_taken_and_adapters_are_added(dtype):
    """8 * 6 tokens a row; the time has a row a sample, the text is prepared outside."""
    backbone = sana_backbone(dtype)
    _, t, cond = sana_models.inputs(2, dtype)
    x = torch.randn(2, 3, 4, 8, 6)
    prepared = backbone.prepare(cond)
    with torch.no_grad():
        exact = backbone.forward(x, t, prepared, TRIPLE)
        use_float8(backbone, min_side=32, min_outputs=32)
        rounded = backbone.forward(x, t, prepared, TRIPLE)
        with without_float8(backbone):
            again = backbone.forward(x, t, prepared, TRIPLE)
    assert torch.equal(again, exact) and rounded.dtype == exact.dtype
    assert len(backbone.float8.copies) == PRODUCTS * len(backbone.network.transformer_blocks)
    assert all(copy.values.shape[0] >= 32 for copy in backbone.float8.copies.values())
    moved = (rounded - exact).flatten(2).norm(dim=2)
    assert (moved > 0).all()
    # the auxiliary's adapter is there: its lane is nearer to itself than to the teacher's lane
    assert (moved[:, 2] < (exact[:, 2] - exact[:, 0]).flatten(1).norm(dim=1)).all()


@torch.no_grad()
def test_the_table_of_times_is_made_in_the_networks_dtype():
    """It is made inside the first call and stays for all: 1,001 rows would pay."""
    theirs = sana_models.make_theirs()
    tables = []
    for is_on in (False, True):
        backbone = sana_backbone(theirs=theirs)
        if is_on:
            use_float8(backbone, **SMALL)
        _, t, cond = sana_models.inputs(2)
        backbone.forward(torch.randn(2, 1, 4, 8, 6), t, backbone.prepare(cond), (TEACHER,))
        tables.append(backbone.network._times)
    assert torch.equal(*tables) and len(tables[1]) == 1001


def test_calls_with_gradient_are_untouched_bit_for_bit():
    results = []
    for is_on in (False, True):
        torch.manual_seed(3)
        backbone = sana_backbone()
        if is_on:
            use_float8(backbone, **SMALL)
        _, t, cond = sana_models.inputs(2)
        x = torch.randn(2, 1, 4, 8, 6, requires_grad=True)
        v = backbone.forward(x, t, backbone.prepare(cond), (STUDENT,))
        v.square().mean().backward()
        results.append((v.detach(), x.grad, backbone.parameters_of("student")[0].grad))
    assert not backbone.float8.copies
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def one_bit_less(x):
    """Rows with the two bits of e5m2 behind the leading one, where e4m3 has three."""
    scale = reference.quantize_rows(x)[1]
    return (x.float() / scale).to(torch.float8_e5m2).float(), scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_of_a_sana_is_below_that_of_one_bit_less(dtype, monkeypatch):
    """e5m2 rounds every factor twice as coarsely; to first order its error is twice as large."""
    distiller, cond = sana_distiller(sana_backbone(dtype)), sana_models.inputs(2, dtype)[2]
    use_float8(distiller.backbone, **SMALL)
    states = distiller.generator.get_state(), distiller.host_generator.get_state()
    fine = velocity_error(distiller, cond)
    assert torch.equal(states[0], distiller.generator.get_state())
    assert torch.equal(states[1], distiller.host_generator.get_state())
    assert velocity_error(distiller, cond) == fine  # the same noise
    monkeypatch.setattr(float8, "quantize_rows", one_bit_less)
    use_float8(distiller.backbone, **SMALL)
    coarse = velocity_error(distiller, cond)
    for role in ("teacher", "auxiliary"):
        assert math.isfinite(fine[role]) and 0 < fine[role] < coarse[role]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sana_is_distilled(dtype):
    distiller, cond = sana_distiller(sana_backbone(dtype)), sana_models.inputs(2, dtype)[2]
    use_float8(distiller.backbone, **SMALL)
    before = [distiller.backbone.parameters_of(role)[0].clone() for role in ("aux", "student")]
    for _ in range(4):
        metrics = distiller.step(cond)
        assert all(value.isfinite() for value in metrics.values())
    assert distiller.num_updates == {"aux": 2, "student": 2} and distiller.skipped.item() == 0
    assert distiller.backbone.float8.copies
    for old, role in zip(before, ("aux", "student"), strict=True):
        assert not torch.equal(old, distiller.backbone.parameters_of(role)[0])


@torch.no_grad()
def test_an_ode_step_can_be_captured():
    backbone = sana_backbone()
    use_float8(backbone, **SMALL)
    _, t, cond = sana_models.inputs(2)
    prepared = backbone.prepare(cond)
    x = [torch.randn(2, 3, 4, 8, 6) * scale for scale in (0.0, 1.0)]

    def step(i):
        return backbone.forward(x[i], t, prepared, TRIPLE)

    step(0)
    check_capture_safe(step)


def test_captured_updates_equal_eager_ones():
    """The copies are made while it warms up; a replay makes none and reads none that moved."""
    theirs, distillers = sana_models.make_theirs(), []
    for kind, options in ((Distiller, {}), (CapturedDistiller, {"graph": RecordedGraph})):
        distillers.append(sana_distiller(sana_backbone(theirs=theirs), kind, **options))
        use_float8(distillers[-1].backbone, **SMALL)
    eager, captured = distillers
    for _ in range(12):
        cond = sana_models.inputs(2)[2]
        expected, got = eager.step(cond), captured.step(cond)
        assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert len(captured.backbone.float8.copies) == len(eager.backbone.float8.copies)


def test_off_by_default():
    assert TrainConfig().float8 is False and sana_backbone().float8 is None


def test_a_run_says_its_error_once_at_the_start(monkeypatch, tmp_path, capsys):
    """By the command line on the packaged tiny SANA, whose products would not pay."""
    pytest.importorskip("matplotlib")
    from mfd_fast import cli
    from mfd_fast.run import session as runner

    command = ["distill", "sana-tiny", "--train.float8", "--train.device", "cpu"]
    command += ["--train.updates", "1", "--distill.aux-updates", "1", "--num-eval-samples", "1"]
    assert cli.main([*command, "--out", str(tmp_path / "refused")]) == 2
    assert "no product has 266 rows and terms and 798 outputs" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
    monkeypatch.setattr(runner, "use_float8", partial(use_float8, **SMALL))
    assert cli.main([*command, "--out", str(tmp_path / "run")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    (said,) = re.findall(r"(\d+ weights in e4m3, \S+ MB; error of the velocity .*?%.*?%)", out)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["float8"] == said
