"""``mfd-fast study``: the paper's analyses at small size."""

from pathlib import Path

from mfd_fast.cli.options import no_more, options, positional


def study(argv: list[str]) -> None:
    """Run one study, or all that a folder lacks and the page of their verdicts."""
    name, rest = positional(argv, "study", "NAME|all")
    given, rest = options(rest, out="runs/studies", report="", seed=0)
    no_more(rest, ("--out", "--report", "--seed"))
    try:
        from studies.report import module_of, run_all, run_study, write_report
    except ImportError as error:
        raise ValueError(
            f"the studies are in the repository, not in the installed package ({error}): run "
            "mfd-fast study in a checkout"
        ) from None
    folder = Path(given.out)
    if name == "all":
        run_all(folder, seed=given.seed)
        page = Path(given.report or folder / "studies.md")
        write_report(folder, page)
        print(page)
        return
    if given.report:
        raise ValueError("--report belongs to mfd-fast study all")
    module_of(name)
    verdict = run_study(name, folder, seed=given.seed)
    print(f"{verdict.word}: {verdict.numbers}")
    print(folder / f"{name}.json", folder / f"{name}.png", sep="\n")
