"""``mfd-fast distill | sample | evaluate``: the life of a run."""

import sys
from pathlib import Path

from mfd_fast.cli.numbers import count
from mfd_fast.cli.options import check_places, moved_files, options, positional, preset_config
from mfd_fast.models import load_config, preset
from mfd_fast.models.sana.presets import SanaRun
from mfd_fast.run.config import RunConfig


def distill(argv: list[str]) -> None:
    """Distil a preset's teacher; leaves a run folder, or continues the run in one."""
    name, rest = positional(argv, "distill", "PRESET")
    own, rest = options(rest, out="", resume=None, dry_run=False)
    out = Path(own.out) if own.out else None
    if own.resume is not None:
        out, own.resume = resumed_run(out, own.resume)
        rest = saved_settings(out, name) + rest
    config = preset_config(name, rest, "distill")
    if own.dry_run:
        from mfd_fast.cli.dry_run import dry_run

        dry_run(config, out or free_folder(config))
        return
    from mfd_fast.run.session import run_distillation

    run_distillation(config, out or free_folder(config), resume=own.resume)


def sample(argv: list[str]) -> None:
    """Pictures of a run's student."""
    folder, rest = positional(argv, "sample", "RUN")
    own, rest = options(rest, out="", num=None, seed=0, prompt=())
    check_places(rest, "sample", ("--out", "--num", "--seed", "--prompt"))
    num = count("--num", own.num, "the number of samples", 8)
    from mfd_fast.models import open_run

    run, task = open_run(folder, lambda config: moved_files(config, rest, "sample"))
    path = Path(own.out or run / "samples.png")
    if path.exists():
        raise ValueError(f"{path} exists; choose another file with --out")
    task.sample(run, path, num=num, seed=own.seed, prompts=own.prompt)
    print(path)


def evaluate(argv: list[str]) -> None:
    """Repeat a run's result table, with scores of its images if their models are named."""
    folder, rest = positional(argv, "evaluate", "RUN")
    own, rest = options(rest, num_samples=None, scores="", prompts="")
    check_places(rest, "evaluate", ("--num-samples", "--scores", "--prompts"))
    num_samples = count("--num-samples", own.num_samples, "the samples of a row", 2000)
    if own.prompts and not own.scores:
        raise ValueError("--prompts names the file that --scores reads; type both, or neither")
    from mfd_fast.models import open_run

    run, task = open_run(folder, lambda config: moved_files(config, rest, "evaluate"))
    num_samples = num_samples or task.config.num_eval_samples
    for remark in task.remarks(num_samples):
        print(f"mfd-fast evaluate: {remark}", file=sys.stderr)
    if own.scores:
        rows = task.evaluate(run, num_samples, score_sources(task.config, own.scores), own.prompts)
    else:
        rows = task.evaluate(run, num_samples)
    print(task.format_table(rows))


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


def saved_settings(out: Path, name: str) -> list[str]:
    """The options that start from the settings of the run in ``out``, if there is one."""
    path = out / "config.yaml"
    if not path.is_file():
        return []
    saved = load_config(path).preset
    if saved != preset(name).preset:
        raise ValueError(f"{out} is a run of {saved}; type mfd-fast distill {saved} --out {out}")
    return ["--config", str(path)]


def free_folder(config: RunConfig) -> Path:
    """``runs/PRESET-OBJECTIVE-1``, or the first number that is free."""
    number, name = 1, config.preset.rpartition(":")[2]
    while (path := Path(f"runs/{name}-{config.distill.objective}-{number}")).exists():
        number += 1
    return path
