"""``mfd-fast distill PRESET --dry-run``: everything a run needs is checked, nothing is written."""

import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mfd_fast.run.config import RunConfig
from mfd_fast.run.console import device_of, plan_of, show, trained_of

PACKAGES = ("torch", "triton", "numpy", "safetensors", "diffusers", "transformers", "peft")
SCRATCH = (64, 64)  # of a parameter large enough that its moments are kept in 8 bits


def dry_run(config: RunConfig, out: Path) -> None:
    """Check files and folder, build the networks on the meta device, print plan and estimate.

    ``ValueError`` or ``OSError`` as the run itself would raise it.
    """
    import torch

    from mfd_fast.baselines.objectives import needs_of
    from mfd_fast.cost import devices
    from mfd_fast.cost.estimate import estimate
    from mfd_fast.cost.measured import efficiency_here
    from mfd_fast.cost.shapes import shapes_of
    from mfd_fast.cost.table import text
    from mfd_fast.run.maker import run_is_captured
    from mfd_fast.run.resume import check_optimizers
    from mfd_fast.run.trackers import check_tracker

    check_out(out)
    check_tracker(config.train.report_to)
    task = config.task()
    found = task.check()
    for remark in task.remarks(config.num_eval_samples):
        found["note"] = remark
    scratch = torch.zeros(SCRATCH, device=task.device)
    check_optimizers(config.distill, dict.fromkeys(needs_of(config.distill).roles, scratch))
    model = shapes_of(config)
    rows = {"device": device_of(task.device), **plan_of(config, out, task.device), **found}
    rows |= {"trained": trained_of(model.backbone), "versions": versions()}
    show(rows, f"{config.preset}, dry run")
    is_captured = run_is_captured(config, task.device.type)
    device, efficiency = efficiency_here(
        devices.this_machine(), config.preset, is_captured=is_captured
    )
    print(text(estimate(config, device, efficiency)))
    print("\nNothing was written. The same command without --dry-run starts the run.")


def check_out(out: Path) -> None:
    """``ValueError`` if a new run cannot be written there."""
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} already holds files; choose another folder with --out")
    parent = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{parent} is no folder that can be written; choose another with --out")


def versions(packages: tuple[str, ...] = PACKAGES) -> str:
    """Installed versions; what is missing is not named."""
    found: Mapping[str, str] = {name: _version(name) for name in packages}
    return ", ".join(f"{name} {number}" for name, number in found.items() if number)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
