"""The command line ``mfd-fast COMMAND``: one typed function a command, imported when it is typed.

Exit codes: 0 done; 2 the request was wrong (one sentence on stderr, nothing overwritten); 128 + the
signal's number when it was stopped, a run after a checkpoint: 130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1,
129 SIGHUP.
"""

import errno
import logging
import os
import re
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from mfd_fast.cli.parse import HELP, Command, completed, listed, show
from mfd_fast.run.config import nearest
from mfd_fast.run.stop import Stopped

# command -> the module of this folder that has the function of its name
COMMANDS: dict[str, str] = {
    "distill": "run",
    "config": "run",
    "report": "run",
    "sample": "run",
    "evaluate": "run",
    "export": "run",
    "pretrain": "pretrain",
    "prepare": "data",
    "encode-prompts": "data",
    "estimate": "cost",
    "calibrate": "cost",
    "profile": "cost",
    "compat": "compat",
    "info": "cost",
}
ABOUT = """Distil flow-matching models by Mean Flow Distillation.

Example: mfd-fast distill digits.  mfd-fast COMMAND --help shows the options of a command."""
COMPLETION = ("--tyro-print-completion", "--tyro-write-completion")
OPTION = re.compile(r"mfd-fast [a-z][^;]*|(?<![\w-])--[a-z][\w.-]*\w")


def command_of(name: str) -> Command:
    """The command of this name."""
    module = import_module(f"mfd_fast.cli.{COMMANDS[name]}")
    found = getattr(module, name.replace("-", "_"))
    return found if isinstance(found, Command) else Command(found)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    name = argv[0] if argv else ""
    if not name or name in HELP or name in COMPLETION:
        return _help(argv or ["--help"]) or (0 if argv else 2)
    if name == "--version":
        from mfd_fast import __version__

        print(f"mfd-fast {__version__}")
        return 0
    try:
        if name not in COMMANDS:
            known = ", ".join(COMMANDS)
            raise ValueError(f"unknown command {name!r}; there is {known}{nearest(name, COMMANDS)}")
        _quiet()
        _run(name, argv[1:])
    except SystemExit as stop:
        return int(stop.code or 0)
    except (ValueError, OSError, ImportError, Stopped) as error:
        print(f"mfd-fast {name}: {spoken(name, sentence(error, argv))}", file=sys.stderr)
        return error.exit_code if isinstance(error, Stopped) else 2
    except KeyboardInterrupt:
        print("mfd-fast: stopped", file=sys.stderr)
        return 130
    return 0


def _quiet() -> None:
    """Keep what libraries tell of their optional parts from the terminal; errors stay."""
    for library in ("torchao", "bitsandbytes", "torch.utils._pytree", "xformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    for variable in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")


def _help(argv: list[str]) -> int:
    """tyro's help, or its script that completes commands, names and settings in a shell."""
    known = {name: command_of(name) for name in COMMANDS}
    kind = listed({name: command.sentence for name, command in known.items()})
    try:
        show(completed(known) if argv[0] in COMPLETION else kind, argv, "mfd-fast", ABOUT)
    except SystemExit as stop:
        return int(stop.code or 0)
    except (AssertionError, ImportError) as error:  # a shell that tyro does not know
        print(f"mfd-fast: {error}", file=sys.stderr)
    return 2


def _run(name: str, argv: list[str]) -> None:
    command, prog = command_of(name), f"mfd-fast {name}"
    if not command.names:
        return command.parse("", argv, prog)()
    noun, typed = command.noun, argv[0] if argv else ""
    if typed in HELP:
        text = f"{command.text}\n\n{prog} {noun} --help lists its options."
        show(listed(command.names), argv, prog, text)
    elif not typed or typed.startswith("-"):
        got = f", {noun} first; got {typed!r}" if typed else f"; {prog} --help shows an example"
        raise ValueError(f"expected {prog} {noun}{got}")
    elif typed not in command.names and noun != "PRESET":  # of other packages, too
        known = ", ".join(command.names)
        raise ValueError(
            f"unknown {noun.lower()} {typed!r}; there is {known}{nearest(typed, command.names)}"
        )
    command.parse(typed, argv[1:], f"{prog} {typed}")()


# Optional packages, by the extra that brings them.
EXTRAS = {
    **dict.fromkeys(("diffusers", "transformers", "peft", "accelerate", "datasets"), "sana"),
    **dict.fromkeys(("sklearn", "matplotlib"), "digits"),
    **dict.fromkeys(("torchmetrics", "scipy"), "eval"),
    "PIL": "occfm",
}


def sentence(error: Exception, argv: list[str]) -> str:
    """What to say of an error: of a package that is missing, how to get it; the system's own,
    "[Errno 2] ...", with the option it is about.
    """
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if extra := EXTRAS.get(package):
            return f"this needs {package}, which is missing; run: pip install 'mfd-fast[{extra}]'"
    if not isinstance(error, OSError) or not error.filename or not error.strerror:
        return str(error)
    path = os.fsdecode(error.filename)
    before = [argv[i] for i, word in enumerate(argv[1:]) if word and path.endswith(word)]
    option = f"{before[0]}: " if before and before[0].startswith("--") else ""
    if error.errno == errno.ENOENT:
        return f"{option}there is no {path}; look at the spelling, or from which folder it is typed"
    return f"{option}{path}: {error.strerror.lower()}; name another place, or change its rights"


def spoken(command: str, message: str) -> str:
    """The message in the words of the command that was typed.

    The library's messages name options as ``mfd-fast distill`` has them.  A command that has others
    of the same meaning says its own; a command typed out in a message stays as it is.
    """
    words: Mapping[str, Any] = SPOKEN.get(command, {})
    if command == "compat":
        from mfd_fast.models.sana.compat import spoken_flags

        words = spoken_flags()
    return OPTION.sub(lambda found: words.get(found.group(), found.group()), message)


# command -> option of distill -> what is typed there
SPOKEN: Mapping[str, Mapping[str, str]] = {
    "encode-prompts": {
        "--teacher": "the CHECKPOINT that comes first",
    },
    "evaluate": {"--prompt-key": "prompt_column in the run's config.yaml"},
}
