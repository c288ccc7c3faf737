"""Sending the metrics of a run to TensorBoard or Weights & Biases, beside metrics.jsonl."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

POSITION = "update"
Tracker = Callable[[dict[str, Any]], None]


def make_tracker(kind: str, folder: Path, config: dict[str, Any]) -> list[Tracker]:
    """Callbacks that take the rows of ``trainer.train``: one, or none for ``"none"``.

    Args:
        kind: ``train.report_to``.
        folder: the run folder; its name is that of the run, its files lie in it.
        config: the resolved config as plain containers.

    ``ImportError`` says what to install.
    """
    if kind == "none":
        return []
    maker, package = TRACKERS[kind]
    return [maker(_imported(kind, package), folder, config)]


def check_tracker(kind: str) -> None:
    """``ImportError`` says what to install for ``train.report_to``."""
    if kind != "none":
        _imported(kind, TRACKERS[kind][1])


def _imported(kind: str, package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(
            f"train.report_to={kind} needs a package ({error}): pip install {kind}"
        ) from None


def _tensorboard(tensorboard: Any, folder: Path, config: dict[str, Any]) -> Tracker:
    import yaml

    writer = tensorboard.SummaryWriter(folder / "tensorboard")
    writer.add_text("config", f"```\n{yaml.safe_dump(config, sort_keys=False)}```")

    def track(row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != POSITION:
                writer.add_scalar(name, value, row[POSITION])
        writer.flush()

    return track


def _wandb(wandb: Any, folder: Path, config: dict[str, Any]) -> Tracker:
    # The run's name is its identity: a resumed run goes on with its curves.
    run = wandb.init(
        project="mfd-fast",
        name=folder.name,
        id=folder.name,
        resume="allow",
        dir=str(folder),
        config=config,
    )
    return lambda row: run.log(row, step=row[POSITION])


TRACKERS = {"tensorboard": (_tensorboard, "torch.utils.tensorboard"), "wandb": (_wandb, "wandb")}
