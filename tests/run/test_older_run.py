"""A run folder that an older version wrote opens, and its checkpoint is continued."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from mfd_fast import cli

OLDER = Path(__file__).parents[1] / "data" / "older_run"


def test_an_older_run_is_continued(tmp_path):
    """Made by ``mfd-fast distill sana-tiny --train.updates 2 --train.checkpoint-every 1
    --distill.aux-updates 1 --sana.rank 2 --sana.alpha 2``, before modules had rooms.  The end is
    the same bit for bit on the machine that wrote it; here it may round otherwise.
    """
    run = tmp_path / "run"
    shutil.copytree(OLDER, run)
    expected = load_file(run / "expected.safetensors")
    assert cli.main(["distill", "sana-tiny", "--resume", str(run)]) in (0, None)
    got = load_file(run / "student.safetensors")
    torch.testing.assert_close(got, expected)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [
        2
    ]  # written once: what came after the checkpoint is cut


def test_a_student_of_an_older_run_is_sampled(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(OLDER, run)
    (run / "expected.safetensors").rename(run / "student.safetensors")
    picture = tmp_path / "samples.png"
    assert cli.main(["sample", str(run), "--out", str(picture)]) in (0, None)
    assert picture.stat().st_size > 0
