"""``mfd-fast distill | pretrain | sample | evaluate``: the life of a run."""

from dataclasses import replace
from pathlib import Path

from mfd_fast.cli.options import no_more, options, parse_config, positional, with_objective
from mfd_fast.config import RunConfig
from mfd_fast.presets import preset


def distill(argv: list[str]) -> None:
    """Distil a preset's teacher; leaves a run folder."""
    name, rest = positional(argv, "distill", "PRESET")
    own, rest = options(rest, out="", objective="")
    base = preset(name)
    if own.objective:
        base = replace(base, distill=with_objective(base.distill, own.objective))
    config = parse_config(base, rest, f"mfd-fast distill {name}")
    if config.preset != name:
        raise ValueError(f"the preset is named once: {name!r}; drop --preset {config.preset}")
    from mfd_fast.runner import run_distillation

    run_distillation(config, Path(own.out) if own.out else free_folder(config))


def pretrain(argv: list[str]) -> None:
    """Train a preset's teacher from scratch."""
    name, rest = positional(argv, "pretrain", "PRESET")
    if name != "digits":
        raise ValueError(
            f"only the digits teacher is trained here, got {name!r}; there is ['digits']"
        )
    own, rest = options(rest, out="runs/digits-teacher")
    from mfd_fast.tasks.digits_eval import format_table
    from mfd_fast.tasks.digits_teacher import PretrainConfig
    from mfd_fast.tasks.digits_teacher import pretrain as pretrain_digits

    config = parse_config(PretrainConfig(), rest, "mfd-fast pretrain digits")
    metrics = pretrain_digits(config, Path(own.out))
    print(format_table(metrics["evaluation"]))


def sample(argv: list[str]) -> None:
    """Pictures of a run's student."""
    folder, rest = positional(argv, "sample", "RUN")
    own, rest = options(rest, out="", num=0, seed=0, prompt=())
    no_more(rest, ("--out", "--num", "--seed", "--prompt"))
    if own.num < 0:
        raise ValueError(f"--num must be >= 1, got {own.num}")
    from mfd_fast.runner import open_run

    run, task = open_run(folder)
    path = Path(own.out or run / "samples.png")
    if path.exists():
        raise ValueError(f"{path} exists; choose another file with --out")
    task.sample(run, path, num=own.num, seed=own.seed, prompts=own.prompt)
    print(path)


def evaluate(argv: list[str]) -> None:
    """Repeat a run's result table."""
    folder, rest = positional(argv, "evaluate", "RUN")
    own, rest = options(rest, num_samples=0)
    no_more(rest, ("--num-samples",))
    from mfd_fast.runner import open_run

    run, task = open_run(folder)
    num_samples = own.num_samples or run.config.num_eval_samples
    print(task.format_table(task.evaluate(run, num_samples)))


def free_folder(config: RunConfig) -> Path:
    """``runs/PRESET-OBJECTIVE-1``, or the first number that is free."""
    number = 1
    while (path := Path(f"runs/{config.preset}-{config.distill.objective}-{number}")).exists():
        number += 1
    return path
