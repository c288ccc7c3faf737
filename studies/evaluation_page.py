"""docs/evaluations.md from the evaluations study's figures."""

from pathlib import Path
from typing import Any

from studies import evaluations as study

TEMPLATE = Path(__file__).with_name("evaluations.template.md")


def page(document: dict[str, Any], link: str) -> str:
    """The page; ``link`` leads to the JSON file."""
    figures = document["figures"]
    places = figures["places"]
    runs = [run for rows in places.values() for row in rows.values() for run in row["runs"]]
    return TEMPLATE.read_text().format(
        name=link.rpartition("/")[2],
        link=link,
        device=document["device"],
        torch=document["torch"],
        date=document["date"][:10],
        commits=", ".join(sorted({run["commit"] for run in runs})),
        rule=rule(),
        digits=digits_table(places["digits"]),
        picture=f"{link.removesuffix('.json')}.png",
    )


def rule() -> str:
    """The part of the study's docstring that says when a saving holds, pays and wins."""
    return (
        study.__doc__.partition("The rule, ")[2]
        .partition("An interval")[0]
        .strip()
        .join(("The rule, ", ""))
    )


def digits_table(rows: dict[str, Any]) -> str:
    """Quality, differences and evaluations of the digits."""
    preset = rows["preset"]
    lines = [
        "| setting | evaluations a cycle | share | FD | minus the preset's (95 %) | recall | "
        "minus the preset's (95 %) | verdict | until, thousand | seconds |",
        "|---|---:|---:|---:|---|---:|---|---|---:|---:|",
    ]
    for name, row in rows.items():
        until = study.reached(row, "FD", preset["quality"]["FD"])
        seconds = study.mean_and_spread([run["curve"][-1]["seconds"] for run in row["runs"]])[0]
        cells = [name, f"{row['evaluations']:.1f}", f"{row['share']:.0%}"]
        for metric, places in (("FD", 2), ("recall", 3)):
            cells += [f"{row['quality'][metric]:.{places}f}", between(row, metric, places)]
        word = "" if name == "preset" else verdict("digits", row)
        cells += [word, "not" if until is None else f"{until / 1000:.1f}", f"{seconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(place: str, row: dict[str, Any]) -> str:
    """What the interval says of what is measured at the place."""
    if not study.decides(place, row):
        return "worse"
    return "pays" if row["share"] < 1 else "holds"


def between(row: dict[str, Any], metric: str, places: int, factor: float = 1) -> str:
    """A paired difference with its interval; nothing where all are zero."""
    mean, low, high = (factor * value for value in row["difference"][metric])
    if mean == low == high == 0:
        return "-"
    return f"{mean:+.{places}f} ({low:+.{places}f} to {high:+.{places}f})"
