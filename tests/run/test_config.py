"""Keys, types, round trip; every field is read somewhere; the setting surface is frozen."""

import dataclasses
import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

from mfd_fast import cli
from mfd_fast.distill.config import DistillConfig
from mfd_fast.models import PRESETS, load_config, preset
from mfd_fast.run.config import RunConfig, from_dict, leaves, save_config, to_dict, with_fast
from mfd_fast.run.console import plan_of

ROOT = Path(__file__).parents[2]


def keys(tree, prefix=""):
    for name, value in tree.items():
        yield from keys(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]


def every_setting():
    return sorted({key for config in PRESETS.values() for key in keys(to_dict(config))})


@pytest.mark.parametrize("name", PRESETS)
def test_yaml_round_trip(name, tmp_path):
    save_config(preset(name), tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == preset(name)


def test_every_field_is_read_outside_config():
    text = "\n".join(
        path.read_text()
        for path in (ROOT / "mfd_fast").rglob("*.py")
        if path.name not in ("config.py", "presets.py")
    )
    unread = [key for key in every_setting() if not re.search(rf"\.{key.split('.')[-1]}\b", text)]
    assert not unread


def config_classes(cls):
    yield cls
    for hint in get_type_hints(cls).values():
        if dataclasses.is_dataclass(hint):
            yield from config_classes(hint)


def test_every_field_has_a_docstring():
    for cls in {c for config in PRESETS.values() for c in config_classes(type(config))}:
        text = "".join(inspect.getsource(c) for c in cls.__mro__ if dataclasses.is_dataclass(c))
        for field in dataclasses.fields(cls):
            assert re.search(rf'^    {field.name}: .*\n    """', text, re.MULTILINE), field.name


def test_setting_surface_is_frozen():
    """A new setting is a reviewed diff of tests/data/settings.txt, a sorted key a line."""
    expected = (ROOT / "tests/data/settings.txt").read_text().split()
    assert every_setting() == expected


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"distill": {"step_sise": 0.1}}, "'distill.step_sise'; .*did you mean 'step_size'"),
        (
            {"distill": {"step_size": "big"}},
            r"step_size must be a number, got 'big' \(str\)",
        ),
        ({"distill": {"step_size": -1.0}}, "distill.step_size must be > 0, got -1.0"),
        ({"distill": {"objective": "gan"}}, "one of mfd, vsd, .*, got 'gan'"),
        ({"distill": 3}, "distill must be a mapping, got 3"),
        ({"train": {"batch_size": 0}}, "train.batch_size must be >= 1, got 0"),
        ({"train": {"batch_size": 1.5}}, "train.batch_size must be a whole number"),
        ({"distill": {"student_optim": {"lr": 0}}}, "lr must be > 0"),
    ],
)
def test_bad_keys_and_values_are_named(tree, message):
    with pytest.raises(ValueError, match=message):
        from_dict(RunConfig, tree)


def test_unknown_preset_suggests_the_nearest():
    with pytest.raises(
        ValueError, match=r"unknown preset 'digit'; there is .*did you mean 'digits'"
    ):
        preset("digit")


def test_optional_values_accept_none_and_numbers():
    assert from_dict(DistillConfig, {"max_interval": None}).max_interval is None
    assert from_dict(DistillConfig, {"max_interval": 1}).max_interval == 1.0


def test_every_setting_of_the_published_presets_has_its_source():
    """docs/presets.md has the value that each of them has, in its column."""
    columns = {"sana-1.6b": 1, "sana-600m": 1, "sana-1.6b-official": 2, "occfm": 3}
    compared = 0
    for line in (ROOT / "docs/presets.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        first = re.match(r"`(distill|train|\*_optim)\.(\w+)`", cells[0])
        for name, column in columns.items() if first else ():
            distill, train = preset(name).distill, preset(name).train
            groups = {"distill": [distill], "train": [train]}
            for group in groups.get(first[1], [distill.student_optim, distill.aux_optim]):
                told = re.split(r"[: ]|, ", cells[column])[0].replace(",", "")
                value = getattr(group, first[2])
                if told == "not":  # used
                    assert distill.time_distribution == "uniform"
                else:
                    assert (told if isinstance(value, str) else float(told)) == value, cells[0]
                compared += 1
    assert compared > 4 * 20


@pytest.mark.parametrize("name", PRESETS)
def test_fast_changes_two_settings_and_those_once(name):
    before, fast = preset(name), with_fast(preset(name))
    old, new = (dict(leaves(to_dict(config))) for config in (before, fast))
    changed = {key: new[key] for key in old if old[key] != new[key]}
    assert changed == {
        "distill.solver": "ab2",
        "distill.step_size": 4 * before.distill.step_size,
    }
    assert with_fast(fast) == fast


@pytest.mark.parametrize(
    ("written", "read"),
    [("true", "on"), ("false", "off"), ("on", "on"), ("'off'", "off"), ("auto", "auto")],
)
def test_train_capture_of_older_files_is_read(written, read, tmp_path):
    """It was true or false; YAML reads a bare on or off as those."""
    path = tmp_path / "config.yaml"
    path.write_text(f"preset: digits\ntrain:\n  capture: {written}\n")
    config = load_config(path)
    assert config.train.capture == read
    save_config(config, path)
    assert load_config(path) == config


def test_a_run_says_whether_it_is_captured_and_why(capsys):
    config = preset("digits")

    def step(device, **train):
        run = replace(config, train=replace(config.train, **train))
        return plan_of(run, Path("out"), torch.device(device))["step"].split(", ")[0]

    assert step("cuda") == "captured as CUDA graphs (train.capture auto)"
    assert step("cuda", capture="off") == step("cpu", capture="off") == "eager (train.capture off)"
    why = "capturing needs an NVIDIA GPU and this is cpu"
    assert step("cpu") == f"eager (train.capture auto: {why})"
    assert "train.shard fsdp gathers weights" in step("cuda", shard="fsdp")
    options = ["--train.device", "cpu", "--train.capture", "on", "--dry-run"]
    assert cli.main(["distill", "digits", *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{why}; set train.capture to auto or off" in line
