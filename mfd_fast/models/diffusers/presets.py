"""The preset of any diffusers pipeline that has an adapter, and its settings."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from mfd_fast.models.diffusers.published import PUBLISHED
from mfd_fast.models.sana.presets import IMAGES, PAPER
from mfd_fast.run.config import RunConfig, TrainConfig
from mfd_fast.settings import Count, Number, Positive, PositiveOrOff, Settings

if TYPE_CHECKING:
    from mfd_fast.backbones.quantized import Stored
    from mfd_fast.models.diffusers.task import PipelineTask
    from mfd_fast.run.task import Shapes


@dataclass(frozen=True, kw_only=True)
class PipelineSettings(Settings):
    """Text, adapters and sizes of a pipeline's run."""

    SECTION: ClassVar[str] = "pipeline."

    prompts: str = ""
    """Prompt file (.tsv, .txt, .jsonl, a table, dataset folder or id)."""
    prompt_column: str = ""
    """Key or column of the prompt in .jsonl and tables; empty: prompt, text or caption."""
    skip_bad: bool = False
    """Leave out lines of the prompt file that are no prompt, in place of refusing the file."""
    text_memory: Positive = 16.0
    """GB of the host's memory for encoded prompts; what does not fit is encoded later, between two
    updates.
    """
    resolution: str = ""
    """Height and width in pixels, as 1024x768; empty: the pipeline's own."""
    frames: Count | None = None
    """Frames of a video; None: the default of the pipeline's call."""
    fps: Positive | None = None
    """Frames a second of a video, written and told to a network that is told; None: the published
    model's.
    """
    guidance: Number | None = None
    """Guidance scale of the teacher as the pipeline's call means it; None: that call's default."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the frozen pipeline; adapters and ODE states are float32."""
    base: Literal["bf16", "int8", "float8", "nf4", "auto"] = "bf16"
    """Format of the frozen network's blocks: bf16 is as dtype says, auto the largest of bf16, int8
    and nf4 with which the run fits into the device's free memory.
    """
    base_memory: PositiveOrOff = 0.0
    """GB of the device for the frozen network; its other blocks live in the host's memory and come
    ahead of their use; 0: all of it on the device.
    """
    rank: Count = 64
    """Rank of the auxiliary's and the student's LoRA."""
    alpha: Positive = 64.0
    """LoRA alpha; the adapter's output is scaled by alpha / rank."""
    targets: str = ""
    """Linear layers that get an adapter, by the end of their names; empty: the family's."""
    compile: bool = False
    """Compile each kind of repeated block once for all of its kind, by torch.compile."""
    attention: str = ""
    """Attention backend of diffusers (native, flash, _flash_3, _native_cudnn, ...); empty: as
    DIFFUSERS_ATTN_BACKEND says, or PyTorch's own.
    """
    teacher_lora: str = ""
    """LoRA files of this pipeline, FILE or FILE:WEIGHT with commas between: the teacher is the
    checkpoint with them, for all three roles.
    """
    revision: str = ""
    """Branch, tag or commit of a teacher on the hub; empty: its main branch."""
    variant: str = ""
    """Variant of the checkpoint's weight files, such as fp16; empty: the plain ones."""


@dataclass(frozen=True, kw_only=True)
class PipelineRun(RunConfig):
    """Pipelines of diffusers from text to images or videos, LoRA adapters on a frozen network."""

    SHORT: ClassVar[dict[str, str]] = {
        "--prompts": "--pipeline.prompts",
        "--prompt-key": "--pipeline.prompt-column",
        "--skip-bad": "--pipeline.skip-bad",
        "--resolution": "--pipeline.resolution",
        "--frames": "--pipeline.frames",
        "--fps": "--pipeline.fps",
        "--guidance": "--pipeline.guidance",
        "--compile": "--pipeline.compile",
        "--revision": "--pipeline.revision",
        "--variant": "--pipeline.variant",
        "--teacher-lora": "--pipeline.teacher-lora",
        "--base": "--pipeline.base",
        "--base-memory": "--pipeline.base-memory",
    }
    PATHS: ClassVar[tuple[str, ...]] = (
        *RunConfig.PATHS,
        "pipeline.prompts",
        "pipeline.teacher_lora",
    )
    MAY_CHANGE: ClassVar[tuple[str, ...]] = (
        *RunConfig.MAY_CHANGE,
        "pipeline.prompt_column",
        "pipeline.skip_bad",
        "pipeline.text_memory",
        "pipeline.base_memory",
        "pipeline.compile",
        "pipeline.attention",
        "pipeline.revision",
        "pipeline.variant",
    )

    pipeline: PipelineSettings = field(default_factory=PipelineSettings)
    """Text, adapters and sizes."""

    def task(self) -> "PipelineTask":
        from mfd_fast.models.diffusers.task import PipelineTask

        return PipelineTask(self)

    def resolved(self) -> RunConfig:
        from mfd_fast.models.diffusers.shapes import engine_config, outlined

        return engine_config(self, outlined(self))

    def shapes(self, device: str = "meta") -> "Shapes":
        from mfd_fast.models.diffusers.shapes import pipeline_shapes

        return pipeline_shapes(self, device)

    def terms(self) -> "list[tuple[int, Shapes]]":
        from mfd_fast.models.diffusers.shapes import pipeline_terms

        return pipeline_terms(self)

    def bases(self) -> dict[str, RunConfig]:
        from mfd_fast.backbones.quantized import COMPARED

        names = dict.fromkeys((self.pipeline.base, *COMPARED))
        names.pop("auto", None)
        return {
            name: replace(self, pipeline=replace(self.pipeline, base=name, base_memory=0.0))
            for name in names
        }

    def stored(self) -> "Stored":
        from mfd_fast.models.diffusers.shapes import outlined, stored_of

        return stored_of(outlined(self), self.pipeline)

    def check_base(self) -> str:
        from mfd_fast.models.diffusers.base_error import base_error

        return base_error(self)

    def beside_the_updates(self) -> dict[str, float]:
        from mfd_fast.models.diffusers.shapes import beside_the_updates

        return beside_the_updates(self)


VIDEOS = 4  # behind the result table: one of 50 guided steps takes minutes
# SANA's settings with Euler steps; the guidance is the pipeline's (docs/families.md).
PIPELINE = PipelineRun(
    preset="pipeline",
    num_eval_samples=IMAGES,
    distill=replace(PAPER, guidance=1.0, student_solver="euler"),
    train=TrainConfig(updates=3000),
)
PRESETS = (
    PIPELINE,
    *(
        replace(
            PIPELINE,
            preset=name,
            teacher=model.model,
            num_eval_samples=VIDEOS if "frames" in model.settings else IMAGES,
            pipeline=PipelineSettings(revision=model.revision, **model.settings),
        )
        for name, model in PUBLISHED.items()
    ),
)
