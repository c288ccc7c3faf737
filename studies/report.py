"""Run studies into a folder and write docs/studies.md from what lies there."""

import json
import os
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from mfd_fast.files.whole import write_text
from mfd_fast.run.config import nearest
from mfd_fast.run.environment import environment
from studies import STUDIES
from studies.verdict import Verdict

HEADER = """# Studies: the paper's analyses at small size

Made by `python -m studies all`; every number below comes from the JSON file named beside it, every
picture from the same file.  Confirmed means that the claim holds here, at this size, with these
seeds; not confirmed that it does not.  What needs SANA, nuScenes or CIFAR-10 at full size is not
testable here.  Nothing here was measured on a GPU.
"""
NOT_TESTABLE = (
    ("IoU and mIoU of one-step OccFM students (Table 1)", "needs nuScenes and the OccFM weights"),
    (
        "Aesthetic score, PickScore, HPSv2, ImageReward, CLIP score and FID of four-step SANA "
        "students (Tables 3 and 7)",
        "needs the SANA weights, the scorers' weights and a GPU",
    ),
    ("FID, precision and recall on CIFAR-10 (Table 6)", "needs a teacher trained on a GPU"),
    ("GPU hours and peak GB on SANA (Table 4)", "needs a GPU; see the cost study for the order"),
)


def module_of(name: str) -> ModuleType:
    """The module of a study; ``ValueError`` lists the studies and the nearest one."""
    if name not in STUDIES:
        raise ValueError(
            f"unknown study {name!r}; there is {[*STUDIES, 'all']}{nearest(name, STUDIES)}"
        )
    return import_module(f"studies.{STUDIES[name]}")


def run_study(name: str, folder: Path, *, seed: int = 0) -> Verdict:
    """Run one study; leaves ``NAME.json`` and ``NAME.png`` in ``folder`` and returns its verdict.

    ``ValueError`` if it was run into this folder before.
    """
    study, path = module_of(name), folder / f"{name}.json"
    if path.exists():
        raise ValueError(f"{path} exists; move it away, or choose another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    figures = study.run(seed, folder)
    study.draw(figures, path.with_suffix(".png"))
    document = {"study": name, **environment("cpu"), "seed": seed, "figures": figures}
    write_text(path, json.dumps(document, indent=1) + "\n")
    return study.judge(figures)


def run_all(folder: Path, *, seed: int = 0) -> None:
    """Every study that ``folder`` does not hold yet."""
    for name in STUDIES:
        if not (folder / f"{name}.json").exists():
            print(f"{name}: {run_study(name, folder, seed=seed).word}", flush=True)


def write_report(folder: Path, path: Path) -> None:
    """The Markdown page of all studies in ``folder``, with links relative to ``path``."""
    rows, sections, words = [], [], []
    for name in STUDIES:
        file = folder / f"{name}.json"
        if not file.exists():
            continue
        study, document = module_of(name), json.loads(file.read_text())
        verdict = study.judge(document["figures"])
        link = os.path.relpath(file, path.parent)
        if hasattr(study, "page"):
            write_page(name, folder, path.parent / f"{name}.md")
        if not study.CLAIM.startswith("None in the paper"):
            words.append(verdict.word)
        rows.append(f"| [{name}](#{name}) | {study.CLAIM} | {study.RULE} | **{verdict.word}** |")
        sections.append(_section(name, study, document, verdict, link))
    rows += [f"| - | {claim} | not testable here: {why} | |" for claim, why in NOT_TESTABLE]
    held = words.count("confirmed")
    table = [
        f"Of {len(words)} claims of the paper that are tested, {held} hold here.\n",
        "| study | the paper's claim, and where | it holds here if | here |",
        "|---|---|---|---|",
        *rows,
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join([HEADER, *table, "", *sections]))


def write_page(name: str, folder: Path, path: Path) -> None:
    """The Markdown page of a study that has one of its own, from what lies in ``folder``."""
    file = folder / f"{name}.json"
    link = os.path.relpath(file, path.parent)
    write_text(path, module_of(name).page(json.loads(file.read_text()), link, folder))


def _capitalised(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _section(
    name: str, study: ModuleType, document: dict[str, Any], verdict: Verdict, link: str
) -> str:
    picture = f"{link.removesuffix('.json')}.png"
    lines = [
        f"## {name}\n",
        f"{study.__doc__.strip()}\n",
        f"The paper: {study.CLAIM}.\n",
        f"Confirmed if {study.RULE}.\n",
        f"Here: **{verdict.word}**. {_capitalised(verdict.numbers)}.\n",
    ]
    if hasattr(study, "page"):
        lines.append(f"In full: [{name}]({name}.md).\n")
    if hasattr(study, "table"):
        lines.append(study.table(document["figures"]) + "\n")
    lines += [
        f"![{name}]({picture})\n",
        f"[{name}.json]({link}): `python -m studies {name} --seed {document['seed']}`, "
        f"{document['device']}, torch {document['torch']}, {document['date'][:10]}.\n",
    ]
    return "\n".join(lines)
