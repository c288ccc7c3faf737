"""One family of diffusers pipelines behind the conventions of this project.

t = 1 is noise, v = noise - data, cond is a dict of tensors ``[B, ...]``.  An adapter is a file of
its own with the few things that differ: how the network is called, what the condition is, what the
pipeline means by its guidance scale, how latents become images.  What a pipeline's own call decides
(text lengths, default scale, null prompt) is asked of the pipeline.

``FAMILIES`` names the adapter of a pipeline class; nothing of diffusers is imported here.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mfd_fast.backbones.activation import POLICIES
from mfd_fast.backbones.networks import Patterns
from mfd_fast.models.diffusers.constants import Constant

# Class in model_index.json -> module of this folder and its adapter.
FAMILIES = {
    "AuraFlowPipeline": "aura_flow:AuraFlow",
    "BriaPipeline": "bria:Bria",
    "ChromaPipeline": "chroma:Chroma",
    "CogView4Pipeline": "cogview4:CogView4",
    "Cosmos2TextToImagePipeline": "cosmos2:Cosmos2",
    "Flux2KleinPipeline": "flux2:Flux2Klein",
    "Flux2Pipeline": "flux2:Flux2",
    "FluxPipeline": "flux1:Flux1",
    "HiDreamImagePipeline": "hidream:HiDream",
    "HunyuanVideoPipeline": "hunyuan_video:HunyuanVideo",
    "Kandinsky5T2IPipeline": "kandinsky5:Kandinsky5Image",
    "Kandinsky5T2VPipeline": "kandinsky5_video:Kandinsky5Video",
    "Krea2Pipeline": "krea2:Krea2",
    "LTXPipeline": "ltx:LTX",
    "Lumina2Pipeline": "lumina2:Lumina2",
    "MochiPipeline": "mochi:Mochi",
    "OmniGenPipeline": "omnigen:OmniGen",
    "QwenImagePipeline": "qwen_image:QwenImage",
    "SanaPipeline": "sana:Sana",
    "SanaVideoPipeline": "sana_video:SanaVideo",
    "StableDiffusion3Pipeline": "sd3:StableDiffusion3",
    "WanPipeline": "wan:Wan",
    "ZImagePipeline": "z_image:ZImage",
}
# Beginnings of the names of what cannot be a teacher, and why.
NO_FLOW = {
    **dict.fromkeys(
        (
            *("PixArt", "HunyuanDiT", "Latte", "Kolors", "IFPipeline", "StableDiffusionXL"),
            *("StableDiffusionPipeline", "KandinskyPipeline", "KandinskyV22", "Kandinsky3"),
        ),
        "is no flow model (it predicts the noise of a diffusion)",
    ),
    **dict.fromkeys(
        ("CogVideoX", "CogView3", "Allegro", "StableAudio"),
        "is no flow model (it predicts the v of a diffusion)",
    ),
    "SanaSprint": "is distilled already: its teacher is SANA",
    **dict.fromkeys(
        (
            *("WanImageToVideo", "WanVideoToVideo", "WanVACE", "WanAnimate", "HunyuanVideoImage"),
            *("HunyuanVideoFramepack", "HunyuanSkyreels", "LTXImageToVideo", "LTXCondition"),
            *("LTXI2V", "SanaImageToVideo", "SanaControlNet", "Cosmos2VideoToWorld"),
            *("CosmosVideoToWorld", "Kandinsky5I2V", "Kandinsky5I2I", "FluxControl", "FluxFill"),
            *("FluxKontext", "FluxImg2Img", "FluxInpaint", "QwenImageEdit", "QwenImageControl"),
            *("StableDiffusion3ControlNet", "StableDiffusion3Img2Img", "StableDiffusion3Inpaint"),
        ),
        "starts from an image, a video or a control input, which no adapter takes: give the "
        "pipeline of text alone",
    ),
}

Cond = dict[str, Tensor]


class Family:
    """A pipeline at one resolution and guidance scale; the base of all adapters.

    Args:
        pipe: the pipeline, on its device.  Text encoders and VAE may be gone when only velocities
            are asked for.
        height, width: of the images, in pixels; the pipeline's own default if None.
        scale: guidance scale as the pipeline means it; its own default if None.
        frames, fps: of videos (``video.Video``); images have none.

    ``ValueError`` for a size that the latents cannot have, or a scale that the pipeline lacks.
    """

    targets: ClassVar[Patterns] = ("to_q", "to_k", "to_v", "to_out.0")
    """Linear layers of :class:`FamilyNetwork` that get adapters, as in training scripts."""
    blocks: ClassVar[str] = r"transformer(_2)?\.\w*(blocks|layers|refiner)\.\d+"
    """The repeated blocks of :class:`FamilyNetwork`."""
    scale_name: ClassVar[str] = "guidance_scale"
    """The argument of the pipeline's call that is the guidance scale."""
    has_null: ClassVar[bool] = True
    """Whether the guided velocity needs the null condition (a second lane)."""
    hands_sigmas: ClassVar[bool] = True
    """Whether the pipeline hands even sigmas to its scheduler; else the last step is almost 0."""
    takes_sigmas: ClassVar[bool] = True
    """Whether the pipeline's call has an argument ``sigmas``."""
    least_steps: ClassVar[int] = 1
    """Fewest steps that the pipeline's call can make."""
    output: ClassVar[str] = "images"
    """What the call's answer has it in."""
    names: ClassVar[dict[str, str]] = {"text": "prompt_embeds"}
    """Leaf of the condition -> argument of the pipeline's call."""
    extra: ClassVar[dict[str, Any]] = {}
    """Further arguments of every call of the pipeline."""
    patch: ClassVar[int] = 2
    """Latent pixels of one token, along a side."""
    why_eager: ClassVar[str] = ""
    """Why updates cannot be CUDA graphs, if they cannot."""
    calls_vary: ClassVar[bool] = False
    """Whether conditions and times say how often an evaluation calls a network."""
    why_uncompiled: ClassVar[str] = ""
    """Why its blocks cannot be compiled, if they cannot."""
    activations: ClassVar[tuple[str, ...]] = POLICIES
    """Activation policies that its blocks allow."""
    text_length: ClassVar[int | None] = None
    """Tokens of a text in an estimate; None: of every text, the default of the pipeline's call."""
    comfyui: ClassVar[dict[str, tuple[str, ...]] | None] = {}
    """ComfyUI's layers and those here that are one there, {} for the number of a block; empty: it
    reads files under diffusers' names; None: not known.
    """
    one_length: ClassVar[bool] = False
    """Whether the prompts of one call of its network must have one length, cond["first"]."""
    ignored: ClassVar[tuple[str, ...]] = ("return_dict",)
    """Arguments of the network that the probe does not compare."""
    rounding: ClassVar[float] = 0.0
    """What a recorded velocity is off by at least, relative to it (:meth:`as_flow`)."""
    combine: Callable[[Tensor, Tensor, float], Tensor] | None = None
    """(v_cond, v_uncond, scale) -> guided velocity, where that is not linear."""

    def __init__(
        self,
        pipe: Any,
        *,
        height: int | None = None,
        width: int | None = None,
        scale: float | None = None,
        frames: int | None = None,
        fps: float | None = None,
    ):
        if frames or fps:
            raise ValueError(
                f"{type(pipe).__name__} makes images: leave out frames and fps, which belong to "
                f"videos; got {frames or fps:g}"
            )
        if pipe.config.get("is_distilled"):
            raise ValueError(
                f"this {type(pipe).__name__} is distilled already (is_distilled in its "
                "configuration): the base checkpoint is the teacher"
            )
        self.pipe = pipe
        self.config = pipe.transformer.config
        self.scale = self.default(self.scale_name) if scale is None else scale
        own = self.default_size()
        self.height, self.width = height or own[0], width or own[1]
        multiple = self.unit()
        if self.height % multiple or self.width % multiple:
            raise ValueError(
                f"height and width must be multiples of {multiple} for {type(pipe).__name__}; "
                f"got {self.height} x {self.width}"
            )
        self.rows, self.columns = self.height // multiple, self.width // multiple  # of tokens
        self.null_row: Cond | None = None  # made by encode_null, or read from a text store

    @classmethod
    def before(cls) -> None:
        """What must have happened before a pipeline is made."""

    @property
    def takes_lora(self) -> bool:
        """Whether its network can load a LoRA; else the student is merged weights."""
        return hasattr(self.pipe.transformer, "load_lora_adapter")

    def given(self, cond: Cond, null: Cond | None) -> AbstractContextManager:
        """The block in which the pipeline's call has conditions that it takes no argument for."""
        return nullcontext()

    def __deepcopy__(self, memo: dict) -> "Family":
        return self  # facts and a pipeline: a copy of the network needs no second one

    def default(self, name: str) -> Any:
        """The default of an argument of the pipeline's call; it is not always encode_prompt's."""
        return inspect.signature(type(self.pipe).__call__).parameters[name].default

    def default_size(self) -> tuple[int, int]:
        """Height and width of what the pipeline makes where none are given."""
        size = getattr(self.pipe, "default_sample_size", None)
        return (size * self.pipe.vae_scale_factor if size else 1024,) * 2

    def unit(self) -> int:
        """Pixels of one token, along a side."""
        return self.pipe.vae_scale_factor * self.patch

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks by their names in the pipeline: one, or two that take turns by time."""
        return {"transformer": self.pipe.transformer}

    def is_first(self, t: Tensor) -> Tensor:
        """Where the first network is evaluated: bool, of t's shape, on the CPU."""
        return torch.ones(t.shape, dtype=torch.bool)

    @property
    def unguided(self) -> float:
        """The scale of the pipeline's call that turns guidance off, for the student."""
        return 1.0 if self.has_null else self.scale

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.pipe.transformer.device

    @property
    def guidance(self) -> float:
        """The engine's w of the pipeline's scale: w = 1 needs no null condition."""
        return max(float(self.scale), 1.0) if self.has_null else 1.0

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample as the network takes it: ``[C, h, w]``."""
        return self.config.in_channels, self.rows * self.patch, self.columns * self.patch

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        """The conditions of prompts, a row each, by the pipeline's own encode_prompt."""
        return self.encode_text(list(prompts))

    def encode_text(self, prompts: list[str]) -> Cond:
        """What :meth:`encode` gives; the list is the family's to change."""
        raise NotImplementedError(f"{type(self).__name__} must define encode_text")

    @torch.no_grad()
    def encode_null(self) -> Cond:
        """The null condition of one row, as the pipeline makes it."""
        return self.encode_text([""])

    def null(self, cond: Cond) -> Cond:
        """The null condition for the rows of cond, in its shapes; ``ValueError`` if it is longer
        than their text.
        """
        if self.null_row is None:
            self.null_row = self.encode_null()
        return {name: _as_rows(self.null_row[name], leaf, name) for name, leaf in cond.items()}

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """v ``[R, *S]`` of x ``[R, *S]`` at t ``[R]`` float32, called as the pipeline does."""
        raise NotImplementedError(f"{type(self).__name__} must define velocity")

    def constants(self, transformer: nn.Module) -> Iterable[Constant]:
        """Modules of a network whose results the condition alone decides, later ones after those
        that give their input.
        """
        return ()

    @property
    def tokens(self) -> tuple[int, int]:
        """Of a text, and of a sample."""
        text = self.text_length or self.default("max_sequence_length")
        return text, self.rows * self.columns

    def set_modes(self, transformer: nn.Module) -> None:
        """What an evaluated network needs besides eval mode for right gradients."""

    def blank(self, rows: int) -> Cond:
        """A condition of zeros for estimates, its leaves as :meth:`encode` makes them."""
        length = self.text_length or self.default("max_sequence_length")
        return {"text": self.zeros(rows, length, self.config.joint_attention_dim)}

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Where the network is, and in its dtype if none is given."""
        return torch.zeros(*shape, dtype=dtype or self.pipe.transformer.dtype, device=self.device)

    def blank_null(self) -> Cond:
        """The same of the null condition, one row."""
        return self.blank(1)

    def cast(self, transformer: nn.Module, dtype: torch.dtype) -> None:
        """Bring the network to a dtype, in place."""
        transformer.to(dtype)

    def without_values(self, transformer: nn.Module) -> None:
        """Make the network's work the same for all values, so that it runs on ``meta``."""

    def time_of(self, told: float) -> float:
        """t of the time that the scheduler shows the network, over its number of train steps."""
        return told

    def even_scheduler(self) -> Any:
        """The pipeline's scheduler, or one in its place that can have even nodes."""
        return self.pipe.scheduler

    def nodes_call(self, steps: int) -> dict[str, Any]:
        """Arguments of the pipeline's call for even nodes, which its scheduler shifts."""
        return {"sigmas": [1.0 - k / steps for k in range(steps)]}

    def call(self, cond: Cond, null: Cond | None) -> dict[str, Any]:
        """Arguments of the pipeline's call that stand for these conditions and the scale."""
        given = {name: cond[leaf] for leaf, name in self.names.items()}
        if null is not None:
            given |= {f"negative_{name}": null[leaf] for leaf, name in self.names.items()}
        return given | {self.scale_name: self.scale} | self.extra

    def as_flow(self, recording: Any) -> Any:
        """A ``record.Recording`` of the pipeline in times and velocities of ours; it may change."""
        return recording

    def pipe_latents(self, x: Tensor) -> Tensor:
        """Samples as the pipeline's argument ``latents`` takes them."""
        return x

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Images ``[B, 3, height, width]`` in [0, 1] of samples at t = 0."""
        vae = self.pipe.vae
        image = vae.decode(self.denormalised(x).to(vae.dtype), return_dict=False)[0]
        return self.pipe.image_processor.postprocess(self.frame(image), output_type="pt")

    def denormalised(self, x: Tensor) -> Tensor:
        """What the VAE decodes."""
        config = self.pipe.vae.config
        return x / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)

    def frame(self, image: Tensor) -> Tensor:
        """The image of what the VAE made."""
        return image


def named(transformer: nn.Module) -> nn.Module:
    """The network under the name by which ``Family.blocks`` knows it."""
    return nn.ModuleDict({"transformer": transformer})


def family_of(pipe: Any, **options: Any) -> Family:
    """The adapter of a pipeline, with :class:`Family`'s options; errors of :func:`adapter_of`."""
    return adapter_of(type(pipe).__name__)(pipe, **options)


