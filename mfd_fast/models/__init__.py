"""The families, a folder each: presets, network, task, data.

Adding one is a folder with ``presets.py`` (a ``RunConfig`` that knows its task, ``PRESETS``) and
its name below; one that lives in a package of its own needs neither (docs/your-model.md).
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from mfd_fast.models.diffusers.published import preset_of
from mfd_fast.run.config import RunConfig, from_dict, nearest, read_settings
from mfd_fast.run.folder import CHECKPOINTS, CONFIG, STUDENT, RunFolder
from mfd_fast.run.resume import check_teacher
from mfd_fast.run.task import Task

FAMILIES = ("digits", "cifar10", "sana", "occfm", "diffusers")

PRESETS: dict[str, RunConfig] = {
    config.preset: config
    for family in FAMILIES
    for config in import_module(f"{__name__}.{family}.presets").PRESETS
}


def preset(name: str) -> RunConfig:
    """The configuration that a preset starts from; that of a diffusers pipeline, named by its
    folder or hub id; or a ``RunConfig`` of another package, named ``module:Class`` as seen from the
    working directory.

    ``ValueError`` lists the presets and the nearest one, or says why the class cannot be had.
    """
    if (known := preset_of(name)) and not Path(name).is_dir():
        return PRESETS[known]
    if name not in PRESETS and (Path(name).is_dir() or ("/" in name and ":" not in name)):
        from mfd_fast.models.diffusers.checkpoint import read_index

        if read_index(name)[1]["_class_name"] == "SanaPipeline":  # its fused network is faster
            return replace(PRESETS["sana-1.6b"], teacher=name)
        return replace(PRESETS["pipeline"], teacher=name)
    if ":" in name and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return _known(name)


def load_config(path: Path) -> RunConfig:
    """Read a config written by ``save_config``; unknown keys and wrong types are ``ValueError``."""
    tree = read_settings(path)
    if not isinstance(tree.get("preset"), str):
        raise ValueError(f"{path} must name its preset; got {tree.get('preset')!r}")
    return from_dict(type(_known(tree["preset"])), tree)


def open_run(
    folder: str | Path, located: Callable[[RunConfig], RunConfig] = lambda config: config
) -> tuple[RunFolder, Task]:
    """A finished run and its task; ``ValueError`` says what is missing.

    located: gives the run's config the places where its files lie now.  A teacher that moved is
        compared with the one that the run's checkpoint knows.
    """
    run = RunFolder.open(folder)
    saved = load_config(run / CONFIG)
    if not (run / STUDENT).is_file():
        raise ValueError(
            f"{run.path} has no {STUDENT}: the run did not finish; continue it with mfd-fast "
            f"distill {saved.preset} --out {run.path} --resume"
        )
    config = located(saved)
    task = config.task()
    if config != saved:
        check_teacher(run / CHECKPOINTS, task.backbone())
    return run, task


def _known(name: str) -> RunConfig:
    """Imports only what is on ``sys.path``: a name in a file must not run code that lies around."""
    if name in PRESETS:
        return PRESETS[name]
    module, colon, cls = name.partition(":")
    if not colon:
        raise ValueError(
            f"unknown preset {name!r}; there is {', '.join(PRESETS)}{nearest(name, PRESETS)}, or "
            "give the folder or hub id of a diffusers pipeline"
        )
    try:
        config = getattr(import_module(module), cls)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"preset {name!r} must name a RunConfig as module:Class, and {error}; type it in the "
            "folder that holds the module, or give that folder as PYTHONPATH"
        ) from None
    if not (isinstance(config, type) and issubclass(config, RunConfig)):
        raise ValueError(f"preset {name!r} must name a subclass of mfd_fast.run.config.RunConfig")
    return config(preset=name)
