"""The digits teacher: a small DiT trained by flow matching, and the classifier that measures it.

    mfd-fast pretrain digits --out runs/digits_teacher

writes what ships in ``mfd_fast/models/digits/weights``: two weights files and their metrics.
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mfd_fast.flow.times import sample_times
from mfd_fast.models.digits.classifier import (
    DigitsClassifier,
    read_classifier,
    save_classifier,
    train_classifier,
)
from mfd_fast.models.digits.data import load_digits
from mfd_fast.models.digits.dit import DiT, DiTConfig, load_dit, save_dit
from mfd_fast.models.digits.evaluate import evaluate_digits, teacher_samplers
from mfd_fast.models.fit import FitConfig, fit, make_folder, seeded, write_metrics
from mfd_fast.ops import interpolate_with_target
from mfd_fast.settings import (
    MAX_INT,
    Count,
    CountOrOff,
    Decay,
    NotNegative,
    Number,
    Positive,
    Range,
)

PACKAGED = Path(__file__).parent / "weights"
FILES = ("teacher.safetensors", "classifier.safetensors", "metrics.json")
SampleCount = Annotated[int, Range(">= 4 (nearest neighbours)", 4, MAX_INT)]


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(FitConfig):
    """Training of the digits teacher and of its classifier.  The defaults made what ships."""

    updates: Count = 6000
    """Updates of the teacher."""
    batch_size: Count = 128
    """Images in one update of the teacher or the classifier."""
    lr: Positive = 6e-3
    """Learning rate of the teacher after its warm-up; a cosine takes it to 0."""
    warmup_updates: CountOrOff = 200
    """Updates over which the teacher's learning rate rises linearly."""
    ema_decay: Decay = 0.999
    """Decay of the average of the teacher's weights; the average is what is kept."""
    label_dropout: Decay = 0.1
    """Share of labels replaced by the null class, which guidance needs."""
    time_distribution: Literal["logit_normal", "uniform"] = "logit_normal"
    """Distribution of the training times t."""
    time_mean: Number = 0.0
    """Mean of the normal variable inside the logit-normal."""
    time_std: NotNegative = 1.0
    """Its standard deviation."""
    width: Count = DiTConfig.width
    """Features of a token of the teacher."""
    depth: Count = DiTConfig.depth
    """Blocks of the teacher."""
    heads: Count = DiTConfig.heads
    """Attention heads of the teacher."""
    classifier_updates: Count = 1000
    """Updates of the classifier."""
    classifier_lr: Positive = 3e-3
    """Largest learning rate of the classifier's one-cycle schedule."""
    guidance: Number = 2.0
    """Guidance scale at which the teacher is measured."""
    num_samples: SampleCount = 2000
    """Samples in each row of the measurement."""


def pretrain(config: PretrainConfig, out_dir: str | Path) -> dict[str, Any]:
    """Train teacher and classifier and measure the teacher at 50, 10, 5, 2 and 1 steps.

    Writes ``teacher.safetensors`` (EMA weights), ``classifier.safetensors`` and
    ``metrics.json`` into ``out_dir`` and returns the content of the last.

    Raises:
        FileExistsError: ``out_dir`` holds one of the files; nothing is trained or overwritten.
        ImportError: scikit-learn, which brings the digits, is missing.
    """
    out_dir = Path(out_dir)
    make_folder(out_dir, *FILES)
    images, labels = load_digits()
    start = time.perf_counter()
    classifier, classifier_metrics = train_classifier(
        images,
        labels,
        updates=config.classifier_updates,
        batch_size=config.batch_size,
        lr=config.classifier_lr,
        seed=config.seed,
    )
    teacher, fitted = train_teacher(config, images, labels)
    train_seconds = time.perf_counter() - start
    metrics = {
        "config": asdict(config),
        "torch": torch.__version__,
        "device": f"cpu, {torch.get_num_threads()} threads",
        "train_seconds": round(train_seconds, 1),
        "classifier": classifier_metrics,
        "teacher": {key: fitted[key] for key in ("parameters", "loss_window", "losses")},
        "evaluation": evaluate_teacher(teacher, classifier, config),
    }
    save_dit(teacher, out_dir / FILES[0], {"config": asdict(config)})
    save_classifier(classifier, out_dir / FILES[1], classifier_metrics)
    return write_metrics(out_dir / FILES[2], metrics)


def train_teacher(
    config: PretrainConfig, images: Tensor, labels: Tensor
) -> tuple[DiT, dict[str, Any]]:
    """Train a ``DiT`` by flow matching on images ``[N, 1, 8, 8]`` and labels ``[N]``.

    Returns:
        The EMA weights in eval mode, and what ``fit`` tells.
    """
    generator = torch.Generator().manual_seed(config.seed)
    size = DiTConfig(width=config.width, depth=config.depth, heads=config.heads)
    model = seeded(config.seed, lambda: DiT(size))
    return fit(
        model,
        lambda n: flow_matching_loss(model, config, images, labels, generator),
        config,
        factor=lr_factor,
        betas=(0.9, 0.99),
        clip_norm=0,
        undecayed=(),
        loss_window=100,
    )


def flow_matching_loss(
    model: DiT,
    config: PretrainConfig,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error of the velocity on a random batch, as a scalar."""
    batch = config.batch_size
    rows = torch.randint(len(images), (batch,), generator=generator)
    is_dropped = torch.rand(batch, generator=generator) < config.label_dropout
    label = labels[rows].masked_fill(is_dropped, model.config.num_classes)
    t = sample_times(
        batch,
        config.time_distribution,
        mean=config.time_mean,
        std=config.time_std,
        generator=generator,
    )
    noise = torch.randn(batch, *images.shape[1:], generator=generator)
    x_t, target = interpolate_with_target(images[rows], noise, t)
    return F.mse_loss(model(x_t, t, label), target)


def lr_factor(config: PretrainConfig, update: int) -> float:
    """Linear warm-up times a cosine from 1 to 0 over the whole run."""
    warmup = min(1.0, (update + 1) / max(1, config.warmup_updates))
    return warmup * 0.5 * (1 + math.cos(math.pi * update / config.updates))


def evaluate_teacher(
    teacher: DiT, classifier: DigitsClassifier, config: PretrainConfig
) -> list[dict[str, Any]]:
    """The rows of ``evaluate_digits`` for the guided teacher at ``TEACHER_STEPS``."""
    samplers = teacher_samplers(teacher, config.guidance)
    return evaluate_digits(
        samplers,
        classifier=classifier,
        reference=next(iter(samplers)),
        num_samples=config.num_samples,
        seed=config.seed,
    )


def load_teacher(path: str | Path | None = None) -> DiT:
    """The teacher in eval mode on the CPU: the packaged one, or that of ``path``."""
    return load_dit(PACKAGED / "digits_teacher.safetensors" if path is None else path)


def load_classifier(path: str | Path | None = None) -> DigitsClassifier:
    """The classifier in eval mode on the CPU: the packaged one, or that of ``path``."""
    return read_classifier(PACKAGED / "digits_classifier.safetensors" if path is None else path)
