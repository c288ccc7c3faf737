"""``mfd-fast bench``: the benchmarks of a checkout on this machine, and a report."""

from pathlib import Path

from mfd_fast.cli.options import no_more, options


def bench(argv: list[str]) -> None:
    """Run the benchmarks, compare with the committed results of this device, write a report."""
    own, rest = options(argv, out="runs/bench", only="", smoke=False)
    no_more(rest, ("--out", "--only", "--smoke"))
    try:
        from bench import suite, suite_page
    except ImportError as error:
        raise ValueError(
            f"the benchmarks are in the repository, not in the installed package ({error}): run "
            "mfd-fast bench in a checkout"
        ) from None
    folder = Path(own.out)
    if (folder / "report.html").exists():
        raise ValueError(f"{folder} holds a report already; choose another folder with --out")
    files, failed = suite.run(suite.benchmarks(own.only, smoke=own.smoke), folder.resolve())
    if files:
        print(suite_page.report(files, folder))
        print(folder / "report.html")
    if failed:
        raise ValueError(f"{'; '.join(failed)}: see above")
