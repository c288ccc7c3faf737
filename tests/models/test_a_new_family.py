"""The family that docs/your-model.md shows, in a folder of its own, through every command."""

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mfd_fast import cli
from mfd_fast.models import load_config, open_run, preset

GUIDE = Path(__file__).parents[2] / "docs/your-model.md"
NAME = "my_rings:RingRun"
SMALL = ["--train.batch-size", "4", "--train.device", "cpu", "--num-eval-samples", "10"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the guide's module; what is imported is forgotten afterwards."""
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    (text,) = (block for block in blocks if "my_rings.py" in block)
    assert len(text.splitlines()) < 100
    (tmp_path / "my_rings.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    sys.modules.pop("my_rings", None)


def distill(*words):
    return cli.main(["distill", NAME, *SMALL, *words])


def test_distill_resume_evaluate_estimate(folder, capsys):
    assert distill("--out", "whole", "--train.updates", "4") == 0
    assert "| student |" in capsys.readouterr().out
    assert distill("--out", "parts", "--train.updates", "2") == 0
    assert distill("--out", "parts", "--train.updates", "4", "--resume") == 0
    students = [load_file(folder / run / "student.safetensors") for run in ("whole", "parts")]
    assert all(torch.equal(x, students[1][name]) for name, x in students[0].items())
    random = open_run("whole")[1].network("").state_dict()
    assert not all(torch.equal(x, random[name]) for name, x in students[0].items())
    capsys.readouterr()
    assert cli.main(["evaluate", "whole"]) == 0
    assert "| student |" in capsys.readouterr().out
    assert cli.main(["estimate", NAME, "--batch", "4", "--gpu", "h100"]) == 0
    assert "one cycle of mfd: 2 auxiliary and 1 student updates" in capsys.readouterr().out
    assert distill("--out", "dry", "--dry-run") == 0
    assert not (folder / "dry").exists()


def test_a_setting_and_a_teacher_of_its_own_reach_it(folder):
    preset(NAME)
    network = sys.modules["my_rings"].Network(8)
    save_file(network.state_dict(), folder / "teacher.safetensors")
    words = ["--rings.width", "8", "--teacher", "teacher.safetensors", "--train.updates", "1"]
    assert distill("--out", "run", *words) == 0
    run, task = open_run("run")
    assert task.config == load_config(run / "config.yaml") and task.config.rings.width == 8
    for ours, theirs in zip(task.teacher.parameters(), network.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_a_family_does_not_do_is_said(folder, capsys):
    assert distill("--out", "run", "--train.updates", "1") == 0
    for command in (["sample", "run"], ["export", "run", "--out", "there"]):
        assert cli.main(command) == 2
    errors = capsys.readouterr().err
    assert f"{NAME} draws no samples; its student is" in errors
    assert "is a full checkpoint already; copy it" in errors
    assert distill("--objective", "meanflow", "--out", "other") == 2
    assert "must be one of mfd, vsd, got 'meanflow'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("my_wings:RingRun", "No module named 'my_wings'"),
        ("my_rings:RingGun", "no attribute 'RingGun'"),
        ("my_rings:Network", "must name a subclass of mfd_fast.run.config.RunConfig"),
    ],
)
def test_a_class_that_cannot_be_had_is_named(folder, capsys, name, why):
    assert cli.main(["distill", name]) == 2
    error = capsys.readouterr().err
    assert name in error and why in error and "Traceback" not in error


def test_a_run_folder_imports_nothing_from_the_working_directory(folder):
    (folder / "run").mkdir()
    (folder / "run/config.yaml").write_text(f"preset: {NAME}\n")
    with pytest.raises(ValueError, match="give that folder as PYTHONPATH"):
        load_config(folder / "run/config.yaml")
    assert "my_rings" not in sys.modules
