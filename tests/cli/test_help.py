"""What the commands say of themselves: help, version, options, suggestions, completion."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import get_args

import pytest

from mfd_fast import __version__, cli
from mfd_fast.baselines.config import ObjectiveName
from mfd_fast.cli import COMMANDS, command_of
from mfd_fast.cli.parse import OF_METHODS, complaint
from mfd_fast.models import PRESETS
from mfd_fast.models.diffusers.published import PUBLISHED
from mfd_fast.run.config import leaves, to_dict

FROZEN = Path(__file__).parents[1] / "data/commands.txt"
# What is typed for each command, up to its options.
LINES = [
    f"{name} {sub}".strip()
    for name in COMMANDS
    for sub in (command_of(name).names or {"": ""})
    if sub not in PUBLISHED  # the settings of pipeline
]


def printed(line, capsys):
    assert cli.main(line.split()) == 0
    return capsys.readouterr().out


def options_in(text):
    """Options in a help text: each begins a line of a box."""
    lines = re.findall(r"^[│ ] (-.*?)(?:  .*)?[│ ]?$", text, re.MULTILINE)
    return [option for line in lines for option in re.findall(r"--\w[\w.-]*", line)]


@pytest.mark.parametrize("line", [*COMMANDS, *LINES])
def test_help_is_a_sentence_arguments_and_an_example(line, capsys):
    text = printed(f"{line} --help", capsys)
    usage, sentence, example = text.split("\n\n")[:3]
    assert usage.startswith(f"usage: mfd-fast {line} [-h]")
    assert re.fullmatch(r"[A-Z].*\.", sentence) and sentence.count(". ") == 0
    assert example.startswith(f"Example: mfd-fast {line.split()[0]}")
    assert "positional arguments" in text or "options" in text
    unexplained = re.findall(r"^[│ ] (--\S+) \S+ +\((?:default|required).*$", text, re.MULTILINE)
    assert not unexplained


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_can_be_parsed(name):
    example = " ".join(command_of(name).text.split("Example: ")[1].split())
    _, command, *rest = re.findall(r'"[^"]*"|\S+', example.split(" > ")[0])
    assert command == name
    known = command_of(name)
    sub = rest.pop(0) if known.names else ""
    assert not known.names or sub in known.names
    known._bound(known.ready(sub), rest, "mfd-fast")


def test_the_first_page_lists_every_command(capsys):
    text = printed("--help", capsys)
    assert all(f"• {name} " in text or f"* {name} " in text for name in COMMANDS)
    assert cli.main([]) == 2


def test_version(capsys):
    assert printed("--version", capsys) == f"mfd-fast {__version__}\n"


def test_options_of_commands_are_frozen(capsys):
    """A new option is a reviewed diff of tests/data/commands.txt; settings are in settings.txt."""
    settings = {f"--{key.replace('_', '-')}" for config in PRESETS.values()
                for key, _ in leaves(to_dict(config))}  # fmt: skip
    lines = []
    for line in LINES:
        found = set(options_in(printed(f"{line} --help", capsys))) - settings - {"--help"}
        found = {option for option in found if ".no-" not in option}
        lines.append(" ".join([f"{line}:", *sorted(found)]))
    assert lines == FROZEN.read_text().splitlines()


@pytest.mark.parametrize("objective", ["mfd", "vsd", "dmd2", "senseflow", "imm"])
def test_settings_of_a_method_are_in_its_help_alone(objective, capsys):
    found = set(options_in(printed(f"distill digits --objective {objective} --help", capsys)))
    of = {f"distill.{name}": (name,) for name in get_args(ObjectiveName)} | OF_METHODS
    for key, _ in leaves(to_dict(PRESETS["digits"])):
        methods = of.get(".".join(key.split(".")[:2]), (objective,))
        option = f"--{key.replace('_', '-')}"
        assert (option in found) == (objective in methods and key != "preset"), key


def test_a_short_name_is_beside_its_setting(capsys):
    text = printed("distill sana-tiny --help", capsys)
    assert "--prompts STR, --sana.prompts STR" in text
    assert "--objective" in options_in(text) and "--preset" not in options_in(text)
    assert "--prompts" not in options_in(printed("distill digits --help", capsys))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--lr 1e-3", "'--distill.aux-optim.lr' or '--distill.student-optim.lr'"),
        ("--seed=1", "'--distill.seed'"),
        ("--steps 4", "'--distill.student-steps'"),
        ("--distill.stepsize .1", "'--distill.step-size' or '--distill.seed'"),
        ("--rsume", "'--resume'"),
    ],
)
def test_a_wrong_option_names_the_nearest(typed, meant, capsys):
    assert cli.main(["distill", "digits", *typed.split()]) == 2
    option = re.split(r"[ =]", typed)[0]
    expected = f"unknown option '{option}'; mfd-fast distill digits --help lists the options; "
    assert expected + f"did you mean {meant}?" in capsys.readouterr().err


def test_a_setting_of_another_method_names_it(capsys):
    argv = ["distill", "digits", "--distill.dmd2.gan-weight", "1"]
    assert cli.main(argv) == 2
    assert "it belongs to --objective dmd2 or senseflow" in capsys.readouterr().err
    assert cli.main(["config", *argv[1:], "--distill.objective", "senseflow"]) == 0
    assert "gan_weight: 1.0" in capsys.readouterr().out


def test_no_choices_are_printed_as_a_python_list(capsys):
    argv = "distill digits --train.capture maybe", "distil digits", "distill x", "pretrain x"
    argv += "distill digits --memory-profile 12", "encode-prompts c --dtype x --prompts p"
    for line in argv:
        assert cli.main(line.split()) == 2
        assert not re.search(r"[\[(]'", capsys.readouterr().err), line


def test_a_sentence_comes_out_of_a_coloured_box():
    """As tyro draws it on a terminal: boxes of UTF-8 with colours, lines of 80 characters."""
    box = (
        "\x1b[31m╭─ \x1b[0m\x1b[1mValue error\x1b[0m ─────────────────────────────────╮\x1b[0m\n"
        "\x1b[31m│\x1b[0m Error parsing --n: invalid literal for int() with   \x1b[31m│\x1b[0m\n"
        "\x1b[31m│\x1b[0m base 10: 'many'                                     \x1b[31m│\x1b[0m\n"
        "\x1b[31m│\x1b[0m ─────────────────────────────────────────────────── \x1b[31m│\x1b[0m\n"
        "\x1b[31m│\x1b[0m Argument helptext:                                  \x1b[31m│\x1b[0m\n"
        "\x1b[31m╰─────────────────────────────────────────────────────╯\x1b[0m\n"
    )
    expected = "--n: expected a whole number, got 'many'; mfd-fast x --help lists the options"
    assert complaint(box, "mfd-fast x") == expected


BASH_PROBE = """
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
eval "$(complete -p mfd-fast | sed 's/.*-F *\\([^ ]*\\).*/\\1/')"
echo "${{COMPREPLY[*]}}"
"""


@pytest.fixture(scope="module")
def bash(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "mfd-fast"
    assert cli.main(["--tyro-write-completion", "bash", str(path)]) == 0
    return path.read_text()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("mfd-fast dis", "distill"),
        ("mfd-fast distill dig", "digits"),
        ("mfd-fast distill digits --distill.step", "--distill.step-size"),
        ("mfd-fast distill digits --sana.rank", ""),
        ("mfd-fast distill sana-tiny --sana.rank", "--sana.rank"),
    ],
)
def test_bash_completes(words, expected, bash):
    script = bash + BASH_PROBE.format(words=words)
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected, done.stderr


def test_a_shell_that_is_not_known(capsys):
    assert cli.main(["--tyro-print-completion", "fsh"]) == 2
    assert capsys.readouterr().err.startswith("mfd-fast: Shell should be one `bash`, `zsh`")
