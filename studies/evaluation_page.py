"""docs/evaluations.md from the figures of the evaluations studies."""

import json
from pathlib import Path
from typing import Any

from studies import evaluations as study

TEMPLATE = Path(__file__).with_name("evaluations.template.md")
# metric: title, factor, decimals
SHOWN = {
    "FD": ("FD", 1, 2),
    "recall": ("recall", 1, 3),
    "to teacher": ("energy distance to the teacher x 1000", 1000, 1),
    "to data": ("to the distribution x 1000", 1000, 1),
    "IoU": ("IoU", 1, 2),
    "mIoU": ("mIoU", 1, 2),
}
Rows = dict[str, dict[str, Any]]


def page(document: dict[str, Any], link: str, folder: Path) -> str:
    """The page; ``link`` leads to the JSON file, which lies in ``folder`` beside the others."""
    digits = document["figures"]["places"]
    toys, occfm, sana = (figures_of(folder, name) for name in ("toys", "occfm", "sana"))
    small = (occfm["rows"], sana["rows"])
    return TEMPLATE.read_text().format(
        link=link.rpartition("/")[0],
        device=document["device"],
        torch=document["torch"],
        date=document["date"][:10],
        commits=", ".join(sorted(commits(*digits.values(), *toys.values(), *small))),
        rule=rule(),
        winner=winner(digits, toys),
        digits=table(digits["digits"], study.DECIDES["digits"]),
        toys="\n\n".join(
            f"### {place}\n\n{table(rows, ('to teacher',), ('to data',))}"
            for place, rows in toys.items()
        ),
        occfm=table(occfm["rows"], ("IoU", "mIoU")),
        sana=table(sana["rows"], study.DECIDES["digits"]),
        start_occfm="IoU {IoU:.2f}, mIoU {mIoU:.2f}".format(**occfm["start"]),
        start_sana="FD {FD:.2f}, recall {recall:.3f}".format(**sana["start"]),
    )


def figures_of(folder: Path, name: str) -> dict[str, Any]:
    """Those of ``evaluations-NAME``; ``ValueError`` if it was not run into this folder."""
    path = folder / f"evaluations-{name}.json"
    if not path.is_file():
        raise ValueError(
            f"the page shows {path} too, which is not there; run python -m studies "
            f"{path.stem} --out {folder}"
        )
    return json.loads(path.read_text())["figures"]


def commits(*places: Rows) -> set[str]:
    """Of all runs."""
    return {run["commit"] for rows in places for row in rows.values() for run in row["runs"]}


def rule() -> str:
    """The part of the study's docstring that says when a saving holds, pays and wins."""
    return (
        study.__doc__.partition("The rule, ")[2]
        .partition("An interval")[0]
        .strip()
        .join(("The rule, ", ""))
    )


def winner(digits: dict[str, Rows], toys: dict[str, Rows]) -> str:
    """What the rule says of the settings in ``COMBINED``, digits and both toys together."""
    name = study.winner(digits)
    if name is None:
        return "By the rule **no setting wins**: none holds on the digits."
    worse = [place for place in study.TOYS if not study.holds(toys[place][name], "to teacher")]
    if worse:
        return f"By the rule **no setting wins**: {name} is worse on {' and '.join(worse)}."
    return f"By the rule **{name}** wins: it holds on the digits and on both toys."


def table(rows: Rows, decide: tuple[str, ...], more: tuple[str, ...] = ()) -> str:
    """Evaluations, quality and differences; what of the metrics decides comes before the rest."""
    metrics = (*decide, *more)
    titles = [column for m in metrics for column in (SHOWN[m][0], "minus the preset's (95 %)")]
    head = ["setting", "evaluations a cycle", "share", *titles, "verdict", "until, thousand"]
    shape = ["---", "---:", "---:", *("---:", "---") * len(metrics), "---", "---:"]
    lines = [" | ".join(head), "|".join(shape)]
    target = rows["preset"]["quality"][decide[0]]
    for name, row in rows.items():
        spent = study.reached(row, decide[0], target)
        cells = [name, f"{row['evaluations']:.1f}", f"{row['share']:.0%}"]
        for metric in metrics:
            _, factor, decimals = SHOWN[metric]
            quality = factor * row["quality"][metric]
            cells += [f"{quality:.{decimals}f}", between(row, metric, decimals, factor)]
        cells += [
            "" if name == "preset" else verdict(row, decide),
            "not" if spent is None else f"{spent / 1000:.1f}",
        ]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


def verdict(row: dict[str, Any], metrics: tuple[str, ...]) -> str:
    """What the intervals say of what is measured at the place."""
    if not all(study.holds(row, metric) for metric in metrics):
        return "worse"
    return "pays" if row["share"] < 1 else "holds"


def between(row: dict[str, Any], metric: str, places: int, factor: float = 1) -> str:
    """A paired difference with its interval; nothing where all are zero."""
    mean, low, high = (factor * value for value in row["difference"][metric])
    if mean == low == high == 0:
        return "-"
    return f"{mean:+.{places}f} ({low:+.{places}f} to {high:+.{places}f})"