def adapter_of(name: str) -> type[Family]:
    """The adapter of a pipeline class.

    ``ValueError`` names a pipeline that is no flow model or that no adapter knows.
    """
    if name not in FAMILIES:
        why = next((why for start, why in NO_FLOW.items() if name.startswith(start)), "")
        raise ValueError(f"{name} {why or f'has no adapter; there are {sorted(FAMILIES)}'}")
    module, adapter = FAMILIES[name].split(":")
    return getattr(import_module(f"mfd_fast.models.diffusers.{module}"), adapter)


def by_channel(x: Tensor, config: Any) -> Tensor:
    """Latents ``[B, C, ...]`` with the mean and deviation that a VAE's configuration lists."""
    mean, std = (
        x.new_tensor(values).view(1, -1, *(1,) * (x.ndim - 2))
        for values in (config.latents_mean, config.latents_std)
    )
    return x * std + mean


def padded(leaf: Tensor, length: int) -> Tensor:
    """``[B, L, ...]`` with zeros behind, ``[B, length, ...]``."""
    missing = length - leaf.shape[1]
    return torch.cat([leaf, leaf.new_zeros(len(leaf), missing, *leaf.shape[2:])], dim=1)


def _as_rows(row: Tensor, like: Tensor, name: str) -> Tensor:
    if row.ndim > 1 and row.shape[1] > like.shape[1]:
        raise ValueError(
            f"the null condition has {row.shape[1]} rows of {name}, the prompts' {like.shape[1]}: "
            "encode the prompts with Family.encode, which makes room for it"
        )
    if row.ndim > 1 and row.shape[1] < like.shape[1]:
        row = padded(row, like.shape[1])
    return row.to(like.device, like.dtype).expand_as(like)
