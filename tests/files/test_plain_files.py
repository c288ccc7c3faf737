"""Every reader of JSON and YAML refuses a key twice; every number of a setting has a range."""

import ast
import json
import math
from pathlib import Path

import pytest

from mfd_fast.distill.config import OptimConfig
from mfd_fast.files.plain import parse_json, read_yaml
from mfd_fast.models import PRESETS, load_config, preset
from mfd_fast.models.cifar10.teacher import Cifar10Pretrain
from mfd_fast.models.cifar10.unet import UNetConfig
from mfd_fast.models.digits.dit import DiTConfig
from mfd_fast.models.digits.teacher import PretrainConfig
from mfd_fast.models.occfm.config import OccfmConfig
from mfd_fast.models.occfm.pretrain import TeacherPretrain, VaePretrain
from mfd_fast.models.occfm.run_config import read_run_configs
from mfd_fast.models.occfm.vae.config import VaeConfig
from mfd_fast.models.sana.config import SanaConfig
from mfd_fast.models.sana.text.prompts import open_prompts
from mfd_fast.run.config import from_dict, to_dict, with_file
from mfd_fast.settings import Settings, ranges

PACKAGE = Path(__file__).parents[2] / "mfd_fast"


@pytest.mark.parametrize("text", ["a: 1\na: 2\n", "b: {c: [{a: 1, a: 1}]}\n", '"a": 1\na: 2\n'])
def test_a_yaml_key_that_is_there_twice(text, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    for read in (
        read_yaml,
        load_config,
        read_run_configs,
        lambda path: with_file(preset("digits"), path),
    ):
        with pytest.raises(ValueError, match=r"the key 'a' of line \d is there twice"):
            read(tmp_path / "c.yaml")


def test_honest_yaml_is_read(tmp_path):
    """Anchors, merges and the same key in two mappings are not a key twice."""
    text = "a: &x {k: [1, 2], m: .5}\nb: {<<: *x, k: 3}\nc: [*x, {k: 1}]\n1: one\n'1': text\n"
    (tmp_path / "c.yaml").write_text(text)
    x = {"k": [1, 2], "m": 0.5}
    expected = {"a": x, "b": x | {"k": 3}, "c": [x, {"k": 1}], 1: "one", "1": "text"}
    assert read_yaml(tmp_path / "c.yaml") == expected
    (tmp_path / "c.yaml").write_text("")
    assert read_yaml(tmp_path / "c.yaml") is None


def test_a_json_key_that_is_there_twice(tmp_path):
    for text in ('{"a": 1, "a": 1}', '[{"b": {"a": 0, "b": 1, "a": 2}}]'):
        with pytest.raises(ValueError, match="the key 'a' is there twice"):
            parse_json(text)
    assert parse_json(b'[{"a": 1}, {"a": {"a": 2}}]') == [{"a": 1}, {"a": {"a": 2}}]
    (tmp_path / "p.jsonl").write_text('{"text": "a cat", "text": "a dog"}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl:1: not JSON \(the key 'text' is there twice"):
        open_prompts(tmp_path / "p.jsonl")


@pytest.mark.parametrize("folder", ["data", "models", "metrics", "tasks", "presets.py"])
def test_readers_of_other_hands_files_take_the_one_that_refuses(folder):
    own = PACKAGE / folder
    found = [
        f"{path.name}:{node.lineno}"
        for path in ([own] if own.is_file() else own.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr in ("load", "loads", "safe_load")
        and isinstance(node.value, ast.Name)
        and node.value.id in ("json", "yaml")
    ]
    assert not found


def groups_of_settings():
    found = {type(part) for config in PRESETS.values() for part in parts_of(config)}
    models = {SanaConfig, OccfmConfig, VaeConfig, DiTConfig, UNetConfig}
    return found | models | {PretrainConfig, VaePretrain, TeacherPretrain, Cifar10Pretrain}


def parts_of(config):
    yield config
    for value in vars(config).values():
        if isinstance(value, Settings):
            yield from parts_of(value)


@pytest.mark.parametrize("cls", sorted(groups_of_settings(), key=lambda c: c.__name__))
def test_every_number_has_a_range_and_is_finite(cls):
    needed = {"preset": "digits"} if "preset" in cls.__dataclass_fields__ else {}
    numbers = {
        name: value
        for name, value in vars(cls(**needed)).items()
        if type(value) in (int, float)
        or name in ("max_interval", "interpolation_scale", "clip", "guidance", "frames", "fps")
    }
    assert ranges(cls).keys() == numbers.keys()
    for name, value in numbers.items():
        for wrong in (math.nan, math.inf, -math.inf, 1e300, 10**400, -(10**400), "1", True):
            with pytest.raises(ValueError, match=rf"(^|\.){name} must be .*, got "):
                cls(**needed, **{name: wrong})
        if type(value) is int:
            with pytest.raises(ValueError, match=rf"{name} must be a whole number, got 1\.5"):
                cls(**needed, **{name: 1.5})


@pytest.mark.parametrize("name", ["sana-1.6b", "occfm"])
def test_alpha_0_is_refused(name):
    tree = to_dict(preset(name))
    family = name.split("-")[0]
    tree[family]["alpha"] = 0
    with pytest.raises(ValueError, match=rf"{family}\.alpha must be > 0, got 0\.0"):
        from_dict(type(preset(name)), tree)


def test_the_message_says_what_is_wrong_with_a_number():
    for value, message in (
        (math.nan, "lr must be finite and > 0, got nan"),
        (1e39, r"lr must be > 0 and <= 3.40282e\+38, got 1e\+39"),
        ("3", "lr must be a number, got '3'"),
        (0.0, "lr must be > 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            OptimConfig(lr=value)


def test_numbers_in_a_checkpoint_that_are_not_finite():
    entries = json.loads('{"timestep_scale": NaN}')
    with pytest.raises(ValueError, match=r"SanaConfig.timestep_scale must be finite and > 0"):
        SanaConfig.from_dict(entries)
