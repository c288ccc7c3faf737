"""The presets: what ``mfd-fast distill NAME`` starts from, a config class for each family.

Imports no model: the command line lists the presets without loading one.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from mfd_fast.distill.config import DistillConfig, OptimConfig
from mfd_fast.files.plain import read_yaml
from mfd_fast.run.config import RunConfig, TrainConfig, from_dict, nearest, to_dict
from mfd_fast.settings import Count, CountOrOff, Positive, Settings


@dataclass(frozen=True, kw_only=True)
class DigitsRun(RunConfig):
    """8x8 digits from the packaged class-conditional teacher."""

    TASK: ClassVar[str] = "mfd_fast.models.digits.task:DigitsTask"


@dataclass(frozen=True, kw_only=True)
class SanaSettings(Settings):
    """Text, adapters and sizes of a SANA run."""

    SECTION: ClassVar[str] = "sana."

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
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the frozen network; adapters and ODE states are float32."""
    resolution: CountOrOff = 0
    """Height and width of the images in pixels; 0: the checkpoint's own."""
    encode_ahead: Count = 64
    """Updates whose prompts are encoded in one call, when no store is given."""
    keep_text_encoder: bool = False
    """The text encoder stays on the GPU (5 GB) and encodes beside the training, in place of
    visiting it once every encode_ahead updates.
    """
    skip_bad: bool = False
    """Leave out lines of the prompt file that are no prompt, in place of refusing the file."""
    text_length: CountOrOff = 0
    """Every batch's text is padded to this many tokens; 0: to a multiple of text_multiple."""
    text_multiple: Count = 64
    """Every batch's text is padded from its longest prompt to a multiple of this many tokens; every
    length that comes has CUDA graphs of its own.
    """
    rank: Count = 64
    """Rank of the auxiliary's and the student's LoRA."""
    alpha: Positive = 64.0
    """LoRA alpha; the adapter's output is scaled by alpha / rank."""
    targets: str = "to_q,to_k,to_v"
    """Linear layers that get an adapter, by the end of their names."""
    teacher_lora: str = ""
    """A diffusers LoRA file: the teacher is the checkpoint with it, for all three roles."""
    preview_prompt: str = ""
    """Prompt of the sample grids; empty: the first prompts of the run."""


@dataclass(frozen=True, kw_only=True)
class SanaRun(RunConfig):
    """SANA text-to-image, LoRA adapters on the frozen checkpoint."""

    TASK: ClassVar[str] = "mfd_fast.models.sana.task:SanaTask"
    SHORT: ClassVar[dict[str, str]] = {
        "--prompts": "--sana.prompts",
        "--prompt-key": "--sana.prompt-column",
        "--skip-bad": "--sana.skip-bad",
        "--revision": "--sana.revision",
        "--variant": "--sana.variant",
        "--teacher-lora": "--sana.teacher-lora",
    }
    PATHS: ClassVar[tuple[str, ...]] = (*RunConfig.PATHS, "sana.prompts", "sana.teacher_lora")
    MAY_CHANGE: ClassVar[tuple[str, ...]] = (
        *RunConfig.MAY_CHANGE,
        "sana.prompt_column",
        "sana.skip_bad",
        "sana.revision",
        "sana.variant",
        "sana.encode_ahead",
        "sana.keep_text_encoder",
        "sana.text_length",
        "sana.text_multiple",
        "sana.preview_prompt",
    )

    sana: SanaSettings = field(default_factory=SanaSettings)
    """Text, adapters and sizes."""


@dataclass(frozen=True, kw_only=True)
class OccfmSettings(Settings):
    """Data, decoder and what is trained of an OccFM run."""

    SECTION: ClassVar[str] = "occfm."

    store: str = ""
    """Store of latents and labels, from mfd-fast prepare occfm."""
    vae: str = ""
    """File of the VAE that made the latents; empty: the one inside the teacher's checkpoint."""
    vae3d: str = ""
    """File of a VAE of clips: the table gets FID and FVD on its features; empty: it does not."""
    rank: CountOrOff = 0
    """Rank of the auxiliary's and the student's LoRA; 0: full copies of the network (the paper)."""
    alpha: Positive = 64.0
    """LoRA alpha; the adapter's output is scaled by alpha / rank."""
    targets: str = "qkv,attn.proj,fc1,fc2,to_qkv,to_out"
    """Linear layers that get an adapter, by the end of their names."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the products; trained weights are float32 (float16 needs distill.loss_scale)."""


