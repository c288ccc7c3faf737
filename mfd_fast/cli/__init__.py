"""The command line ``mfd-fast COMMAND``: one function a command, imported when it is typed.

Exit codes: 0 done; 2 the request was wrong (one sentence on stderr, nothing overwritten); 130
stopped by the user.
"""

import sys
from importlib import import_module

from mfd_fast.config import nearest
from mfd_fast.presets import PRESETS

# command -> where it is, module:function, and how it is typed
COMMANDS: dict[str, tuple[str, str]] = {
    "distill": (
        "mfd_fast.cli.run:distill",
        "PRESET [--out FOLDER] [--objective NAME] [--distill.KEY VALUE ...]",
    ),
    "sample": (
        "mfd_fast.cli.run:sample",
        "RUN [--out FILE.png] [--num N] [--seed S] [--prompt TEXT ...]",
    ),
    "evaluate": ("mfd_fast.cli.run:evaluate", "RUN [--num-samples N]"),
    "pretrain": ("mfd_fast.cli.run:pretrain", "digits [--out FOLDER] [--KEY VALUE ...]"),
    "info": ("mfd_fast.cli.info:info", ""),
}


def usage() -> str:
    """What ``mfd-fast --help`` prints."""
    lines = ["mfd-fast: distil flow-matching models by Mean Flow Distillation", ""]
    lines += [f"  mfd-fast {name} {how}".rstrip() for name, (_, how) in COMMANDS.items()]
    presets = ", ".join(PRESETS)
    return "\n".join(
        [*lines, "", f"presets: {presets}.  mfd-fast distill PRESET --help lists every setting."]
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(
            f"mfd-fast: unknown command {argv[0]!r}; there is {list(COMMANDS)}"
            f"{nearest(argv[0], COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    module, function = COMMANDS[argv[0]][0].split(":")
    try:
        getattr(import_module(module), function)(argv[1:])
    except (ValueError, OSError, ImportError) as error:
        print(f"mfd-fast {argv[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mfd-fast: stopped", file=sys.stderr)
        return 130
    return 0
