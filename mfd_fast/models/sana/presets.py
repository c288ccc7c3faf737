"""The SANA presets and their settings."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from mfd_fast.baselines.config import ComparisonConfig
from mfd_fast.distill.config import OptimConfig
from mfd_fast.run.config import RunConfig, TrainConfig
from mfd_fast.settings import Count, CountOrOff, Positive, Settings

if TYPE_CHECKING:
    from mfd_fast.models.sana.task import SanaTask
    from mfd_fast.run.task import Shapes


@dataclass(frozen=True, kw_only=True)
class SanaSettings(Settings):
    """Text, adapters and sizes of a SANA run."""

    SECTION: ClassVar[str] = "sana."

    prompts: str = ""
    """Prompt file (.tsv, .txt, .jsonl, a table, dataset folder or id) or a store made by mfd-fast
    encode-prompts.
    """
    prompt_column: str = ""
    """Key or column of the prompt in .jsonl and tables; empty: prompt, text or caption."""
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

    def task(self) -> "SanaTask":
        from mfd_fast.models.sana.task import SanaTask

        return SanaTask(self)

    def shapes(self, device: str = "meta") -> "Shapes":
        from mfd_fast.models.sana.backbone import sana_shapes

        return sana_shapes(self, device)

    def terms(self) -> "list[tuple[int, Shapes]]":
        from mfd_fast.models.sana.backbone import sana_terms

        return sana_terms(self)


# Where every value comes from, and why it is another where it is: docs/presets.md.
# AdamW at the official script's rate; its moments are 8-bit, ours float32 unless asked for.
LR = 1e-4
STUDENT = {"guidance": 4.5, "student_steps": 4, "student_solver": "dpmpp_2m"}
# Paper, A.3.2: h = .03, logit-normal times, AdamW8bit's default decay, clip .5, 3,000 updates.  It
# gives no parameters of the logit-normal: those of the official code.
PAPER_OPTIM = OptimConfig(lr=LR, weight_decay=1e-2, clip_norm=0.5)
PAPER = ComparisonConfig(
    **STUDENT,
    step_size=0.03,
    time_mean=-0.4,
    aux_time_mean=-0.4,
    aux_updates=10,
    student_updates=1,
    student_optim=PAPER_OPTIM,
    aux_optim=PAPER_OPTIM,
)
# The official launch script: 50 : 20, h = .02, uniform times on the 1/1000 grid, clip 1, 30,000
# steps of either role, of which 20 / 70 are the student's.  It had a sample on each of 8 GPUs; this
# is one GPU, --train.batch-size 8 is all eight.
OFFICIAL_OPTIM = OptimConfig(lr=LR, weight_decay=1e-4, clip_norm=1.0)
OFFICIAL = ComparisonConfig(
    **STUDENT,
    step_size=0.02,
    grid=1000,
    time_distribution="uniform",
    aux_time_distribution="uniform",
    aux_updates=50,
    student_updates=20,
    student_optim=OFFICIAL_OPTIM,
    aux_optim=OFFICIAL_OPTIM,
)
SANA_1600M = "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"
SANA_600M = "Efficient-Large-Model/Sana_600M_1024px_diffusers"
IMAGES = 16  # behind the result table

PRESETS = (
    SanaRun(
        preset="sana-1.6b",
        teacher=SANA_1600M,
        num_eval_samples=IMAGES,
        distill=PAPER,
        train=TrainConfig(updates=3000),
    ),
    SanaRun(
        preset="sana-1.6b-official",
        teacher=SANA_1600M,
        num_eval_samples=IMAGES,
        distill=OFFICIAL,
        train=TrainConfig(updates=30_000 * 20 // 70),
    ),
    SanaRun(
        preset="sana-600m",
        teacher=SANA_600M,
        num_eval_samples=IMAGES,
        distill=PAPER,
        train=TrainConfig(updates=3000),
    ),
    SanaRun(
        preset="sana-tiny",
        num_eval_samples=4,
        distill=replace(PAPER, step_size=0.2, aux_updates=2),
        train=TrainConfig(updates=8, batch_size=2, log_every=2),
        sana=SanaSettings(dtype="float32", rank=8, alpha=8.0, encode_ahead=4),
    ),
)