@dataclass(frozen=True, kw_only=True)
class OccfmRun(RunConfig):
    """OccFM occupancy forecasting, full copies of the transition network or adapters on it."""

    TASK: ClassVar[str] = "mfd_fast.models.occfm.task:OccfmTask"
    SHORT: ClassVar[dict[str, str]] = {"--data": "--occfm.store", "--vae": "--occfm.vae"}
    PATHS: ClassVar[tuple[str, ...]] = (*RunConfig.PATHS, "occfm.store", "occfm.vae", "occfm.vae3d")

    occfm: OccfmSettings = field(default_factory=OccfmSettings)
    """Data, decoder and what is trained."""


@dataclass(frozen=True, kw_only=True)
class Cifar10Settings(Settings):
    """Data and yardstick of a CIFAR-10 run."""

    SECTION: ClassVar[str] = "cifar10."

    data: str = ""
    """Folder of the unpacked CIFAR-10 archive, python or binary version."""
    features: Literal["none", "inception", "dinov2"] = "none"
    """What FID, precision and recall are measured on; none: the table has speeds only."""
    features_model: str = ""
    """Inception's weights file, or a folder or hub id of DINOv2."""
    teacher_steps: Count = 100
    """Euler steps of the teacher's row (the paper: 100)."""


@dataclass(frozen=True, kw_only=True)
class Cifar10Run(RunConfig):
    """Unconditional CIFAR-10, full copies of a UNet of mfd-fast pretrain cifar10."""

    TASK: ClassVar[str] = "mfd_fast.models.cifar10.task:Cifar10Task"
    PATHS: ClassVar[tuple[str, ...]] = (*RunConfig.PATHS, "cifar10.data", "cifar10.features_model")
    MAY_CHANGE: ClassVar[tuple[str, ...]] = (
        *RunConfig.MAY_CHANGE,
        "cifar10.features",
        "cifar10.teacher_steps",
    )

    cifar10: Cifar10Settings = field(default_factory=Cifar10Settings)
    """Data and yardstick."""


# Where every value comes from, and why it is another where it is: docs/presets.md.
def _sana_optim(weight_decay: float, clip_norm: float) -> OptimConfig:
    """AdamW at the official script's rate; its moments are 8-bit, ours float32 unless asked for."""
    return OptimConfig(lr=1e-4, weight_decay=weight_decay, clip_norm=clip_norm)


SANA_STUDENT = {"guidance": 4.5, "student_steps": 4, "student_solver": "dpmpp_2m"}
# Paper, A.3.2: h = .03, logit-normal times, AdamW8bit's default decay, clip .5, 3,000 updates.  It
# gives no parameters of the logit-normal: those of the official code.
SANA_PAPER_OPTIM = _sana_optim(1e-2, 0.5)
SANA_PAPER = DistillConfig(
    **SANA_STUDENT,
    step_size=0.03,
    time_mean=-0.4,
    aux_time_mean=-0.4,
    aux_updates=10,
    student_updates=1,
    student_optim=SANA_PAPER_OPTIM,
    aux_optim=SANA_PAPER_OPTIM,
)
# The official launch script: 50 : 20, h = .02, uniform times on the 1/1000 grid, clip 1, 30,000
# steps of either role, of which 20 / 70 are the student's.  It had a sample on each of 8 GPUs; this
# is one GPU, --train.batch-size 8 is all eight.
SANA_OFFICIAL_OPTIM = _sana_optim(1e-4, 1.0)
SANA_OFFICIAL = DistillConfig(
    **SANA_STUDENT,
    step_size=0.02,
    grid=1000,
    time_distribution="uniform",
    aux_time_distribution="uniform",
    aux_updates=50,
    student_updates=20,
    student_optim=SANA_OFFICIAL_OPTIM,
    aux_optim=SANA_OFFICIAL_OPTIM,
)
SANA_1600M = "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"
SANA_600M = "Efficient-Large-Model/Sana_600M_1024px_diffusers"
# Paper, A.3.1: h = .02, logit-normal times (N(0, 1), as the teacher was trained: the paper gives no
# parameters), Adam, 100-step warm-up, clip 1, 30 epochs of 28,130 frames at 8 a step.  Its text
# names no learning rate: a quarter of the one that the published teacher was trained with on one
# GPU.
OCCFM_OPTIM = OptimConfig(lr=2e-5, weight_decay=0.0, warmup_updates=100)
OCCFM_PAPER = DistillConfig(
    guidance=2.0, step_size=0.02, student_optim=OCCFM_OPTIM, aux_optim=OCCFM_OPTIM
)
# The paper's scale is 10, where the difference of the mean velocities is divided by the 8 x 240,000
# numbers of a batch: 5e-6, below the 6e-5 from which float16 has its full precision.  And it grows
# by 2 in 2,000 updates, so that the student would end at 160.  A scale changes rounding alone.
OCCFM_LOSS_SCALE = 65536.0
OCCFM_CYCLES = 30 * 28_130 // 8 // 11
SANA_IMAGES = 16  # behind the result table

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
    # Paper D.1 gives the network's size and one step; the rest is that of its OccFM runs.
    "cifar10": Cifar10Run(
        preset="cifar10",
        num_eval_samples=10_000,
        distill=DistillConfig(
            guidance=1.0,
            step_size=0.02,
            ema_decay=0.999,
            student_optim=OCCFM_OPTIM,
            aux_optim=OCCFM_OPTIM,
        ),
        train=TrainConfig(updates=20_000, batch_size=128, log_every=50),
    ),
    "sana-1.6b": SanaRun(
        preset="sana-1.6b",
        teacher=SANA_1600M,
        num_eval_samples=SANA_IMAGES,
        distill=SANA_PAPER,
        train=TrainConfig(updates=3000),
    ),
    "sana-1.6b-official": SanaRun(
        preset="sana-1.6b-official",
        teacher=SANA_1600M,
        num_eval_samples=SANA_IMAGES,
        distill=SANA_OFFICIAL,
        train=TrainConfig(updates=30_000 * 20 // 70),
    ),
    "sana-600m": SanaRun(
        preset="sana-600m",
        teacher=SANA_600M,
        num_eval_samples=SANA_IMAGES,
        distill=SANA_PAPER,
        train=TrainConfig(updates=3000),
    ),
    "sana-tiny": SanaRun(
        preset="sana-tiny",
        num_eval_samples=4,
        distill=replace(SANA_PAPER, step_size=0.2, aux_updates=2),
        train=TrainConfig(updates=8, batch_size=2, log_every=2),
        sana=SanaSettings(dtype="float32", rank=8, alpha=8.0, encode_ahead=4),
    ),
    "occfm": OccfmRun(
        preset="occfm",
        num_eval_samples=4369,
        distill=replace(OCCFM_PAPER, loss_scale=OCCFM_LOSS_SCALE),
        train=TrainConfig(updates=OCCFM_CYCLES, batch_size=8),
        occfm=OccfmSettings(dtype="float16"),
    ),
    "occfm-tiny": OccfmRun(
        preset="occfm-tiny",
        num_eval_samples=4,
        distill=replace(OCCFM_PAPER, step_size=0.2, aux_updates=2),
        train=TrainConfig(updates=2, batch_size=2, log_every=1),
    ),
}

