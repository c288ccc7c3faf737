"""``mfd-fast profile``: where the time of a preset's updates goes on this machine."""

import os
from dataclasses import replace
from pathlib import Path

from mfd_fast.cli.numbers import count
from mfd_fast.cli.options import options, positional, preset_config

HELP = """mfd-fast profile PRESET [options] [settings as for distill]

  --out FOLDER   for trace.json; runs/profile-PRESET if left out
  --cycles N     timed cycles, 3 if left out
  --batch B      samples an update

mfd-fast profile PRESET --help lists the settings too."""
TRACE = "trace.json"
CYCLES = 3


def profile(argv: list[str]) -> None:
    """Profile a few cycles; leaves a Chrome trace in the folder."""
    if {"-h", "--help"} & set(argv):
        print(HELP)
        if argv[0].startswith("-"):
            return
    name, rest = positional(argv, "profile", "PRESET")
    own, rest = options(rest, out="", cycles=None, batch=None)
    cycles = count("--cycles", own.cycles, "the number of cycles", CYCLES) or CYCLES
    batch = count("--batch", own.batch, "train.batch_size", 4)
    config = preset_config(name, rest, "profile")
    if batch:
        config = replace(config, train=replace(config.train, batch_size=batch))
    folder = Path(own.out or f"runs/profile-{name}")
    _check_folder(folder)
    from mfd_fast.cli.built import built
    from mfd_fast.cost.profile import profile_cycles, summary

    distiller, next_cond = built(config)
    _make_folder(folder)
    result = profile_cycles(distiller, next_cond, folder / TRACE, cycles=cycles)
    print(summary(result))
    print(folder / TRACE)


def _check_folder(folder: Path) -> None:
    """``ValueError`` if a profile is there, or cannot be written there."""
    if (folder / TRACE).exists():
        raise ValueError(f"{folder} holds a profile already; choose another folder with --out")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{parent} is no folder that can be written; choose another with --out")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be made ({error.strerror}); choose another folder with --out"
        ) from None
