"""``mfd-fast profile``: where the time of a preset's updates goes on this machine."""

from dataclasses import replace
from pathlib import Path

from mfd_fast.cli.options import options, parse_config, positional
from mfd_fast.presets import preset

TRACE, PICTURE = "trace.json", "profile.png"


def profile(argv: list[str]) -> None:
    """Profile a few cycles; leaves a Chrome trace and a picture in the folder."""
    name, rest = positional(argv, "profile", "PRESET")
    own, rest = options(rest, out="", cycles=3, batch=0)
    config = parse_config(preset(name), rest, f"mfd-fast profile {name}")
    if own.batch:
        config = replace(config, train=replace(config.train, batch_size=own.batch))
    folder = Path(own.out or f"runs/profile-{name}")
    if (folder / TRACE).exists():
        raise ValueError(f"{folder} holds a profile already; choose another folder with --out")
    from mfd_fast.cli.built import make_distiller
    from mfd_fast.profiling.profile import profile_cycles, summary
    from mfd_fast.report.profile_picture import profile_picture

    distiller, next_cond = make_distiller(config)
    result = profile_cycles(distiller, next_cond, folder / TRACE, cycles=own.cycles)
    profile_picture(result, folder / PICTURE)
    print(summary(result))
    print(folder / TRACE, folder / PICTURE, sep="\n")
