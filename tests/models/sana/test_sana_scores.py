"""The text-to-image columns of a SANA run's table."""

import re
import shutil

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

import score_models as small

from mfd_fast import cli
from mfd_fast.metrics import frechet_distance
from mfd_fast.metrics.image_features import DinoFeatures
from mfd_fast.metrics.image_scores import load_scores, score_images
from mfd_fast.models import open_run
from mfd_fast.models.sana.scores import COLUMNS, SanaScores, parse_sources
from mfd_fast.models.sana.tiny import make_tiny_checkpoint

PROMPTS = ["a red cube", "two cats", "a boat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run from a prompt file, one from a store of it, and the models of scores."""
    root = tmp_path_factory.mktemp("scored")
    checkpoint = make_tiny_checkpoint(root / "teacher")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    (root / "others.txt").write_text("\n".join(PROMPTS[::-1]))
    encode = ["encode-prompts", str(checkpoint), "--prompts", str(root / "prompts.txt")]
    assert cli.main([*encode, "--out", str(root / "store")]) == 0
    command = ["distill", "sana-tiny", "--out", str(root / "run"), "--train.device", "cpu"]
    command += ["--teacher", str(checkpoint), "--sana.prompts", str(root / "prompts.txt")]
    command += ["--train.updates", "2", "--train.batch-size", "2", "--num-eval-samples", "3"]
    assert cli.main([*command, "--distill.aux-updates", "1"]) == 0
    shutil.copytree(root / "run", root / "stored")
    settings = root / "stored" / "config.yaml"
    settings.write_text(settings.read_text().replace("prompts.txt", "store"))
    small.save_clip(root / "clip")
    small.save_dino(root / "dino")
    return root


def test_the_columns_of_given_models_are_filled_and_the_others_stay_empty(
    folder, capsys, monkeypatch
):
    seen = []
    row = SanaScores.row
    monkeypatch.setattr(SanaScores, "row", lambda self, images, prompts: (
        seen.append((images, prompts)) or row(self, images, prompts)))  # fmt: skip
    scores = f"clip={folder / 'clip'},fid={folder / 'dino'}"
    assert cli.main(["evaluate", str(folder / "run"), "--scores", scores]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    titles, _, teacher, student = ([c.strip() for c in line.split("|")[1:-1]] for line in lines)
    assert titles[-6:] == [title for title, _, _ in COLUMNS]

    (teacher_images, prompts), (images, _) = seen
    order = open_run(str(folder / "run"))[1].text.conditions.indices
    assert prompts == [PROMPTS[i] for i in [*order(0), *order(1)]][:3]
    clip = load_scores({"clip": str(folder / "clip")}, device="cpu")
    values = [score_images(rows, prompts, clip)["clip"] for rows in (teacher_images, images)]
    features = DinoFeatures(str(folder / "dino"))
    fid = frechet_distance(features(teacher_images), features(images))
    assert teacher[-6:] == ["-", "-", "-", "-", f"{values[0]:.3f}", "-"]
    assert student[-6:] == ["-", "-", "-", "-", f"{values[1]:.3f}", f"{fid:.2f}"]


def test_a_run_from_a_store_is_scored_with_the_prompts_it_was_made_of(folder, capsys):
    command = ["evaluate", str(folder / "stored"), "--scores", f"clip={folder / 'clip'}"]
    assert cli.main(command) == 2
    assert "store keeps no prompts, which scores need" in capsys.readouterr().err
    assert cli.main([*command, "--prompts", str(folder / "others.txt")]) == 2
    assert re.search("store was not encoded from .*others.txt", capsys.readouterr().err)
    assert cli.main([*command, "--prompts", str(folder / "prompts.txt")]) == 0
    stored = capsys.readouterr().out.splitlines()[2]
    assert cli.main(["evaluate", str(folder / "run"), *command[2:]]) == 0
    assert stored.split("|")[-3] == capsys.readouterr().out.splitlines()[2].split("|")[-3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clop=a", "unknown score 'clop'; .*clip"),
        ("clip", "expected clip=MODEL or clip=MODEL:FILE once"),
        ("clip=a,clip=b", "expected clip=MODEL or clip=MODEL:FILE once"),
    ],
)
def test_sources_are_read_strictly(text, message):
    with pytest.raises(ValueError, match=message):
        parse_sources(text)


def test_sources_may_have_a_file_of_their_own():
    text = "aesthetic=openai/clip-vit-large-patch14:sac+logos+ava1-l14-linearMSE.pth, fid=x"
    name, file = "openai/clip-vit-large-patch14", "sac+logos+ava1-l14-linearMSE.pth"
    assert parse_sources(text) == {"aesthetic": f"{name}:{file}", "fid": "x"}


def test_scores_are_for_images_of_prompts():
    from mfd_fast.cli.run import score_sources
    from mfd_fast.models import preset

    with pytest.raises(ValueError, match="--scores judges images made of prompts; digits makes"):
        score_sources(preset("digits"), "clip=a")
