"""The commands of a run's life: distill, config, sample, evaluate, export, report."""

import contextlib
import os
import re
import sys
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from mfd_fast.cli.parse import Config, Optional, Places, Switch, command, words
from mfd_fast.models import PRESETS, load_config, preset
from mfd_fast.models.sana.presets import SanaRun
from mfd_fast.run.config import (
    RunConfig,
    from_dict,
    to_dict,
    with_absolute_paths,
    with_fast,
    with_file,
    with_memory,
)
from mfd_fast.settings import Count

PACKAGES = ("torch", "triton", "numpy", "safetensors", "diffusers", "transformers", "peft")
SCRATCH = (64, 64)  # of a parameter large enough that its moments are kept in 8 bits
SENTENCES = {name: type(config).__doc__.partition("\n")[0] for name, config in PRESETS.items()}
File = Optional[Path | None]
Run = Annotated[Path, Positional, arg(metavar="RUN")]


@dataclass(frozen=True)
class Start:
    """What the settings start from."""

    config: File = None
    """YAML file whose settings go over the preset's; mfd-fast config prints one."""
    memory_profile: Optional[int | None] = None
    """Activation and batch size for a card of 16, 24, 40 or 80 GB."""
    fast: Switch = False
    """Fewer evaluations a cycle than the paper's settings: docs/evaluations.md says what for."""


def settings_of(
    name: str, config: RunConfig | None = None, start: Start = Start(),
    out: Path | None = None, resume: str | None = None, **_: Any,
) -> RunConfig:  # fmt: skip
    """The preset, then the card's profile, fewer evaluations, the file or the run that goes on,
    and the method.
    """
    base = preset(name)
    if start.memory_profile is not None:
        base = with_memory(base, start.memory_profile)
    base = with_fast(base) if start.fast else base
    saved = None if resume is None else saved_settings(resumed_run(out, resume)[0], name)
    if path := start.config or saved:
        base = with_file(base, path)
    if config is not None and config.distill.objective != preset(name).distill.objective:
        distill = to_dict(base.distill) | {"objective": config.distill.objective}
        base = replace(base, distill=from_dict(type(base.distill), distill, "distill."))
    return base


of_preset = command(noun="PRESET", names=SENTENCES, base=settings_of)


@of_preset
def distill(
    config: Annotated[RunConfig, Config],
    *,
    start: Annotated[Start, Config] = Start(),
    out: File = None,
    resume: Annotated[str | None, words("CHECKPOINT")] = None,
    dry_run: Switch = False,
) -> None:
    """Distil a preset's teacher; leaves a run folder, or continues the run in one.

    Example: mfd-fast distill digits --out runs/first --distill.student-optim.lr 1e-4

    Args:
        out: Folder to make; runs/PRESET-OBJECTIVE-1 or the next number if left out.
        resume: Continue the run in --out, or in the run or from the checkpoint named here.
        dry_run: Check everything a run needs, print plan and estimate, write nothing.
    """
    if resume is not None:
        out, resume = resumed_run(out, resume)
    if dry_run:
        return check(config, out or free_folder(config))
    from mfd_fast.run.session import run_distillation

    run_distillation(config, out or free_folder(config), resume=resume)


@of_preset
def config(
    config: Annotated[RunConfig, Config],
    *,
    start: Annotated[Start, Config] = Start(),
) -> None:
    """Print a preset with the given settings applied, as YAML that --config reads.

    Example: mfd-fast config digits --distill.guidance 3 > mine.yaml
    """
    import yaml

    print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")


def places(name: str, run: Path | None = None, **_: Any) -> Places:
    """Where the files of a run lie, by its own config."""
    from mfd_fast.run.folder import CONFIG, RunFolder

    return Places(load_config(RunFolder.open(run) / CONFIG) if run else RunConfig(preset=name))


def opened(run: Path, config: Places) -> tuple[Any, Any]:
    """The run and its task, with files where they lie now."""
    from mfd_fast.models import open_run

    return open_run(run, lambda _: with_absolute_paths(config.located))


@command(base=places)
def sample(
    run: Run,
    config: Annotated[Places, Config],
    *,
    out: File = None,
    num: Optional[Count | None] = None,
    seed: int = 0,
    prompt: UseAppendAction[tuple[str, ...]] = (),
) -> None:
    """Pictures of a run's student.

    Example: mfd-fast sample runs/sana --prompt "a fox in the snow" --out fox.png

    Args:
        run: Folder of a finished run.
        out: The PNG, RUN/samples.png if left out; of several samples a sheet, and the plain images
            in a folder of its name.
        num: Samples; as many as suit the task if left out.
        seed: Of the noise they start from.
        prompt: Text of an image; may be given several times.
    """
    folder, task = opened(run, config)
    path = out or folder / "samples.png"
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out must name a .png file, got {path}")
    for made in (path, path.with_suffix("")):
        if made.exists():
            raise ValueError(f"{made} exists; choose another file with --out")
    task.sample(folder, path, num=num or 0, seed=seed, prompts=prompt)
    print(path)


