"""``mfd-fast export``: the student as a full checkpoint in the layout of its teacher."""

from pathlib import Path

from mfd_fast.cli.options import no_more, options, positional


def export(argv: list[str]) -> None:
    """Write a run's student as a checkpoint of its own."""
    folder, rest = positional(argv, "export", "RUN")
    own, rest = options(rest, out="")
    no_more(rest, ("--out",))
    if not own.out:
        raise ValueError("expected mfd-fast export RUN --out FOLDER")
    from mfd_fast.runner import open_run

    run, task = open_run(folder)
    print(task.export(run, Path(own.out)))
