"""The presets: what ``mfd-fast distill NAME`` starts from, a config class for each family.

Imports no model: the command line lists the presets without loading one.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from mfd_fast.config import (
    DistillConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    from_dict,
    nearest,
)


@dataclass(frozen=True, kw_only=True)
class DigitsRun(RunConfig):
    """8x8 digits from the packaged class-conditional teacher."""

    TASK: ClassVar[str] = "mfd_fast.tasks.digits:DigitsTask"


@dataclass(frozen=True, kw_only=True)
class SanaSettings:
    """Text, adapters and sizes of a SANA run."""

    prompts: str = ""
    """Prompt file (.tsv, .txt, .jsonl, .parquet, dataset folder) or a store made by mfd-fast
    encode-prompts.
    """
    prompt_column: str = ""
    """Key or column of the prompt in .jsonl and .parquet; empty: prompt, text or caption."""
    revision: str = ""
    """Branch, tag or commit of a teacher on the hub; empty: its main branch."""
    variant: str = ""
    """Variant of the checkpoint's weight files, such as fp16; empty: the plain ones."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype of the frozen network; adapters and ODE states are float32."""
    resolution: int = 0
    """Height and width of the images in pixels; 0: the checkpoint's own."""
    text_length: int = 0
    """Every batch's text is padded to this many tokens; 0: to its own longest prompt, and to 300
    where train.capture needs one length.
    """
    rank: int = 64
    """Rank of the auxiliary's and the student's LoRA."""
    alpha: float = 64.0
    """LoRA alpha; the adapter's output is scaled by alpha / rank."""
    targets: str = "to_q,to_k,to_v"
    """Linear layers that get an adapter, by the end of their names."""
    teacher_lora: str = ""
    """A diffusers LoRA file: the teacher is the checkpoint with it, for all three roles."""
    grid_every: int = 0
    """Write a grid of sample images every this many student updates; 0: only at the end."""
    grid_prompts: int = 4
    """Images in a grid."""


@dataclass(frozen=True, kw_only=True)
class SanaRun(RunConfig):
    """SANA text-to-image, LoRA adapters on the frozen checkpoint."""

    TASK: ClassVar[str] = "mfd_fast.tasks.sana:SanaTask"

    sana: SanaSettings = field(default_factory=SanaSettings)
    """Text, adapters and sizes."""


PRESETS: dict[str, RunConfig] = {
    "digits": DigitsRun(
        preset="digits",
        distill=DistillConfig(
            guidance=2.0,
            step_size=0.05,
            aux_updates=5,
            ema_decay=0.98,
            student_optim=OptimConfig(lr=1e-4),
            aux_optim=OptimConfig(lr=3e-4),
        ),
        train=TrainConfig(updates=400, batch_size=64),
    ),
}


def preset(name: str) -> RunConfig:
    """The configuration a preset starts from; ``ValueError`` lists the presets and the nearest
    one.
    """
    if name not in PRESETS:
        raise ValueError(
            f"unknown preset {name!r}; there is {sorted(PRESETS)}{nearest(name, PRESETS)}"
        )
    return PRESETS[name]


def load_config(path: Path) -> RunConfig:
    """Read a config written by ``config.save_config``; unknown keys and wrong types are
    ``ValueError``.
    """
    import yaml  # here, so that the library itself needs no YAML

    tree = yaml.safe_load(path.read_text())
    if not isinstance(tree, dict) or not isinstance(tree.get("preset"), str):
        raise ValueError(f"{path} must hold a mapping of config keys with a preset; got {tree!r}")
    return from_dict(type(preset(tree["preset"])), tree)