# --memory-profile GB: for a card of that memory.  A larger batch is not the paper's setting (1 a
# GPU); it is there because it is faster a sample.
MEMORY_PROFILES: dict[int, dict[str, Any]] = {
    16: {"activation": "block", "batch_size": 1},
    24: {"activation": "none", "batch_size": 1},
    40: {"activation": "none", "batch_size": 2},
    80: {"activation": "none", "batch_size": 4},
}


def with_memory(config: RunConfig, gigabytes: int) -> RunConfig:
    """The config with the profile of a card; ``ValueError`` lists the profiles."""
    if gigabytes not in MEMORY_PROFILES:
        raise ValueError(
            f"--memory-profile must be one of {', '.join(map(str, MEMORY_PROFILES))} (GB of the "
            f"card), got {gigabytes}; take the next smaller one"
        )
    return replace(config, train=replace(config.train, **MEMORY_PROFILES[gigabytes]))


def preset(name: str) -> RunConfig:
    """The configuration a preset starts from; ``ValueError`` lists the presets and the nearest
    one.
    """
    if name not in PRESETS:
        raise ValueError(
            f"unknown preset {name!r}; there is {', '.join(PRESETS)}{nearest(name, PRESETS)}"
        )
    return PRESETS[name]


def load_config(path: Path) -> RunConfig:
    """Read a config written by ``config.save_config``; unknown keys and wrong types are
    ``ValueError``.
    """
    tree = _read_yaml(path)
    if not isinstance(tree.get("preset"), str):
        raise ValueError(f"{path} must name its preset; got {tree.get('preset')!r}")
    return from_dict(type(preset(tree["preset"])), tree)


def with_file(config: RunConfig, path: Path) -> RunConfig:
    """The config with the keys of a YAML file, which need not be all."""
    tree = _read_yaml(path)
    if tree.get("preset", config.preset) != config.preset:
        raise ValueError(f"{path} is of preset {tree['preset']!r}, not of {config.preset!r}")
    return from_dict(type(config), _merged(to_dict(config), tree))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = read_yaml(path)
    except FileNotFoundError:
        raise ValueError(f"there is no {path}; give --config a YAML file of settings") from None
    except ValueError as error:
        raise ValueError(f"{path} is not YAML of settings: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold a mapping of config keys; got {type(tree).__name__}")
    return tree


def _merged(tree: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = dict(tree)
    for name, value in over.items():
        is_section = isinstance(value, dict) and isinstance(tree.get(name), dict)
        both[name] = _merged(tree[name], value) if is_section else value
    return both
