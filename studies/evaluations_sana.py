"""Savings of evaluations on a small SANA with a trained teacher: prompts in, digits out.

SANA's network (linear attention, convolutions in its feed-forward part, attention to text) of 4
blocks and width 128 learns the 8 x 8 digits from prompts, a row of tokens for each class, by flow
matching with the prompt dropped one time in ten.  Then the settings of ``sana-1.6b``: adapters on
q, k and v, a student of four steps of DPM-Solver++ on the shifted schedule, Euler with h = .03 and
ten auxiliary updates a cycle, beside the savings of the evaluations study.  Other than there:
guidance 2, learning rates for a network this small and a batch of four, not one.
The interval is that of the evaluations study; five seeds.
"""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mfd_fast.distill.distiller import Distiller
from mfd_fast.flow.integrate import generate, guided
from mfd_fast.flow.times import dpm_flow_schedule, sample_times
from mfd_fast.models import preset
from mfd_fast.models.digits.data import load_digits
from mfd_fast.models.digits.evaluate import Yardstick
from mfd_fast.models.digits.teacher import load_classifier
from mfd_fast.models.fit import FitConfig, fit, seeded
from mfd_fast.models.images import Sampler
from mfd_fast.models.sana.backbone import sana_backbone
from mfd_fast.models.sana.config import SanaConfig
from mfd_fast.models.sana.network import SanaNetwork
from mfd_fast.models.sana.presets import SanaRun
from mfd_fast.ops import interpolate_with_target
from studies.evaluation_runs import Quality, followed
from studies.evaluations import DECIDES, compared, curves, judged, saved
from studies.plots import GREY, Figure, titled
from studies.verdict import Verdict

CLAIM = "None in the paper: Euler steps and new samples for each auxiliary update are given"
RULE = (
    "AB2 alone and with a cycle's samples: the paired 95 % intervals of FD and recall reach zero "
    "or the better side"
)
METRICS = DECIDES["digits"]
NUM_SAMPLES = 1000
NUM_CLASSES, TOKENS, CHANNELS = 10, 8, 32
NULL = NUM_CLASSES  # the row of the empty prompt
SIZES = SanaConfig(
    in_channels=1, num_layers=4, num_attention_heads=4, num_cross_attention_heads=4,
    cross_attention_head_dim=32, caption_channels=CHANNELS, sample_size=8, patch_size=2,
)  # fmt: skip
TEACHER = FitConfig(updates=2500, batch_size=64, lr=2e-3, warmup_updates=100, ema_decay=0.999)
TEACHER_STEPS, GUIDANCE, SHIFT = 25, 2.0, 3.0
BATCH, UPDATES = 4, 80
LR = {"student": 1e-3, "aux": 1e-3}


def prompts(labels: Tensor) -> dict[str, Tensor]:
    """Tokens ``[B, TOKENS, CHANNELS]`` of the prompts of labels ``[B]``, and their mask."""
    words = torch.randn(NUM_CLASSES + 1, TOKENS, CHANNELS, generator=Generator().manual_seed(0))
    return {"text": words[labels], "mask": torch.ones(len(labels), TOKENS, dtype=torch.bool)}


def no_prompts(cond: dict[str, Tensor]) -> dict[str, Tensor]:
    """The null condition."""
    return prompts(torch.full((len(cond["text"]),), NULL))


@cache
def teacher(folder: Path) -> SanaNetwork:
    """Trained once; kept in ``folder``."""
    path = folder / "teacher.pt"
    network = seeded(0, lambda: SanaNetwork(SIZES))
    if not path.is_file():
        (images, labels), generator = load_digits(), Generator().manual_seed(0)
        loss = partial(flow_matching_loss, network, images, labels, generator)
        network, _ = fit(network, lambda n: loss(), TEACHER)
        torch.save(network.state_dict(), path)
    network.load_state_dict(torch.load(path))
    return network.eval().requires_grad_(False)


