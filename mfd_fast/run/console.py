"""What a run is about to do and what it did, as tables on the terminal."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mfd_fast.baselines.objectives import needs_of
from mfd_fast.ops.extension import running
from mfd_fast.run.config import RunConfig
from mfd_fast.run.maker import capture_summary

BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def progress(items: Iterable[Any] | None, what: str, total: int | None = None) -> Any:
    """A bar over ``items`` that goes away at its end; none where nobody looks (no terminal)."""
    from tqdm import tqdm

    options = {"leave": False, "disable": None, "dynamic_ncols": True, "bar_format": BAR}
    return tqdm(items, f"{what} ", total, **options)


def show(rows: Mapping[str, Any], title: str) -> None:
    """Print name and value, a line each."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, str(value))
    Console(highlight=False).print(table)


def plan_of(config: RunConfig, out: Path, device: Any) -> dict[str, str]:
    """What runs, with which settings, on which kind of device, into which folder."""
    distill, train = config.distill, config.train
    steps = f"{distill.student_steps} step{'s' * (distill.student_steps != 1)}"
    has_aux = "aux" in needs_of(distill).roles
    aux = f"{distill.aux_updates} auxiliary : " if has_aux else ""
    every = f"every {train.checkpoint_every} student updates" if train.checkpoint_every else "end"
    return {
        "method": f"{distill.objective}, guidance {distill.guidance:g}, {distill.solver} steps of "
        f"at most {distill.step_size:g}, {distill.time_distribution} times",
        "student": f"{steps} of {distill.student_solver}",
        "cycle": f"{aux}{distill.student_updates} student updates",
        "run": f"{train.updates} student updates of {train.batch_size} samples",
        "operators": running(device.type),
        "step": f"{capture_summary(config, device.type)}, activations {train.activation}",
        "checkpoints": f"{every}, the last {train.keep_last} kept",
        "folder": str(out),
    }


def device_of(device: Any, num_ranks: int = 1) -> str:
    """Name of a device and how many ranks use one each."""
    import torch

    from mfd_fast.run.environment import cpu_name

    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{cpu_name()}, {torch.get_num_threads()} threads"
    return name if num_ranks == 1 else f"{num_ranks} x {name}"


def trained_of(backbone: Any) -> str:
    """Parameters that each role trains."""
    counts = {
        role: sum(p.numel() for p in backbone.parameters_of(role)) for role in ("aux", "student")
    }
    return f"{counts['student']:,} parameters of the student, {counts['aux']:,} of the auxiliary"
