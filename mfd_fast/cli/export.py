"""``mfd-fast export``: the student as a full checkpoint in the layout of its teacher."""

from pathlib import Path

from mfd_fast.cli.options import check_places, moved_files, options, positional
from mfd_fast.files.whole import written


def export(argv: list[str]) -> None:
    """Write a run's student as a checkpoint of its own: all of it, or nothing."""
    folder, rest = positional(argv, "export", "RUN")
    own, rest = options(rest, out="")
    check_places(rest, "export", ("--out",))
    if not own.out:
        raise ValueError("expected mfd-fast export RUN --out FOLDER")
    out = Path(own.out)
    if out.exists():
        raise ValueError(f"{out} exists; choose another folder with --out")
    from mfd_fast.models import open_run

    run, task = open_run(folder, lambda config: moved_files(config, rest, "export"))
    with written(out) as partial:
        made = task.export(run, partial).relative_to(partial)
    print(out / made)