def flow_matching_loss(
    network: SanaNetwork, images: Tensor, labels: Tensor, generator: Generator
) -> Tensor:
    """Mean squared error of the velocity; a tenth of the prompts is empty."""
    rows = torch.randint(len(images), (TEACHER.batch_size,), generator=generator)
    is_dropped = torch.rand(len(rows), generator=generator) < 0.1
    t = sample_times(len(rows), "logit_normal", generator=generator)
    noise = torch.randn(len(rows), 1, 8, 8, generator=generator)
    x_t, target = interpolate_with_target(images[rows], noise, t)
    return F.mse_loss(network(x_t, t, prompts(labels[rows].masked_fill(is_dropped, NULL))), target)


def teacher_sampler(folder: Path) -> Sampler:
    """The guided teacher at 25 steps."""

    def sampler(noise: Tensor, labels: Tensor) -> Tensor:
        network, cond = teacher(folder), prompts(labels)
        with_prompt, without = (
            partial(velocity_of, network, of) for of in (cond, no_prompts(cond))
        )
        return generate(guided(with_prompt, without, GUIDANCE), noise, steps=TEACHER_STEPS)

    return sampler


@cache
def yardstick(folder: Path) -> Yardstick:
    """The teacher's samples, drawn once."""
    reference = teacher_sampler(folder)
    return Yardstick(load_classifier(), reference, num_samples=NUM_SAMPLES, seed=1)


def velocity_of(network: SanaNetwork, cond: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
    return network(x, t, cond)


def config_of(seed: int, **distill: Any) -> SanaRun:
    """``sana-1.6b`` with this study's guidance and learning rates."""
    base = preset("sana-1.6b")
    optims = {
        f"{role}_optim": replace(getattr(base.distill, f"{role}_optim"), lr=lr)
        for role, lr in LR.items()
    }
    ours = optims | {"guidance": GUIDANCE, "seed": seed, "ema_decay": 0.95}
    train = replace(base.train, updates=UPDATES, batch_size=BATCH, device="cpu")
    return replace(base, distill=replace(base.distill, **ours | distill), train=train)


def started(config: SanaRun, folder: Path) -> Distiller:
    """Before its first update."""
    backbone = sana_backbone(teacher(folder), config, sample_shape=(1, 8, 8), null_cond=no_prompts)
    schedule = dpm_flow_schedule(config.distill.student_steps, shift=SHIFT)
    return Distiller(backbone, config.distill, schedule=schedule)


def distilled(config: SanaRun, folder: Path) -> dict[str, Any]:
    """One run, measured halfway and at its end."""
    distiller = started(config, folder)
    batch, seed = config.train.batch_size, config.distill.seed

    def next_cond(n: int) -> dict[str, Tensor]:
        generator = Generator().manual_seed(1_000_003 * seed + n)
        return prompts(torch.randint(NUM_CLASSES, (batch,), generator=generator))

    points = (config.train.updates // 2, config.train.updates)
    return followed(distiller, next_cond, config.train, points, partial(quality_of, folder))


def quality_of(folder: Path, distiller: Distiller) -> Quality:
    """Frechet distance to the 25-step teacher, and recall, of the averaged student."""

    def sampler(noise: Tensor, labels: Tensor) -> Tensor:
        return distiller.generate(noise, prompts(labels))

    found = yardstick(folder).row("student", sampler)
    return {"FD": found["frechet_to_teacher50"], "recall": found["recall"]}


def run(seed: int, folder: Path) -> dict[str, Any]:
    runs = folder / "evaluations-sana"
    runs.mkdir(parents=True, exist_ok=True)
    found = saved(lambda seed, of: distilled(config_of(seed, **of), runs), 0.03, seed, runs)
    start = quality_of(runs, started(config_of(seed), runs))
    return {"rows": compared(found), "start": start}


def draw(figures: dict[str, Any], path: Path) -> None:
    figure = Figure(columns=2, title="A small SANA: quality against forward evaluations a sample")
    for axis, metric in zip(figure.axes, METRICS, strict=True):
        curves(axis, figures["rows"], metric)
        axis.axhline(figures["start"][metric], color=GREY, linestyle=":", label="before training")
        titled(axis, f"{metric}, one sd of seeds", "thousand evaluations a sample", metric)
    figure.axes[0].legend(fontsize=7, frameon=False)
    figure.save(path)


def judge(figures: dict[str, Any]) -> Verdict:
    return judged(figures["rows"], METRICS)
