"""OccFM from data to table: pretraining, the task behind the presets, evaluation, pictures."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from mfd_fast.testing.numerics import assert_as_accurate

pytest.importorskip("matplotlib")

from mfd_fast.cli import main
from mfd_fast.distill.distiller import Distiller
from mfd_fast.models import preset
from mfd_fast.models.fit import FINAL_LR, FitConfig, fit, lr_factor
from mfd_fast.models.occfm import CONFIGS, OccfmNetwork, forecast
from mfd_fast.models.occfm.data.store import OccupancyStore
from mfd_fast.models.occfm.data.windows import OccupancyBatch, OccupancyWindows
from mfd_fast.models.occfm.evaluate import Windows, evaluate_forecasts, format_table
from mfd_fast.models.occfm.loading import load_transition, load_vae
from mfd_fast.models.occfm.presets import OccfmSettings
from mfd_fast.models.occfm.pretrain import (
    TeacherPretrain,
    VaePretrain,
    flow_matching_loss,
    pretrain_teacher,
    pretrain_vae,
)
from mfd_fast.models.occfm.task import DTYPES, OccfmTask
from mfd_fast.models.occfm.tiny import make_tiny_files
from mfd_fast.models.occfm.vae.vae3d import OccupancyVae3d
from mfd_fast.run.config import TrainConfig


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Teacher, VAE, store."""
    return make_tiny_files(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def config(files):
    teacher, vae, store = files
    return replace(
        preset("occfm-tiny"),
        teacher=str(teacher),
        occfm=OccfmSettings(store=str(store), vae=str(vae)),
        train=TrainConfig(updates=1, batch_size=2, device="cpu"),
    )


# Pretraining --------------------------------------------------------------------------------


def test_pretrained_files_are_what_was_trained(files, tmp_path):
    store = str(files[2])
    settings = {"store": store, "updates": 2, "batch_size": 2, "warmup_updates": 1, "device": "cpu"}
    metrics = pretrain_vae(VaePretrain(**settings), tmp_path)
    assert json.loads((tmp_path / "vae_metrics.json").read_text()) == metrics
    vae = load_vae(tmp_path / "vae.safetensors")
    assert metrics["parameters"] == sum(p.numel() for p in vae.parameters())
    assert len(metrics["losses"]) == 1 and np.isfinite(metrics["losses"][0])

    pretrain_teacher(TeacherPretrain(**settings), tmp_path)
    teacher = load_transition(tmp_path / "teacher.safetensors")
    latents = OccupancyStore(files[2] / "training").array("latents")
    assert teacher.config.latent_scale == pytest.approx(1 / latents.std())
    before = (tmp_path / "teacher.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"already holds teacher.safetensors, teacher_"):
        pretrain_teacher(TeacherPretrain(**settings), tmp_path)
    assert (tmp_path / "teacher.safetensors").read_bytes() == before


class Spy(nn.Module):
    """Answers zero and remembers what it was asked."""

    def __init__(self, scale):
        super().__init__()
        self.config = replace(CONFIGS["tiny"], latent_scale=scale)

    def forward(self, x, t, cond):
        self.seen = x, t, cond
        return torch.zeros_like(x)


def test_the_flow_matching_loss_is_that_of_the_recipe(files):
    windows = OccupancyWindows(OccupancyStore(files[2] / "training"))
    batch = windows.windows([0, 1, 2] * 3)
    spy = Spy(scale=3.0)
    loss = flow_matching_loss(spy, batch, 0.5, torch.Generator().manual_seed(3))
    x_t, t, cond = spy.seen
    future = 3.0 * batch.latents[:, 6:].double()
    rate = t.double().reshape(9, 1, 1, 1, 1)
    noise = (x_t.double() - (1 - rate) * future) / rate
    expected = (noise - future).square().mean()
    # The noise is recovered by dividing float32 values by t >= .1: a few of their last bits.
    assert t.min() > 0.1
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(cond["trajectory"], batch.trajectory)  # never hidden
    kept = [torch.equal(a, b) for a, b in zip(cond["history"], batch.latents[:, :6], strict=True)]
    hidden = [not row.any() for row in cond["history"]]
    assert [a != b for a, b in zip(kept, hidden, strict=True)] == [True] * 9
    assert any(kept) and any(hidden)


def test_hiding_has_the_rate_it_is_given():
    spy, rows = Spy(1.0), 4000
    batch = OccupancyBatch(torch.ones(rows, 12, 1, 1, 1), torch.ones(rows, 12, 2))
    flow_matching_loss(spy, batch, 0.2, torch.Generator().manual_seed(0))
    hidden = rows - int(spy.seen[2]["history"][:, 0].sum())
    assert abs(hidden - 0.2 * rows) < 5 * (rows * 0.2 * 0.8) ** 0.5  # five standard deviations


def test_fit_finds_a_minimum_and_averages():
    network = nn.Linear(3, 1, bias=False)
    config = FitConfig(updates=400, lr=0.05, warmup_updates=10, weight_decay=0.0, ema_decay=0.9)
    target = torch.tensor([[1.0, -2.0, 0.5]])
    trained, metrics = fit(network, lambda n: (network.weight - target).square().sum(), config)
    assert trained is not network and not trained.training
    assert (trained.weight - target).abs().max() < 0.01
    assert metrics["losses"][0] > 1 > 0.01 > metrics["losses"][-1]


def test_learning_rate_and_decay_follow_the_recipe():
    config = FitConfig(updates=1000, warmup_updates=100, lr=1.0, weight_decay=0.25)
    factors = [lr_factor(config, n) for n in range(1001)]
    assert factors[0] == 0.01 and factors[99] == factors[100] == 1.0
    assert factors[550] == pytest.approx((1 + FINAL_LR) / 2) and factors[1000] == FINAL_LR

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.adaLN_modulation, self.proj = (nn.Linear(1, 1) for _ in range(3))

    network = Named()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    one = replace(config, updates=1, warmup_updates=0)
    fit(network, lambda n: 0 * sum(p.sum() for p in network.parameters()), one)
    for name, parameter in network.named_parameters():
        kept = 0.75 if name.startswith("proj") else 1.0
        assert torch.equal(parameter.detach(), kept * before[name]), name


# Task ---------------------------------------------------------------------------------------


def test_conditions_depend_on_the_update_alone(config):
    task, again = OccfmTask(config).conditions(), OccfmTask(config).conditions()
    for n in (3, 0):
        first, second = task(n), again(n)
        assert first["history"].shape == (2, 6, 4, 10, 10)
        assert first["trajectory"].shape == (2, 12, 2)
        for key in first:
            assert torch.equal(first[key], second[key])
    # the tiny network has four real history frames
    assert not first["history"][:, :2].any() and first["history"][:, 2:].any()


def test_files_that_do_not_fit_are_refused(config, files, tmp_path):
    with pytest.raises(ValueError, match=r"--teacher FILE and --occfm.store STORE, got '' and '/"):
        OccfmTask(replace(config, teacher=""))
    with pytest.raises(ValueError, match="student_solver must be euler"):
        OccfmTask(replace(config, distill=replace(config.distill, student_solver="heun")))
    with pytest.raises(FileNotFoundError, match="is not a prepared split"):
        OccfmTask(replace(config, occfm=OccfmSettings(store=str(tmp_path))))
    from mfd_fast.models.occfm.loading import save_occfm_transition

    wide = OccfmNetwork(replace(CONFIGS["tiny"], latent_channels=5))
    save_occfm_transition(wide, tmp_path / "wide.safetensors")
    with pytest.raises(
        ValueError, match=r"latents in .* are \[4, 10, 10\], those of .*\[5, 10, 10\]"
    ):
        OccfmTask(replace(config, teacher=str(tmp_path / "wide.safetensors")))


def test_a_whole_run_and_what_follows_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--distill.step-size", "0.5", "--distill.aux-updates", "1", "--num-eval-samples", "1"]
    command = ["distill", "occfm-tiny", "--out", "run", "--train.updates", "1", *small]
    assert main(command) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    names = [line.split("|")[1].strip() for line in table]
    assert names[1:] == ["last frame", "VAE", "teacher, 10 steps", "teacher, 1 step",
                         "student, 1 step"]  # fmt: skip
    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"forecast.png", "forecast.gif", "training_curves.png", "student.safetensors"} <= made
    rows = json.loads((tmp_path / "run/results.json").read_text())["table"]
    assert [row["nfe"] for row in rows] == [None, None, 20, 2, 1]

    assert main(["evaluate", "run", "--num-samples", "1"]) == 0
    again = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    columns = len(again[0].split("|")) - 4  # without the times
    assert [line.split("|")[:columns] for line in again] == [
        line.split("|")[:columns] for line in table
    ]
    assert main(["sample", "run", "--num", "1", "--out", "forecasts.png"]) == 0
    assert (tmp_path / "forecasts.png").stat().st_size > 10_000


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_adapters_are_saved_as_a_whole_network(config, tmp_path, dtype):
    adapted = OccfmSettings(store=config.occfm.store, vae=config.occfm.vae, rank=4, dtype=dtype)
    distill = replace(config.distill, step_size=0.5, aux_updates=1)
    if dtype == "float16":
        distill = replace(distill, loss_scale=1024.0)
    task = OccfmTask(replace(config, occfm=adapted, distill=distill))
    distiller = Distiller(task.backbone(), task.config.distill, schedule=task.schedule())
    cond = task.conditions()(0)
    for parameter in distiller.backbone.parameters_of("student"):
        parameter.data.normal_(std=0.05)
    distiller.backbone.refresh("student")
    metrics = [distiller.step(cond) for _ in range(2)]
    assert all(torch.isfinite(value) for row in metrics for value in row.values())

    task.save_student(distiller, tmp_path / "student.safetensors")
    student = load_transition(tmp_path / "student.safetensors", dtype=DTYPES[dtype])
    noise = torch.randn(2, *student.config.sample_shape)
    merged = forecast(student, noise, cond, steps=1, guidance=1.0) * student.config.latent_scale
    x, t = noise.double(), torch.ones(2)
    rows = {key: value.double() for key, value in cond.items()}
    exact = x - student.double()(x, t, rows)
    # A sum of weights and a sum of products round alike.
    assert_as_accurate(distiller.generate(noise, cond), merged, exact)
    plain = OccfmTask(config).teacher
    assert not torch.allclose(plain(noise, t, cond), noise - merged.float(), rtol=0.01)


def test_full_copies_train_in_half_precision_with_a_loss_scale(config):
    half = replace(config, occfm=replace(config.occfm, dtype="float16"))
    with pytest.raises(ValueError, match=r"float16 needs a loss scale.* distill.loss_scale 65536"):
        OccfmTask(half)
    distill = replace(half.distill, loss_scale=1024.0, step_size=0.5, aux_updates=1)
    task = OccfmTask(replace(half, distill=distill))
    distiller = Distiller(task.backbone(), distill, schedule=task.schedule())
    before = [p.clone() for p in distiller.backbone.parameters_of("student")]
    assert {p.dtype for p in before} == {torch.float32}
    cond = task.conditions()(0)
    for _ in range(2):
        distiller.step(cond)
    assert distiller.skipped == 0
    after = distiller.backbone.parameters_of("student")
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    noise = torch.randn(2, *task.teacher.config.sample_shape)
    with torch.no_grad():
        half_v = task.teacher(noise, torch.ones(2), cond)
    assert half_v.dtype == torch.float16  # the products are what is in half precision


# Evaluation ---------------------------------------------------------------------------------


def test_a_perfect_forecast_scores_one_hundred(files):
    teacher, vae, store = files
    windows = Windows(
        OccupancyWindows(OccupancyStore(store / "validation")), load_transition(teacher)
    )
    truth = {windows.cond([i])["trajectory"].numpy().tobytes(): i for i in windows.spread(9)}

    class Perfect:
        nfe = 0

        def __call__(self, noise, cond):
            rows = [truth[row.numpy().tobytes()] for row in cond["trajectory"]]
            return windows.truth(rows)

    rows = evaluate_forecasts({"perfect": Perfect()}, windows, load_vae(vae), num=9, seed=0)
    assert [row["name"] for row in rows] == ["last frame", "VAE", "perfect"]
    assert all(row["num_windows"] == len(windows.windows) == 3 for row in rows)
    perfect, last = rows[2], rows[0]
    assert perfect["iou_mean_of_frames"] == perfect["miou_mean_of_frames"] == 100.0
    assert last["iou_1s"] > last["iou_3s"] > 20  # the world moves away from the last frame
    assert perfect["latency"] > 0 and last["latency"] is None
    lines = format_table(rows).split("\n\n")[0].splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 5


def test_distances_of_clips_are_added_with_a_vae_of_clips(files):
    teacher, vae, store = files
    windows = Windows(
        OccupancyWindows(OccupancyStore(store / "validation")), load_transition(teacher)
    )
    clips = OccupancyVae3d(replace(load_vae(vae).config, clip=6)).eval()
    rows = evaluate_forecasts({}, windows, load_vae(vae), vae3d=clips, num=3, seed=0)
    assert all(row["fid"] > 0 and row["fvd"] > 0 for row in rows)
    assert "FVD" in format_table(rows) and rows[0]["fvd"] < rows[1]["fvd"]  # the VAE is random


def test_noise_belongs_to_the_window(files):
    windows = Windows(
        OccupancyWindows(OccupancyStore(files[2] / "validation")), load_transition(files[0])
    )
    assert windows.spread(2) == [0, 1] and windows.spread(100) == [0, 1, 2]
    together, alone = windows.noise([0, 2], 1), windows.noise([2], 1)
    assert torch.equal(together[1], alone[0]) and not torch.equal(together[0], together[1])
    assert not torch.equal(windows.noise([2], 2), alone)


def test_the_command_prepares_the_latents_of_a_vae(files, tmp_path, capsys):
    _, vae, store = files
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(store.parent / "data" / "nuscenes", data / "nuscenes")
    command = ["prepare", "occfm", "--data", str(data), "--out", str(out), "--vae", str(vae)]
    assert main(command) == 0
    assert "latents [4, 10, 10]" in capsys.readouterr().out
    for split in ("training", "validation"):
        made, expected = (
            OccupancyStore(folder / split).array("latents") for folder in (out, store)
        )
        assert np.array_equal(made, expected)
