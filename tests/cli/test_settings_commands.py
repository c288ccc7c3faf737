"""config and --config: settings seen, and kept in a file."""

import pytest
import yaml

from mfd_fast import cli
from mfd_fast.models import PRESETS, preset
from mfd_fast.run.config import to_dict


def preset_config(name, argv, command="distill"):
    parsed = cli.command_of(command).parse(name, argv, f"mfd-fast {command} {name}")
    return parsed.keywords["config"]


def test_config_prints_what_distill_would_use(capsys):
    argv = ["--distill.step-size", "0.5", "--objective", "vsd"]
    assert cli.main(["config", "digits", *argv]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert tree == to_dict(preset_config("digits", argv, "distill"))
    assert (tree["distill"]["step_size"], tree["distill"]["objective"]) == (0.5, "vsd")


def test_a_file_goes_over_the_preset_and_the_command_line_over_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("distill:\n  step_size: 0.25\n  student_optim:\n    lr: 0.5\n")
    argv = ["--config", str(path), "--distill.student-optim.lr", "0.125"]
    config = preset_config("digits", argv, "distill")
    assert config.distill.step_size == 0.25
    assert config.distill.student_optim.lr == 0.125
    assert config.train == preset("digits").train


@pytest.mark.parametrize("name", PRESETS)
def test_a_printed_config_is_a_config_file(name, tmp_path, capsys):
    assert cli.main(["config", name]) == 0
    path = tmp_path / "c.yaml"
    path.write_text(capsys.readouterr().out)
    assert preset_config(name, ["--config", str(path)], "distill") == preset(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("distill:\n  stepsize: 0.1\n", "unknown config key 'distill.stepsize'; .*'step_size'"),
        ("distill:\n  step_size: small\n", "distill.step_size must be a number, got 'small'"),
        ("preset: sana-tiny\n", "is of preset 'sana-tiny', not of 'digits'"),
        ("- 1\n", "must hold a mapping"),
        ("a: [\n", "is not YAML"),
        ("!!python/object/apply:os.system ['true']\n", "is not YAML"),
    ],
)
def test_a_bad_file_is_one_sentence(text, message, tmp_path, capsys):
    import re

    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert cli.main(["config", "digits", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert len(error.strip().splitlines()) == 1


def test_a_file_that_is_not_there(capsys):
    assert cli.main(["config", "digits", "--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
