"""Messages name options of the command that was typed, and the file that is broken."""

import ast
import inspect
import re
import shutil
from pathlib import Path

import pytest

from mfd_fast import cli
from mfd_fast.cli import OPTION, SPOKEN, spoken
from mfd_fast.models import PRESETS, preset
from mfd_fast.models.sana.compat import SPECIAL, TAKEN, spoken_flags
from mfd_fast.run.config import leaves, to_dict

SOURCE = Path(cli.__file__).parents[1]
DISTILL = {"--out", "--resume", "--dry-run", "--config", "--objective", "--memory-profile"}
DISTILL |= {"--fast"}
DISTILL |= {"--prompt", "--help"}  # of sample, and of all
# Modules that one command alone runs, and what it has besides.
OF_ONE_COMMAND = {
    "models/sana/text/shard.py": {"--dtype"},
    "models/occfm/data/store.py": {"--data", "--skip-missing"},
    "models/occfm/data/synthetic.py": {"--data"},
    "models/sana/text/source.py": {"--prompts"},
    "models/cifar10/teacher.py": {"--out"},
    "cost/devices.py": {"--peak-tflops", "--bandwidth", "--memory"},
    "cost/estimate.py": {"--gpus"},
    "hub.py": {"--push"},
    "models/diffusers/base_error.py": {"--check-base"},
    "run/config.py": {"--check-base"},
}
OF_PROGRAMS = re.compile(r"pip install|torchrun|^--[a-z-]+(=[\w,.]+)?$|force-reinstall")


def of_distill():
    options = set(DISTILL)
    for name in PRESETS:
        config = preset(name)
        options |= {f"--{key.replace('_', '-')}" for key, _ in leaves(to_dict(config))}
        options |= set(config.SHORT)
    return options


def options_in(text):
    return {word for word in OPTION.findall(text) if word.startswith("--")}


def strings_of(path):
    """String literals and what is joined in f-strings, without docstrings."""
    tree = ast.parse(path.read_text())
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            docs |= {id(part) for part in node.values}
            yield "".join(str(getattr(part, "value", "X")) for part in node.values
                          if isinstance(part, ast.Constant))  # fmt: skip
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
        ):
            yield node.value


def test_every_option_in_a_message_of_the_library_is_one_of_distill():
    known = of_distill() | {option.replace("-no-", "-") for option in of_distill()}
    for path in SOURCE.rglob("*.py"):
        name = str(path.relative_to(SOURCE))
        if name.startswith("cli/") or name.endswith("compat.py"):
            continue
        for text in strings_of(path):
            if OF_PROGRAMS.search(text):
                continue
            foreign = {o.replace(".no-", ".") for o in options_in(text)} - known
            assert foreign <= OF_ONE_COMMAND.get(name, set()), f"{name}: {text}"


def test_what_a_command_says_in_place_of_an_option_is_its_own():
    words = SPOKEN | {"compat": spoken_flags()}
    assert all(known.keys() <= of_distill() for known in words.values())
    flags = {f"--{name}" for name in [*TAKEN, *SPECIAL]}
    assert {word for word in words["compat"].values() if word.startswith("--")} <= flags
    own = inspect.signature(cli.command_of("encode-prompts").run).parameters
    own = {f"--{name.replace('_', '-')}" for name in own}
    assert {w for w in words["encode-prompts"].values() if w.startswith("--")} <= own


def test_a_command_typed_out_in_a_message_stays_as_it_is():
    text = "type mfd-fast distill digits --out RUN --resume; or choose another folder with --out"
    assert spoken("compat", text) == text.removesuffix("--out") + "--output_dir"
    assert spoken("distill", text) == text
    assert spoken("compat", "--output_dir and --outer") == "--output_dir and --outer"


@pytest.fixture
def checkpoint(tmp_path_factory):
    pytest.importorskip("diffusers")
    from mfd_fast.models.sana.tiny import make_tiny_checkpoint

    return make_tiny_checkpoint(tmp_path_factory.mktemp("sana"))


@pytest.mark.parametrize(
    ("command", "key", "skip"),
    [
        (["distill", "sana-tiny", "--dry-run", "--teacher", "CK", "--prompts", "F"],
         "--prompt-key", "--skip-bad"),
        (["encode-prompts", "CK", "--out", "store", "--prompts", "F"],
         "--prompt-key", "--skip-bad"),
        (["compat", "sana", "--output_dir=r", "--pretrained_model_name_or_path=CK",
          "--prompt_dataset=F"], "--caption_column", None),
    ],
)  # fmt: skip
def test_advice_about_prompts_works_when_it_is_typed(
    command, key, skip, checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("keys.jsonl").write_text('{"Caption": "a cat"}\n')
    Path("bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": null}\n')

    def told(file, *more):
        words = [w.replace("CK", str(checkpoint)).replace("=F", f"={file}") for w in command]
        words = [file if word == "F" else word for word in words]
        code = cli.main([*words, *more])
        errors = [line for line in capsys.readouterr().err.splitlines() if "mfd-fast" in line]
        return code, errors[-1] if errors else ""

    code, error = told("keys.jsonl")
    assert code == 2 and f"choose one with {key}" in error
    if skip:
        assert told("keys.jsonl", key, "Caption")[0] == 0
        code, error = told("bad.jsonl")
        assert code == 2 and f"leave out all such lines with {skip}" in error
        shutil.rmtree("store", ignore_errors=True)
        assert told("bad.jsonl", skip)[0] == 0


def test_compat_speaks_of_its_own_folder_option(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a cat\n")
    Path("full").mkdir()
    Path("full/config.yaml").write_text("preset: sana-tiny\n")
    Path("full/student.safetensors").write_text("")
    words = ["compat", "sana", f"--pretrained_model_name_or_path={checkpoint}",
             "--prompt_dataset=p.txt", "--output_dir=full"]  # fmt: skip
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert "--output_dir" in error and "--out," not in error and "--out " not in error


@pytest.mark.parametrize("which", [0, -1])
def test_the_broken_weight_file_of_a_text_encoder_is_named(which, checkpoint, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from mfd_fast.models.sana.text.encoder import load_sana_text_encoder

    diffusers.SanaPipeline.from_pretrained(checkpoint).save_pretrained(
        tmp_path / "ck", max_shard_size="20KB"
    )
    file = sorted((tmp_path / "ck" / "text_encoder").glob("*.safetensors"))[which]
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"{file} is not a complete safetensors file"):
        load_sana_text_encoder(tmp_path / "ck")
