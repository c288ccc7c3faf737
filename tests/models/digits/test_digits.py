"""Digits: data, packaged teacher and classifier, measurement, pretraining, pictures."""

import json
import sys

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from mfd_fast.models.digits.classifier import augment
from mfd_fast.models.digits.data import load_digits
from mfd_fast.models.digits.dit import DiT, DiTConfig
from mfd_fast.models.digits.evaluate import draw_noise, evaluate_digits, format_table
from mfd_fast.models.digits.teacher import (
    FILES,
    PACKAGED,
    PretrainConfig,
    load_classifier,
    load_teacher,
    lr_factor,
    pretrain,
)
from mfd_fast.models.images import TeacherSampler
from mfd_fast.pictures.grids import sample_grid, smoothed, training_curves


@pytest.fixture(scope="module")
def classifier():
    return load_classifier()


@pytest.fixture(scope="module")
def teacher():
    return load_teacher()


# Data ---------------------------------------------------------------------------------------


def test_digits_have_the_stated_shapes_and_ranges():
    images, labels = load_digits()
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32
    assert images.min() == -1 and images.max() == 1
    assert labels.shape == (1797,) and labels.dtype == torch.int64
    assert labels.unique().tolist() == list(range(10))


def test_missing_scikit_learn_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install 'mfd-fast\[digits\]'"):
        load_digits()


def test_augmentation_keeps_shape_and_background():
    images, _ = load_digits()
    changed = augment(images[:50], torch.Generator().manual_seed(0))
    assert changed.shape == images[:50].shape
    assert (changed - images[:50]).abs().mean() < 0.3


# What is packaged ---------------------------------------------------------------------------


def test_packaged_classifier_knows_the_digits(classifier):
    images, labels = load_digits()
    with torch.no_grad():
        features = classifier.features(images)
        logits = classifier.logits(features)
    assert features.shape == (1797, 64)
    assert (logits.argmax(1) == labels).double().mean() > 0.98


def test_packaged_teacher_draws_the_class_it_is_asked_for(teacher, classifier):
    labels = torch.arange(200) % 10
    with torch.no_grad():
        images = TeacherSampler(teacher, 10, guidance=2.0)(draw_noise(200, 0, "cpu"), labels)
        agrees = classifier(images).argmax(1) == labels
    assert agrees.double().mean() > 0.9


def test_packaged_metrics_belong_to_the_packaged_weights(teacher):
    metrics = json.loads((PACKAGED / "digits_metrics.json").read_text())
    assert metrics["config"] == PretrainConfig().__dict__
    assert metrics["teacher"]["parameters"] == sum(p.numel() for p in teacher.parameters())
    assert metrics["classifier"]["held_out_accuracy"] >= 0.98
    assert metrics["evaluation"][0]["accuracy"] >= 0.97
    assert sum(path.stat().st_size for path in PACKAGED.iterdir()) < 2_000_000


# Pretraining --------------------------------------------------------------------------------


def test_pretrain_writes_three_files_and_overwrites_nothing(tmp_path):
    config = PretrainConfig(
        updates=3, batch_size=8, classifier_updates=3, num_samples=20, width=16, depth=1, heads=2
    )
    out = tmp_path / "teacher"
    metrics = pretrain(config, out)
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert len(metrics["evaluation"]) == 5 and len(metrics["teacher"]["losses"]) == 1
    assert load_teacher(out / FILES[0]).config.width == 16
    load_classifier(out / FILES[1])

    before = (out / FILES[0]).read_bytes()
    with pytest.raises(
        FileExistsError, match=r"already holds teacher.safetensors, .* another folder"
    ):
        pretrain(config, out)
    assert (out / FILES[0]).read_bytes() == before


def test_pretrain_config_refuses_what_cannot_work():
    with pytest.raises(ValueError, match=r"^updates must be >= 1, got 0"):
        PretrainConfig(updates=0)
    with pytest.raises(ValueError, match=r"label_dropout must be in \[0, 1\), got 1.0"):
        PretrainConfig(label_dropout=1.0)
    with pytest.raises(ValueError, match=r"num_samples must be >= 4 .* got 3"):
        PretrainConfig(num_samples=3)


def test_learning_rate_rises_and_falls():
    config = PretrainConfig(updates=1000, warmup_updates=100)
    factors = [lr_factor(config, i) for i in range(1000)]
    assert factors[0] < 0.02 and factors[-1] < 1e-4
    assert max(factors) > 0.95 and factors.index(max(factors)) == 99


