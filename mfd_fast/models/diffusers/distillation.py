"""Distil the model of any flow pipeline of diffusers, in this library's loop or in your own.

d = distillation(pipe, steps=4)
cond = d.cond(["a red fox"])
d.step(cond)                       # or d.aux_loss(cond), d.student_loss(cond) and your backward
images = d.generate(cond)
d.save("student")
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mfd_fast.backbones.compiled import BACKEND, check_compiler
from mfd_fast.backbones.networks import Patterns
from mfd_fast.backbones.quantized import check_format, quantize_network
from mfd_fast.distill.config import DistillConfig
from mfd_fast.models.diffusers.attention import use_attention
from mfd_fast.models.diffusers.backbone import backbone_of
from mfd_fast.models.diffusers.checkpoint import pipeline_around
from mfd_fast.models.diffusers.family import Cond, family_of, named
from mfd_fast.models.diffusers.probe import probe
from mfd_fast.models.diffusers.sampler import student_sampler
from mfd_fast.models.diffusers.student import save_student
from mfd_fast.models.diffusers.teacher_lora import merge_teacher_lora
from mfd_fast.run.config import Capture
from mfd_fast.run.folder import STUDENT
from mfd_fast.run.maker import make_distiller


class Distillation:
    """A pipeline, the adapters on its network, and the updates that train them.

    Args: those of :func:`distillation`.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        guidance: float | None = None,
        steps: int = 4,
        rank: int = 64,
        teacher_lora: str | Mapping[str, float] | None = None,
        base: str = "bf16",
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        fps: float | None = None,
        cond: Cond | None = None,
        null: Cond | None = None,
        config: DistillConfig | None = None,
        targets: Patterns | None = None,
        activation: str = "none",
        compile: bool = False,
        capture: Capture = "auto",
    ):
        size = {"height": height, "width": width, "frames": frames, "fps": fps}
        self.family = family_of(pipe, **size, scale=guidance)
        if base != "bf16":
            check_format(base)
            quantize_network(named(pipe.transformer), self.family.blocks, base)
        self.teacher_lora = merge_teacher_lora(pipe, teacher_lora)
        self.attention = use_attention(pipe.transformer)
        if compile:
            check_compiler(self.family.device)
        config = DistillConfig() if config is None else config
        self.config = replace(config, guidance=self.family.guidance, student_steps=steps)
        self.backbone = backbone_of(
            self.family,
            rank=rank,
            targets=targets,
            activation=activation,
            compiler=BACKEND if compile else None,
            generator=torch.Generator().manual_seed(config.seed),
        )
        self.family.null_row = null
        cond = self._some_prompt() if cond is None else cond
        probe(self.family, cond)
        self.sampler = student_sampler(self.family, cond, steps)
        capture = "off" if self.family.why_eager and capture == "auto" else capture
        self.distiller = make_distiller(
            self.backbone, self.config, capture=capture, schedule=self.sampler.schedule
        )

    def _some_prompt(self) -> Cond:
        if getattr(self.family.pipe, "text_encoder", "needs none") is None:
            raise ValueError(
                "the pipeline has no text encoder: give cond and null, made by Family.encode and "
                "Family.encode_null while it had one"
            )
        return self.family.encode(["a picture"])

    def cond(self, prompts: Sequence[str] | Cond) -> Cond:
        """The conditions of prompts; embeddings that were made before stay as they are."""
        return dict(prompts) if isinstance(prompts, Mapping) else self.family.encode(prompts)

    def parameters(self, role: str) -> list[nn.Parameter]:
        """What your optimizer of ``"aux"`` or ``"student"`` trains."""
        return self.backbone.parameters_of(role)

    def step(self, cond: Cond) -> dict[str, Tensor]:
        """The next update of the cycle with this library's optimizers; its metrics."""
        return self.distiller.step(cond)

    @property
    def next_role(self) -> str:
        """Whose turn it is: ``"aux"`` or ``"student"``."""
        return self.distiller.next_role

    def aux_loss(self, cond: Cond) -> Tensor:
        """The auxiliary's loss ``[]``; its backward is the gradient of :meth:`step`."""
        draw = self.distiller._draw_aux_times
        return self._loss("aux", lambda: self.distiller._aux_backward(cond, draw(cond)))

    def student_loss(self, cond: Cond) -> Tensor:
        """The student's loss ``[]``; its backward is the gradient of :meth:`step`."""
        return self._loss("student", lambda: self.distiller._student_backward(cond))

    def _loss(self, role: str, run: Any) -> Tensor:
        """The loss that an update would call backward on; your optimizer has moved the weights."""
        for name in ("aux", "student"):
            self.backbone.refresh(name)
        losses: list[Tensor] = []
        self.distiller._backward = lambda _, loss: losses.append(loss)
        try:
            run()
        finally:
            del self.distiller._backward
        self.distiller.trained[role].num_updates += 1
        return losses[0]

    def generate(self, cond: Sequence[str] | Cond, *, seed: int = 0) -> Tensor:
        """Images of the student ``[B, 3, height, width]`` in [0, 1], a row each; of a pipeline of
        videos ``[B, frames, 3, height, width]``.
        """
        return self.family.decode(self.latents(cond, seed=seed))

    def latents(self, cond: Sequence[str] | Cond, *, seed: int = 0) -> Tensor:
        """Samples of the student ``[B, *S]``, from noise of the seed."""
        cond = self.cond(cond)
        rows = len(next(iter(cond.values())))
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(rows, *self.family.sample_shape, generator=generator)
        for role in ("aux", "student"):
            self.backbone.refresh(role)
        return self.distiller.generate(noise.to(self.family.device), cond)

    def save(self, folder: str | Path) -> list[Path]:
        """The student's files (``student.save_student``)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        base = self.family.pipe.config.get("_name_or_path") or type(self.family.pipe).__name__
        with self.distiller.averaged_student():
            return save_student(
                *(self.backbone.adapters, folder / STUDENT, self.family, self.sampler),
                base=base,
                teacher_lora=self.teacher_lora,
            )


def distillation(
    pipe: Any, *, scheduler: Any = None, vae: nn.Module | None = None, **options: Any
) -> Distillation:
    """Start distilling a pipeline, which is changed in place; nothing is trained yet.

    Args:
        pipe: any pipeline of ``family.FAMILIES``, on its device, or the transformer of one.  Text
            encoders may be None if ``cond`` and ``null`` are given, the VAE if no images are asked
            for.
        scheduler, vae: of the pipeline, beside a transformer; the VAE for images, and for FLUX.2.
        guidance: the teacher's scale, as the pipeline means it; its default if None.
        steps: of the student's sampler.
        rank: of the adapters.
        teacher_lora: a LoRA file, or files with their weights, that belong to the teacher; LoRAs
            that are active in the pipeline already do too.
        base: format that the network's blocks are kept in from now on, ``quantized.FORMATS``.
        height, width, frames, fps: of images, or of videos; the pipeline's default if None.
        cond, null: conditions of any prompt and the null condition's row, where the text encoders
            are gone.
        config: the method's settings; guidance and student_steps are those given here.
        targets, activation: as ``backbone_of`` takes them.
        compile: each kind of repeated block is compiled once for all of its kind.
        capture: as ``make_distiller`` takes it; families that read the device run eagerly.

    ``ValueError``: no flow model, no adapter for it, distilled already, a size that its latents
    cannot have, attention without a backward (``pipe.transformer.set_attention_backend``), nothing
    to compile with, or a diffusers that does not do what the adapter knows of it (``probe``).
    """
    if isinstance(pipe, nn.Module):
        pipe = pipeline_around(pipe, scheduler, vae)
    elif scheduler is not None or vae is not None:
        raise ValueError("scheduler and vae belong to a transformer; the pipeline has its own")
    return Distillation(pipe, **options)
