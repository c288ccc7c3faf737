"""The command line: ``mfd-fast distill | pretrain | sample | evaluate | info``.

Exit codes: 0 done; 2 the request was wrong (one sentence on stderr, nothing overwritten); 130
stopped by the user.
"""

import argparse
import contextlib
import io
import re
import sys
from dataclasses import replace
from pathlib import Path

from mfd_fast.config import PRESETS, RunConfig, nearest, preset, to_dict

USAGE = """mfd-fast: distil flow-matching models by Mean Flow Distillation

  mfd-fast distill PRESET [--out FOLDER] [--objective mfd|vsd] [--distill.KEY VALUE ...]
  mfd-fast sample RUN [--out FILE.png] [--num N] [--seed S]
  mfd-fast evaluate RUN [--num-samples N]
  mfd-fast pretrain digits [--out FOLDER] [--KEY VALUE ...]
  mfd-fast info

presets: {presets}.  mfd-fast distill PRESET --help lists every setting.
"""


NOT_COMPILED = (
    "none, the PyTorch references run in their place; install a C++ compiler (apt-get install g++) "
    "and repeat pip install --no-build-isolation --force-reinstall --no-deps ."
)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {
        "distill": distill,
        "pretrain": pretrain,
        "sample": sample,
        "evaluate": evaluate,
        "info": info,
    }
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE.format(presets=", ".join(PRESETS)))
        return 0 if argv else 2
    if argv[0] not in commands:
        print(
            f"mfd-fast: unknown command {argv[0]!r}; there is {list(commands)}"
            f"{nearest(argv[0], commands)}",
            file=sys.stderr,
        )
        return 2
    try:
        commands[argv[0]](argv[1:])
    except (ValueError, OSError, ImportError) as error:
        print(f"mfd-fast {argv[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mfd-fast: stopped", file=sys.stderr)
        return 130
    return 0


def distill(argv: list[str]) -> None:
    """Distil a preset's teacher; leaves a run folder."""
    name, rest = _positional(argv, "distill", "PRESET")
    options, rest = _options(rest, out="", objective="")
    base = preset(name)
    if options.objective:
        base = replace(base, distill=_with_objective(base.distill, options.objective))
    config = _parse(RunConfig, base, rest, f"mfd-fast distill {name}")
    if config.preset != name:
        raise ValueError(f"the preset is named once: {name!r}; drop --preset {config.preset}")
    from mfd_fast.runner import run_distillation

    run_distillation(config, Path(options.out) if options.out else _free_folder(config))


def pretrain(argv: list[str]) -> None:
    """Train a preset's teacher from scratch."""
    name, rest = _positional(argv, "pretrain", "PRESET")
    if name != "digits":
        raise ValueError(
            f"only the digits teacher is trained here, got {name!r}; there is ['digits']"
        )
    options, rest = _options(rest, out="runs/digits-teacher")
    from mfd_fast.tasks.digits_eval import format_table
    from mfd_fast.tasks.digits_teacher import PretrainConfig
    from mfd_fast.tasks.digits_teacher import pretrain as pretrain_digits

    config = _parse(PretrainConfig, PretrainConfig(), rest, "mfd-fast pretrain digits")
    metrics = pretrain_digits(config, Path(options.out))
    print(format_table(metrics["evaluation"]))


def sample(argv: list[str]) -> None:
    """Pictures of a run's student."""
    folder, rest = _positional(argv, "sample", "RUN")
    options, rest = _options(rest, out="", num=40, seed=0)
    _no_more(rest)
    if options.num < 1:
        raise ValueError(f"--num must be >= 1, got {options.num}")
    from mfd_fast.runner import open_run

    run, task = open_run(folder)
    path = Path(options.out or run / "samples.png")
    if path.exists():
        raise ValueError(f"{path} exists; choose another file with --out")
    task.sample(run, path, num=options.num, seed=options.seed)
    print(path)


def evaluate(argv: list[str]) -> None:
    """Repeat a run's result table."""
    folder, rest = _positional(argv, "evaluate", "RUN")
    options, rest = _options(rest, num_samples=0)
    _no_more(rest)
    from mfd_fast.runner import open_run

    run, task = open_run(folder)
    num_samples = options.num_samples or run.config.num_eval_samples
    print(task.format_table(task.evaluate(run, num_samples)))


def info(argv: list[str]) -> None:
    """Versions, devices, and how the compiled operators were built."""
    _no_more(argv)
    import torch

    from mfd_fast import __version__
    from mfd_fast._ext import backend, build_info

    built = build_info()
    print(f"mfd-fast {__version__}, torch {torch.__version__}, python {sys.version.split()[0]}")
    print(f"operators: MFD_FAST_BACKEND={backend()}")
    print(f"compiled operators: {built or NOT_COMPILED}")
    if torch.cuda.is_available():
        print(f"device: {torch.cuda.get_device_name()}")
    else:
        print(f"device: CPU, {torch.get_num_threads()} threads; no NVIDIA GPU is visible")


def _positional(argv: list[str], command: str, name: str) -> tuple[str, list[str]]:
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


def _options(argv: list[str], **defaults) -> tuple[argparse.Namespace, list[str]]:
    """The few options of a command itself; everything else is left for the config."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    return parser.parse_known_args(argv)


def _no_more(rest: list[str]) -> None:
    if rest:
        raise ValueError(f"unknown option {rest[0]!r}; mfd-fast --help shows what there is")


def _with_objective(distill_config, objective: str):
    from mfd_fast.config import from_dict

    return from_dict(
        type(distill_config), to_dict(distill_config) | {"objective": objective}, "distill."
    )


def _parse(cls: type, default, argv: list[str], prog: str):
    """Apply ``--dotted.key value`` overrides to a config dataclass."""
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            config, unknown = tyro.cli(
                cls,
                default=default,
                args=argv,
                prog=prog,
                return_unknown_args=True,
                description=cls.__doc__,
            )
    except SystemExit as stop:
        if not stop.code:
            raise  # --help was printed
        raise ValueError(_one_sentence(complaint.getvalue(), prog)) from None
    if unknown:
        key = unknown[0].lstrip("-").split("=")[0].replace("-", "_")
        known = list(_keys(to_dict(default)))
        raise ValueError(
            f"unknown setting {unknown[0]!r}; {prog} --help lists all{nearest(key, known)}"
        )
    return config


def _one_sentence(box: str, prog: str) -> str:
    """tyro draws its errors as a box; this is the sentence inside."""
    lines = [line.strip("│╭╰╮╯|+ ") for line in box.splitlines()]
    text = " ".join(line for line in lines if not set(line) <= set("─-"))
    found = re.search(r"Error parsing (.*?) *(?:Argument helptext|For full helptext|$)", text)
    return f"{found.group(1) if found else text.strip()}; {prog} --help lists every setting"


def _keys(tree: dict, prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def _free_folder(config: RunConfig) -> Path:
    number = 1
    while (path := Path(f"runs/{config.preset}-{config.distill.objective}-{number}")).exists():
        number += 1
    return path
