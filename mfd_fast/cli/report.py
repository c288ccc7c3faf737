"""``mfd-fast report``: one or several runs as one HTML file."""

from pathlib import Path

from mfd_fast.cli.options import options


def report(argv: list[str]) -> None:
    """Write the report; runs may still be going on."""
    own, folders = options(argv, out="")
    if unknown := [word for word in folders if word.startswith("-")]:
        raise ValueError(f"unknown option {unknown[0]!r}; there is --out FILE.html")
    if not folders:
        raise ValueError("expected mfd-fast report RUN [RUN ...] [--out FILE.html]")
    from mfd_fast.run.folder import RunFolder
    from mfd_fast.run.page import write_report

    runs = [RunFolder.open(folder) for folder in folders]
    print(write_report(runs, Path(own.out) if own.out else runs[0] / "report.html"))