# Measurement --------------------------------------------------------------------------------


def test_rows_share_noise_and_the_reference_is_its_own_noise_floor(classifier):
    data, labels = load_digits()
    seen = {}

    class Recorded:
        nfe = 7

        def __init__(self, name):
            self.name = name

        def __call__(self, noise, wanted):
            seen.setdefault(self.name, []).append(noise)
            return torch.stack([self.draw(*pair) for pair in zip(noise, wanted, strict=True)])

        def draw(self, noise, wanted):
            """A digit of the wanted class that depends on the noise."""
            candidates = data[labels == wanted]
            return candidates[int(noise.sum().abs() * 1e4) % len(candidates)]

    rows = evaluate_digits(
        {"real": Recorded("real"), "noise": lambda noise, _: noise},
        classifier=classifier,
        reference="real",
        num_samples=300,
    )
    real, noise = rows
    assert [row["name"] for row in rows] == ["real", "noise"]
    assert (real["nfe"], noise["nfe"]) == (7, None)
    assert real["accuracy"] > 0.98 and noise["accuracy"] < 0.4
    assert real["precision"] > 0.99 and real["recall"] > noise["recall"]
    assert 0 < real["frechet_to_teacher50"] < noise["frechet_to_teacher50"] / 10
    reference_noise, row_noise = seen["real"][1], seen["real"][3]  # each after its warm-up
    assert torch.equal(row_noise, draw_noise(300, 0, "cpu"))
    assert not torch.equal(reference_noise, row_noise)


def test_unknown_reference_is_named(classifier):
    with pytest.raises(ValueError, match=r"reference must be one of \['a'\], got 'b'"):
        evaluate_digits({"a": lambda noise, _: noise}, classifier=classifier, reference="b")


def test_evaluations_are_counted():
    model = DiT(DiTConfig(width=8, depth=1, heads=1))
    assert TeacherSampler(model, 5).nfe == 5
    assert TeacherSampler(model, 5, guidance=2.0).nfe == 10
    assert TeacherSampler(model, 5, guidance=2.0, solver="heun").nfe == 20


def test_table_is_aligned_and_shows_missing_counts():
    row = {
        "name": "teacher, 50 steps",
        "nfe": 100,
        "frechet_to_teacher50": 0.812,
        "frechet_to_data": 12.0,
        "precision": 0.9,
        "recall": 0.5,
        "accuracy": 1.0,
        "samples_per_s": 123.4,
    }
    lines = format_table([row, row | {"name": "student", "nfe": None}]).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 4
    assert [cell.strip() for cell in lines[3].split("|")[1:4]] == ["student", "-", "0.81"]


# Pictures -----------------------------------------------------------------------------------


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 2000


def test_pictures_are_written(tmp_path):
    rows = {"noise": torch.randn(25, 1, 8, 8), "teacher": torch.randn(25, 1, 8, 8)}
    sample_grid(rows, tmp_path / "new" / "grid.png", "two rows")
    history = [{"update": i, "aux_loss": 1 / (i + 1), "distance": float(i)} for i in range(20)]
    training_curves([*history, {"update": 20, "distance": float("nan")}], tmp_path / "curves.png")
    assert is_png(tmp_path / "new" / "grid.png") and is_png(tmp_path / "curves.png")


def test_pictures_refuse_what_they_cannot_draw(tmp_path):
    with pytest.raises(ValueError, match=r"a must be images of shape .* got \[4, 2, 8, 8\]"):
        sample_grid({"a": torch.zeros(4, 2, 8, 8)}, tmp_path / "x.png", "")
    with pytest.raises(ValueError, match="equally many images of one size"):
        sample_grid(
            {"a": torch.zeros(4, 1, 8, 8), "b": torch.zeros(5, 1, 8, 8)}, tmp_path / "x.png", ""
        )
    with pytest.raises(ValueError, match=r"got 1 rows with \['update'\]"):
        training_curves([{"update": 1}], tmp_path / "x.png")


def test_moving_average_of_a_constant_is_the_constant():
    assert smoothed((2.0,) * 500) == pytest.approx([2.0] * 500)
    assert smoothed((1.0, float("nan"), 1.0)) == pytest.approx([1.0] * 3)
