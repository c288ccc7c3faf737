"""A run's student as a folder that can be pushed to a model hub as it is."""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from mfd_fast.files.whole import write_text
from mfd_fast.run.config import leaves, read_settings
from mfd_fast.run.folder import CONFIG, RESULTS, STUDENT, RunFolder
from mfd_fast.run.task import CURVES, Task

CARD, IMAGES = "README.md", "images"
FRONT = """---
{model}tags: [mean-flow-distillation]
license:  # yours to say; the base model's may bind it
---

A student of {steps} step{s} of `{base}`, distilled with mfd-fast.

```python
{usage}
```
"""
# Settings that the card names; all of them are in config.yaml.
SHOWN = (
    *("distill.objective", "distill.guidance", "distill.step_size", "distill.solver"),
    *("distill.student_steps", "distill.aux_updates", "distill.student_optim.lr"),
    *("distill.aux_optim.lr", "distill.ema_decay", "train.updates", "train.batch_size"),
)


def write_hub_folder(run: RunFolder, task: Task, out: Path) -> None:
    """Student, card, settings without places of this machine, and the pictures the run has drawn.

    ``OSError`` if the run has no student yet.
    """
    out.mkdir(parents=True)
    settings = _placeless(read_settings(run / CONFIG))
    shutil.copy2(run / STUDENT, out)  # or the error says that it is missing
    for path in run.path.iterdir():
        is_part = path.suffix in (".safetensors", ".json") and path.name != RESULTS
        if path.is_file() and is_part and path.name != STUDENT:
            shutil.copy2(path, out)
        if path.is_dir() and path.name.startswith(Path(STUDENT).stem):  # merged weights
            shutil.copytree(path, out / path.name)
    pictures = [p for p in sorted(run.path.iterdir()) if p.suffix in (".png", ".gif")]
    for path in (p for p in pictures if p.name != CURVES):
        (out / IMAGES).mkdir(exist_ok=True)
        shutil.copy2(path, out / IMAGES)
    write_text(out / CONFIG, yaml.safe_dump(settings, sort_keys=False))
    write_text(out / CARD, _card(run, task, settings, out))


def _card(run: RunFolder, task: Task, settings: dict[str, Any], out: Path) -> str:
    """The card of the run, or a general one, with settings, results and pictures behind it."""
    own = run / CARD
    text = own.read_text() if own.is_file() else _front(task, settings)
    known = dict(leaves(settings))
    parts = [text.rstrip(), "## Settings", f"`{CONFIG}` has all of them."]
    parts.append("\n".join(f"- `{key}`: {known[key]}" for key in SHOWN if key in known))
    results = json.loads((run / RESULTS).read_text()) if (run / RESULTS).is_file() else {}
    if results.get("table_text"):
        parts += ["## Result", results["table_text"]]
    if shown := sorted((out / IMAGES).glob("*")):
        parts += ["## Samples", "\n\n".join(f"![{p.stem}]({IMAGES}/{p.name})" for p in shown)]
    return "\n\n".join(parts) + "\n"


def _front(task: Task, settings: dict[str, Any]) -> str:
    steps = task.config.distill.student_steps
    base = settings.get("teacher") or settings["preset"]
    model = f"base_model: {base}\n" if "/" in base else ""
    return FRONT.format(
        model=model, base=base, steps=steps, s="s" * (steps != 1), usage=task.usage(base)
    )


def _placeless(tree: Any) -> Any:
    """Settings with the names of files and folders in place of absolute paths."""
    if isinstance(tree, dict):
        return {name: _placeless(value) for name, value in tree.items()}
    return Path(tree).name if isinstance(tree, str) and tree.startswith("/") else tree
