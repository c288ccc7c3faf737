"""``python -m studies NAME|all``: the paper's analyses at small size."""

import argparse
from pathlib import Path

from studies import STUDIES
from studies.report import module_of, run_all, run_study, write_page, write_report


def main(argv: list[str] | None = None) -> None:
    """Run one study, or all that a folder lacks and the page of their verdicts."""
    parser = argparse.ArgumentParser("python -m studies", description=__doc__)
    parser.add_argument("name", choices=[*STUDIES, "all"], metavar="|".join([*STUDIES, "all"]))
    parser.add_argument("--out", type=Path, default=Path("runs/studies"), help="folder of results")
    parser.add_argument("--report", type=Path, help="page of all; OUT/studies.md if left out")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    has_page = given.name == "all" or hasattr(module_of(given.name), "page")
    if given.report and not has_page:
        parser.error("--report belongs to python -m studies all and to a study with its own page")
    try:
        if given.name == "all":
            page = given.report or given.out / "studies.md"
            run_all(given.out, seed=given.seed)
            write_report(given.out, page)
            print(page)
        elif given.report and (given.out / f"{given.name}.json").exists():
            write_page(given.name, given.out, given.report)
            print(given.report)
        else:
            verdict = run_study(given.name, given.out, seed=given.seed)
            print(f"{verdict.word}: {verdict.numbers}")
            print(given.out / f"{given.name}.json", given.out / f"{given.name}.png", sep="\n")
            if given.report:
                write_page(given.name, given.out, given.report)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
