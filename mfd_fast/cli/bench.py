"""``mfd-fast bench``: the benchmarks of a checkout on this machine, and a report."""

from pathlib import Path

from mfd_fast.cli.options import no_more, options


def bench(argv: list[str]) -> None:
    """Run the benchmarks, compare with the committed results of this device, write a report."""
    own, rest = options(argv, out="runs/bench", only="", smoke=False)
    no_more(rest, ("--out", "--only", "--smoke"))
    try:
        from bench.__main__ import run
        from bench.running import Options
    except ImportError as error:
        raise ValueError(
            f"the benchmarks are in the repository, not in the installed package ({error}): run "
            "mfd-fast bench in a checkout"
        ) from None
    from mfd_fast.cost.devices import here

    chosen = Options(here(), smoke=own.smoke, out=Path(own.out).resolve())
    print(run([own.only] if own.only else [], chosen))
