"""Reading the command line: positionals, a command's own options, and ``--dotted.key`` settings."""

import argparse
import contextlib
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from mfd_fast.cli.numbers import count
from mfd_fast.models import PRESETS, preset
from mfd_fast.run.config import (
    RunConfig,
    from_dict,
    nearest,
    to_dict,
    with_absolute_paths,
    with_file,
    with_memory,
)

DEVICE = "--train.device"


def positional(argv: list[str], command: str, name: str) -> tuple[str, list[str]]:
    """The first word, and the rest; ``ValueError`` if an option or nothing stands there."""
    if not argv or argv[0] in ("-h", "--help"):
        raise ValueError(f"expected mfd-fast {command} {name}; mfd-fast --help shows examples")
    if argv[0].startswith("-"):
        raise ValueError(
            f"{name} comes first: mfd-fast {command} {name} [options]; got {argv[0]!r}"
        )
    return argv[0], argv[1:]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def options(argv: list[str], **defaults) -> tuple[argparse.Namespace, list[str]]:
    """The few options of a command itself, and everything else, left for the config.

    A default gives the type of its option: False makes a flag, a tuple an option that may be
    repeated, None one whose value may be left out ("" then).
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name, value in defaults.items():
        flag = f"--{name.replace('_', '-')}"
        if value is False:
            parser.add_argument(flag, action="store_true")
        elif value is None:
            parser.add_argument(flag, nargs="?", const="")
        elif isinstance(value, tuple):
            parser.add_argument(flag, action="append", default=[])
        else:
            parser.add_argument(flag, type=type(value), default=value)
    return parser.parse_known_args(argv)


def no_more(rest: list[str], known: tuple[str, ...] = ()) -> None:
    """``ValueError`` if anything is left, with the nearest of the ``known`` options."""
    if rest:
        raise ValueError(
            f"unknown option {rest[0]!r}; mfd-fast --help shows what there is"
            f"{nearest(rest[0], known)}"
        )


def preset_config(name: str, argv: list[str], command: str) -> RunConfig:
    """A preset, then ``--memory-profile``, ``--config``, ``--objective`` and settings over it."""
    own, rest = options(argv, config="", objective="", memory_profile=None)
    base = preset(name)
    if gigabytes := count("--memory-profile", own.memory_profile, "the GB of the card", 24):
        base = with_memory(base, gigabytes)
    if own.config:
        base = with_file(base, Path(own.config))
    if own.objective:
        distill = to_dict(base.distill) | {"objective": own.objective}
        base = replace(base, distill=from_dict(type(base.distill), distill, "distill."))
    rest = [_long_name(word, base.SHORT) for word in rest]
    if base.preset != name and ":" not in name:  # a model of the caller's own
        rest = ["--teacher", name, *rest]
    config = parse_config(base, rest, f"mfd-fast {command} {name}")
    if config.preset != base.preset:
        raise ValueError(f"the preset is named once: {name!r}; drop --preset {config.preset}")
    return config


def check_places(argv: list[str], command: str, own: tuple[str, ...]) -> None:
    """``ValueError`` for an option that neither is one of a command's ``own`` nor says where files
    of some run lie now.
    """
    flags = {f"--{key.replace('_', '-')}" for c in PRESETS.values() for key in c.PATHS}
    known = (*own, *sorted(flags), DEVICE)
    for word in argv:
        flag = word.partition("=")[0].replace("_", "-")
        if word.startswith("-") and flag not in known:
            raise ValueError(
                f"unknown option {word!r}; mfd-fast {command} takes {', '.join(known)}"
                f"{nearest(flag, known)}"
            )


def moved_files(config: RunConfig, argv: list[str], command: str) -> RunConfig:
    """The config of a finished run with the places where its files lie now, and its device."""
    return with_absolute_paths(parse_config(config, argv, f"mfd-fast {command} RUN"))


def _long_name(word: str, short: dict[str, str]) -> str:
    name, equals, value = word.partition("=")
    return short.get(name, name) + equals + value


def parse_config(default: Any, argv: list[str], prog: str) -> Any:
    """Apply ``--dotted.key value`` overrides to a config dataclass; the same class comes back."""
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            config, unknown = tyro.cli(
                type(default),
                default=default,
                args=argv,
                prog=prog,
                return_unknown_args=True,
                description=type(default).__doc__,
            )
    except SystemExit as stop:
        if not stop.code:
            raise  # --help was printed
        raise ValueError(_one_sentence(complaint.getvalue(), prog)) from None
    if unknown:
        key = unknown[0].lstrip("-").split("=")[0].replace("-", "_")
        raise ValueError(
            f"unknown setting {unknown[0]!r}; {prog} --help lists all"
            f"{nearest(key, dotted_keys(to_dict(default)))}"
        )
    return config


def _one_sentence(box: str, prog: str) -> str:
    """tyro draws its errors as a box; this is the sentence inside."""
    lines = [line.strip("│╭╰╮╯|+ ") for line in box.splitlines()]
    text = " ".join(line for line in lines if "──" not in line and not set(line) <= {"-"})
    found = re.search(
        r"(?:Error parsing )?(.*?)[. ]*(?:Argument helptext|For full helptext|$)", text
    )
    return f"{found.group(1)}; {prog} --help lists every setting"


def dotted_keys(tree: dict, prefix: str = "") -> list[str]:
    """Every leaf of nested mappings as ``section.key``."""
    keys: list[str] = []
    for name, value in tree.items():
        if isinstance(value, dict):
            keys += dotted_keys(value, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys
