"""What a run needs at its end is looked at at its start; what only shows it never ends it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import largest_file

from mfd_fast import cli
from mfd_fast.metrics.image_features import few_samples
from mfd_fast.run import environment, trackers
from mfd_fast.run import session as runner
from mfd_fast.run.checkpoint import checkpoints_in

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
SMALL = [
    *("--train.updates", "1", "--train.batch-size", "2", "--train.log-every", "1"),
    *("--distill.aux-updates", "1", "--distill.step-size", "0.5", "--num-eval-samples", "4"),
]


def distil(preset, out, *argv):
    return cli.main(["distill", preset, "--out", str(out), *SMALL, *map(str, argv)])


def words(capsys):
    """What was printed, on one line: tables fold long cells."""
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


@pytest.fixture
def sana(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    from mfd_fast.models.sana.tiny import make_tiny_checkpoint

    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a red cube\ntwo cats\n")
    return make_tiny_checkpoint("teacher")


def remove(part):
    shutil.rmtree(Path("teacher") / part)


def rename_weights(part, old, new):
    (path,) = (Path("teacher") / part).glob(f"{old}*.safetensors")
    path.rename(path.with_name(f"{new}.safetensors"))


def without(*modules):
    def hide(monkeypatch):
        for name in modules:
            monkeypatch.setitem(sys.modules, name, None)
            monkeypatch.delitem(sys.modules, "mfd_fast.pictures.grids", raising=False)

    return hide


# What is missing, and what is said; only pictures need it.
FOR_PICTURES = {
    "decoder": (lambda patch: remove("vae"), "has no vae/config.json"),
    "decoder's weights": (
        lambda patch: rename_weights("vae", "diffusion_pytorch_model", "other"),
        "has neither diffusion_pytorch_model.safetensors",
    ),
    "matplotlib": (without("matplotlib", "matplotlib.figure"), "pictures need matplotlib"),
}


@pytest.mark.parametrize("name", FOR_PICTURES)
def test_a_run_without_what_pictures_need_says_so_first_and_ends_well(
    name, sana, monkeypatch, capsys
):
    take_away, message = FOR_PICTURES[name]
    take_away(monkeypatch)
    given = ["--teacher", "teacher", "--prompts", "p.txt"]
    assert distil("sana-tiny", "r", *given, "--dry-run") == 0
    planned = words(capsys)
    assert "none will be drawn" in planned and message in planned
    assert distil("sana-tiny", "r", *given) == 0
    printed = words(capsys)
    assert "none will be drawn" in printed
    assert "drawing pictures failed" in printed and "goes on without it" in printed
    assert Path("r/student.safetensors").is_file() and Path("r/results.json").is_file()


# What is missing, and what is said; without it nothing can be learned or measured.
FOR_THE_RUN = {
    "text encoder": (lambda patch: remove("text_encoder"), "text_encoder/config.json is missing"),
    "tokenizer": (lambda patch: remove("tokenizer"), "has none of"),
    "its weights": (
        lambda patch: rename_weights("text_encoder", "model", "other"),
        "neither model",
    ),
}


@pytest.mark.parametrize("name", FOR_THE_RUN)
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_a_run_that_could_not_end_does_not_start(name, dry, sana, monkeypatch, capsys):
    take_away, message = FOR_THE_RUN[name]
    take_away(monkeypatch)
    assert distil("sana-tiny", "r", "--teacher", "teacher", "--prompts", "p.txt", *dry) == 2
    assert message in words(capsys)
    assert not Path("r").exists()


def test_a_variant_that_only_the_transformer_has(sana, capsys):
    """Text encoder and decoder without it are taken as they are."""
    variant = "diffusion_pytorch_model.fp16"
    rename_weights("transformer", "diffusion_pytorch_model", variant)
    given = ["--teacher", "teacher", "--prompts", "p.txt", "--variant", "fp16"]
    assert distil("sana-tiny", "r", *given) == 0
    assert Path("r/samples_grid.png").is_file()
    assert "none will be drawn" not in words(capsys)


def test_a_store_with_longer_prompts_than_the_text_length(sana, capsys):
    encode = ["encode-prompts", "teacher", "--prompts", "p.txt", "--out", "store"]
    assert cli.main(encode) == 0
    from mfd_fast.models.sana.text.store import TextStore

    longest = TextStore("store").longest
    given = ["--teacher", "teacher", "--prompts", "store"]
    for dry in (["--dry-run"], []):
        short = ["--sana.text-length", longest - 1]
        assert distil("sana-tiny", "r", *given, *short, *dry) == 2
        assert f"but a prompt has {longest} tokens" in words(capsys)
    assert not Path("r").exists()


def test_digits_that_cannot_be_measured_do_not_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    for dry in (["--dry-run"], []):
        assert distil("digits", tmp_path / "r", *dry) == 2
        assert "the digits need scikit-learn" in words(capsys)
    assert not (tmp_path / "r").exists()


# What only shows a run.


def failing(*args, **kwargs):
    raise RuntimeError("no room on the device")


def test_no_preview_picture_or_tracker_ends_a_run(tmp_path, monkeypatch, capsys):
    from mfd_fast.models.digits.task import DigitsTask

    monkeypatch.setattr(DigitsTask, "preview", failing)
    monkeypatch.setattr(DigitsTask, "draw_pictures", failing)
    monkeypatch.setitem(trackers.TRACKERS, "wandb", (lambda *args: failing, "json"))
    shown = ["--train.preview-every", "1", "--train.report-to", "wandb"]
    assert distil("digits", tmp_path / "r", *shown) == 0
    printed = words(capsys)
    for what in ("preview-000001.png", "train.report_to wandb", "drawing pictures"):
        assert f"{what} failed: no room on the device" in printed
    assert (tmp_path / "r/results.json").is_file()


def test_a_disk_that_is_full_at_the_end_trains_nothing_twice(tmp_path, capsys, monkeypatch):
    out = tmp_path / "r"
    save = runner._Session._evaluate

    def full(session):
        with largest_file(20_000):  # after the last checkpoint
            save(session)

    with monkeypatch.context() as patch:
        patch.setattr(runner._Session, "_evaluate", full)
        assert distil("digits", out) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "student.safetensors could not be written: File too large; nothing of it is" in error
    (written,) = checkpoints_in(out / "checkpoints")
    assert f"checkpoint {written}; continue with: mfd-fast distill digits --out {out}" in error
    assert not (out / "student.safetensors").exists()
    monkeypatch.setattr("mfd_fast.distill.distiller.Distiller.step", failing)
    assert cli.main(["distill", "digits", "--out", str(out), "--resume"]) == 0
    assert (out / "results.json").is_file()


# Numbers.


@pytest.mark.parametrize(
    "argv",
    [
        ["sample", "r", "--num", "0"],
        ["sample", "r", "--num", "-3"],
        ["evaluate", "r", "--num-samples", "0"],
    ],
)
def test_zero_is_not_the_default(argv, capsys):
    assert cli.main(argv) == 2
    assert f"{argv[2]} must be >= 1, got {argv[3]}" in words(capsys)


def test_few_samples_are_warned_of_where_the_covariance_is_singular(tmp_path, capsys):
    size = 64
    features = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).double()
    assert torch.linalg.matrix_rank(features.T.cov()) < size  # of 64 samples
    assert "mostly noise" in few_samples(size, size)[0] and not few_samples(10 * size + 1, size)
    assert "too large" in few_samples(size + 1, size)[0]
    with pytest.raises(ValueError, match="num_eval_samples must be above 3"):
        few_samples(3, size)
    assert distil("digits", tmp_path / "r", "--dry-run") == 0
    assert "4 samples are fewer than the 64 components" in words(capsys)
    assert distil("digits", tmp_path / "r") == 0
    assert "4 samples are fewer than the 64 components" in words(capsys)
    assert cli.main(["evaluate", str(tmp_path / "r"), "--num-samples", "5"]) == 0
    assert "5 samples are fewer than the 64 components" in words(capsys)


# Facts about the installation.


def test_a_commit_is_only_that_of_the_package_itself(tmp_path, monkeypatch):
    """Installed into a folder of somebody's repository, it does not take that one's commit."""
    ours = tmp_path / "foreign" / "site-packages"
    ours.mkdir(parents=True)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@y"]
    for words_ in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *words_], cwd=tmp_path / "foreign", check=True)
    monkeypatch.delenv("MFD_COMMIT", raising=False)
    monkeypatch.setattr(environment, "ROOT", ours)
    assert environment.commit() == "unknown"
    monkeypatch.setenv("MFD_COMMIT", "abc")
    assert environment.commit() == "abc"
    monkeypatch.setattr(environment, "ROOT", tmp_path / "foreign")
    assert len(environment.commit()) == 12


def test_results_are_written_whole(tmp_path):
    assert distil("digits", tmp_path / "r") == 0
    assert json.loads((tmp_path / "r/results.json").read_text())["table"]
    assert not list((tmp_path / "r").glob(".*"))