@command(base=places)
def evaluate(
    run: Run,
    config: Annotated[Places, Config],
    *,
    num_samples: Optional[Count | None] = None,
    scores: str = "",
    prompts: str = "",
) -> None:
    """Repeat a run's result table, with scores of its images if their models are named.

    Example: mfd-fast evaluate runs/first --num-samples 1000

    Args:
        run: Folder of a finished run.
        num_samples: Samples behind every row; the run's own number if left out.
        scores: NAME=MODEL[:FILE],... of models that judge images of prompts.
        prompts: File of the prompts for --scores.
    """
    if prompts and not scores:
        raise ValueError("--prompts names the file that --scores reads; type both, or neither")
    folder, task = opened(run, config)
    num_samples = num_samples or task.config.num_eval_samples
    for remark in task.remarks(num_samples):
        print(f"mfd-fast evaluate: {remark}", file=sys.stderr)
    if scores:
        rows = task.evaluate(folder, num_samples, score_sources(task.config, scores), prompts)
    else:
        rows = task.evaluate(folder, num_samples)
    print(task.format_table(rows))


@command(base=places)
def export(
    run: Run,
    config: Annotated[Places, Config],
    *,
    out: Path,
    to: Literal["checkpoint", "hub-folder"] = "checkpoint",
    push: Annotated[str, words("OWNER/NAME")] = "",
) -> None:
    """Write a run's student for others: all of it, or nothing.

    Example: mfd-fast export runs/sana --to hub-folder --out shared --push me/sana-4-steps

    Args:
        run: Folder of a finished run.
        out: Folder to make.
        to: A full checkpoint in its teacher's layout; or a folder for a model hub: the student, a
            model card, settings and pictures.
        push: Upload the hub folder there.
    """
    from mfd_fast.files.whole import written

    if out.exists():
        raise ValueError(f"{out} exists; choose another folder with --out")
    if push:
        if to != "hub-folder":
            raise ValueError("--push uploads a hub folder; type --to hub-folder as well")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", push):
            raise ValueError(f"--push takes OWNER/NAME, got {push!r}")
    folder, task = opened(run, config)
    with written(out) as partial:
        if to == "checkpoint":
            made = task.export(folder, partial).relative_to(partial)
        else:
            from mfd_fast.run.sharing import write_hub_folder

            made = Path()
            write_hub_folder(folder, task, partial)
    print(out / made)
    if push:
        from mfd_fast import hub

        print(hub.push(out, push))


def report(
    runs: Annotated[tuple[Path, ...], Positional, arg(metavar="RUN [RUN ...]")],
    *,
    out: File = None,
) -> None:
    """One or several runs, finished or going on, as one HTML file.

    Example: mfd-fast report runs/first runs/second --out compare.html

    Args:
        runs: Run folders.
        out: The file; report.html in the first run if left out.
    """
    from mfd_fast.run.folder import RunFolder
    from mfd_fast.run.page import write_report

    if not runs:
        raise ValueError("expected mfd-fast report RUN [RUN ...] [--out FILE.html]")
    opened = [RunFolder.open(run) for run in runs]
    print(write_report(opened, out or opened[0] / "report.html"))


def score_sources(config: RunConfig, scores: str) -> dict[str, str]:
    """``--scores`` read; ``ValueError`` for a run that makes no images of prompts."""
    from mfd_fast.models.sana.scores import parse_sources

    if not isinstance(config, SanaRun):
        raise ValueError(
            f"--scores judges images made of prompts; {config.preset} makes none, leave it out"
        )
    return parse_sources(scores)


def resumed_run(out: Path | None, wanted: str) -> tuple[Path, str]:
    """The run folder that ``--resume`` means, and the checkpoint in it, ``""`` for the newest."""
    if not wanted and out is None:
        raise ValueError(
            "--resume continues the run in a folder; name it: --out FOLDER, or --resume FOLDER"
        )
    if not wanted:
        return out, ""
    path = Path(wanted)
    is_run = (path / "config.yaml").is_file()
    folder = path if is_run else path.parent.parent
    if not path.is_dir():
        raise ValueError(f"--resume takes a run folder or one of its checkpoints; {path} is none")
    if out is not None and not (out.exists() and out.samefile(folder)):
        raise ValueError(f"a run continues in its own folder, {folder}; drop --out {out}")
    return folder, "" if is_run else wanted


def saved_settings(out: Path, name: str) -> Path | None:
    """The file of the settings of the run in ``out``, if there is one."""
    path = out / "config.yaml"
    if not path.is_file():
        return None
    saved = load_config(path).preset
    if saved != preset(name).preset:
        raise ValueError(f"{out} is a run of {saved}; type mfd-fast distill {saved} --out {out}")
    return path


def free_folder(config: RunConfig) -> Path:
    """``runs/PRESET-OBJECTIVE-1``, or the first number that is free."""
    number, name = 1, config.preset.rpartition(":")[2]
    while (path := Path(f"runs/{name}-{config.distill.objective}-{number}")).exists():
        number += 1
    return path


def check(config: RunConfig, out: Path) -> None:
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
    from mfd_fast.run.console import device_of, plan_of, show, trained_of
    from mfd_fast.run.maker import run_is_captured
    from mfd_fast.run.resume import check_optimizers
    from mfd_fast.run.trackers import check_tracker

    check_out(out)
    check_tracker(config.train.report_to)
    task = config.task()
    config = task.config
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
    check_writable(out)


def check_writable(out: Path) -> None:
    """``ValueError`` if no such folder can be made."""
    parent = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{parent} is no folder that can be written; choose another with --out")


def versions(packages: tuple[str, ...] = PACKAGES) -> str:
    """Installed versions; what is missing is not named."""
    found = []
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)
