"""The command line ``mfd-fast COMMAND``: one function a command, imported when it is typed.

Exit codes: 0 done; 2 the request was wrong (one sentence on stderr, nothing overwritten); 128 + the
signal's number when it was stopped, a run after a checkpoint: 130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1,
129 SIGHUP.
"""

import sys
from importlib import import_module

from mfd_fast.cli.spoken import spoken
from mfd_fast.models import PRESETS
from mfd_fast.run.config import nearest
from mfd_fast.run.stop import Stopped

# command -> where it is, module:function, and how it is typed
COMMANDS: dict[str, tuple[str, str]] = {
    "distill": (
        "mfd_fast.cli.run:distill",
        "PRESET [--dry-run] [--out FOLDER] [--resume [CHECKPOINT]] [--config FILE.yaml] "
        "[--objective NAME] [--memory-profile GB] [--distill.KEY VALUE ...]",
    ),
    "config": ("mfd_fast.cli.config:config", "PRESET [settings as for distill]"),
    "report": ("mfd_fast.cli.report:report", "RUN [RUN ...] [--out FILE.html]"),
    "sample": (
        "mfd_fast.cli.run:sample",
        "RUN [--out FILE.png] [--num N] [--seed S] [--prompt TEXT ...] [--teacher PATH]",
    ),
    "evaluate": (
        "mfd_fast.cli.run:evaluate",
        "RUN [--num-samples N] [--scores NAME=MODEL[:FILE],... [--prompts FILE]] [--teacher PATH]",
    ),
    "export": ("mfd_fast.cli.export:export", "RUN --out FOLDER [--teacher PATH]"),
    "pretrain": (
        "mfd_fast.cli.pretrain:pretrain",
        "digits|occfm-vae|occfm|cifar10 [--out FOLDER] [--KEY VALUE ...]",
    ),
    "prepare": (
        "mfd_fast.cli.prepare:prepare",
        "occfm --data DIR --out STORE [--synthetic N] [--vae FILE] | --check STORE",
    ),
    "encode-prompts": (
        "mfd_fast.cli.encode_prompts:encode_prompts",
        "CHECKPOINT --prompts FILE --out STORE [--skip-bad] | --check STORE",
    ),
    "estimate": (
        "mfd_fast.cli.estimate:estimate",
        "PRESET [--gpu NAME|this-machine] [--gpus N] [--batch B] [--peak-tflops T --bandwidth GB/S "
        "--memory GB] [--distill.KEY VALUE ...]",
    ),
    "study": ("mfd_fast.cli.study:study", "NAME|all [--out FOLDER] [--report FILE.md] [--seed S]"),
    "compat": ("mfd_fast.cli.compat:compat", "sana --FLAG=VALUE ... (the official script's flags)"),
    "completion": ("mfd_fast.cli.completion:completion", "bash|zsh|fish"),
    "profile": ("mfd_fast.cli.profile:profile", "PRESET [--out FOLDER] [--cycles N] [--batch B]"),
    "bench": ("mfd_fast.cli.bench:bench", "[--out FOLDER] [--only REGEX] [--smoke]"),
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
        print(f"mfd-fast {argv[0]}: {spoken(argv[0], str(error))}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"mfd-fast {argv[0]}: {spoken(argv[0], str(stopped))}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("mfd-fast: stopped", file=sys.stderr)
        return 130
    return 0
