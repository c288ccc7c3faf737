"""Any diffusers pipeline with an adapter: its folder or hub id and prompts in, a LoRA file out."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Generator, Tensor

from mfd_fast.backbones.lanes import STUDENT as STUDENT_LANE
from mfd_fast.backbones.networks import names_of
from mfd_fast.backbones.shared import SharedBackbone
from mfd_fast.distill.distiller import Distiller
from mfd_fast.flow.integrate import generate
from mfd_fast.flow.times import Schedule
from mfd_fast.models.diffusers.backbone import backbone_of, teacher_samples
from mfd_fast.models.diffusers.card import write_card
from mfd_fast.models.diffusers.checkpoint import (
    CONFIGS,
    check_parts,
    load_pipeline,
    lora_files,
    merge_lora_files,
    networks,
    outline,
    read_index,
    same_lora,
    visiting,
)
from mfd_fast.models.diffusers.distillation import WITH_TEACHER
from mfd_fast.models.diffusers.family import Cond, Family, family_of
from mfd_fast.models.diffusers.presets import PipelineRun
from mfd_fast.models.diffusers.probe import probe
from mfd_fast.models.diffusers.record import record
from mfd_fast.models.diffusers.sampler import StudentSampler, student_sampler
from mfd_fast.models.diffusers.text import HostText
from mfd_fast.models.sana.lora_files import Lora, save_diffusers_lora
from mfd_fast.models.sana.text.prompts import Prompts, open_prompts
from mfd_fast.pictures.rows import image_rows
from mfd_fast.run.folder import STUDENT, RunFolder
from mfd_fast.run.task import Task, pictures

GRID = "samples_grid.png"
IMAGES = 4  # in a grid
SEED = 1
# Words in the names of published checkpoints that are students themselves.
DISTILLED = re.compile(r"schnell|turbo|lightning|sprint|distill|hyper|-?\d+-?steps?", re.IGNORECASE)


class PipelineTask(Task):
    """See ``run.task.Task``.

    ``config`` becomes what the run does: guidance as the engine means it, capture off where the
    family reads the device.
    """

    COLUMNS: ClassVar = (
        ("sampler", "name", "s"),
        ("NFE", "nfe", "d"),
        ("distance to teacher", "distance", ".3f"),
        ("latents/s", "latents_per_s", ".2f"),
    )

    def __init__(self, config: PipelineRun):
        super().__init__(config)
        self.settings = config.pipeline
        if not config.teacher:
            raise ValueError(
                "preset pipeline needs a model: mfd-fast distill MODEL --prompts FILE, MODEL the "
                "folder or hub id of a diffusers pipeline"
            )
        if config.distill.student_solver != "euler":
            raise ValueError(
                "distill.student_solver must be euler, the step of the pipelines' schedulers; got "
                f"{config.distill.student_solver!r}"
            )
        height, width = parse_resolution(self.settings.resolution)
        self.options = {"height": height, "width": width, "scale": self.settings.guidance}
        revision = self.settings.revision or None
        self.folder, self.index = read_index(config.teacher, revision, CONFIGS)
        self.is_local = Path(config.teacher).is_dir()
        self.gigabytes = check_parts(self.folder, self.index, is_local=self.is_local)
        if self.settings.teacher_lora:
            lora_files(self.settings.teacher_lora)
        outlined = family_of(outline(self.folder, self.index), **self.options)
        self.config = engine_config(config, outlined)
        self.shape = outlined.sample_shape
        self.teacher_lora: Lora | None = None  # read with the weights

    def check(self) -> dict[str, str]:
        name = self.index["_class_name"]
        size = f", {self.gigabytes:.3g} GB" if self.is_local else ""
        found = {
            "teacher": f"{self.config.teacher}, {name}{size}",
            "prompts": f"{self.settings.prompts}, {len(self.prompts):,} prompts, encoded once",
            "latents": " x ".join(map(str, self.shape)),
        }
        if self.settings.teacher_lora:
            found["teacher LoRA"] = self.settings.teacher_lora
        return found | pictures()

    def remarks(self, num_samples: int) -> list[str]:
        if word := DISTILLED.search(Path(self.config.teacher).name):
            return [
                f"the model's name has {word.group()!r} in it: a teacher that is distilled already "
                "has no guided samples to learn from; take its base checkpoint"
            ]
        return []

    def data(self) -> str:
        return self.prompts.digest

    def conditions(self) -> Callable[[int], Any]:
        return self.text.next_cond

    def backbone(self) -> SharedBackbone:
        probe(self.family, self._any_cond)
        _ = self.sampler  # asked of the pipeline while all of it is on the CPU
        self.family.pipe.transformer.to(self.device)
        return self._backbone

    def schedule(self) -> Schedule:
        return self.sampler.schedule

    @cached_property
    def family(self) -> Family:
        """The pipeline with its weights, the teacher's LoRA in them."""
        pipe = load_pipeline(
            self.config.teacher,
            getattr(torch, self.settings.dtype),
            revision=self.settings.revision or None,
            variant=self.settings.variant or None,
        )
        if self.settings.teacher_lora:
            self.teacher_lora = merge_lora_files(pipe, self.settings.teacher_lora)
        return family_of(pipe, **self.options)

    @cached_property
    def prompts(self) -> Prompts:
        """Of the run; ``ValueError`` or ``OSError`` names the file that is missing or broken."""
        settings = self.settings
        if not settings.prompts:
            raise ValueError("this run needs prompts: --prompts FILE (.tsv, .txt, .jsonl, a table)")
        key = settings.prompt_column or None
        return open_prompts(settings.prompts, key=key, skip_bad=settings.skip_bad)

    @cached_property
    def text(self) -> HostText:
        """The prompts encoded, once and before the training if the host's memory holds them."""
        distill, train = self.config.distill, self.config.train
        parts = networks(self.family.pipe)
        encoders = [x for name, x in parts.items() if name not in ("transformer", "vae")]
        return HostText(
            self.family,
            self.prompts,
            batch_size=train.batch_size,
            seed=distill.seed,
            num_updates=train.updates * (1 + distill.aux_updates),
            most_bytes=self.settings.text_memory * 1e9,
            device=self.device,
            encoders=partial(visiting, encoders, self.device),
        )

    @cached_property
    def sampler(self) -> StudentSampler:
        """The student's nodes, and what the pipeline needs for them; the pipeline is probed."""
        cond = self._any_cond
        probe(self.family, cond)
        return student_sampler(self.family, cond, self.config.distill.student_steps)

    @cached_property
    def teacher_schedule(self) -> Schedule:
        """The pipeline's own nodes at its own number of steps."""
        noise = torch.zeros(1, *self.shape, device=self.family.device)
        cond = {name: leaf.to(self.family.device) for name, leaf in self._any_cond.items()}
        steps = self.family.default("num_inference_steps")
        return record(self.family, cond, noise, steps).schedule

    def preview(self, distiller: Distiller, path: Path) -> None:
        captions, cond = self._grid(IMAGES)
        latents = distiller.generate(self._noise(len(captions), SEED), cond)
        name = f"student after {distiller.num_updates['student']} updates"
        image_rows({name: self._decoded(latents)}, path, captions=captions)

    def save_student(self, distiller: Distiller, path: Path) -> None:
        with distiller.averaged_student():
            lora = Lora.of(distiller.backbone.adapters, "student")
        factors = {name.removeprefix("transformer."): pair for name, pair in lora.factors.items()}
        lora, base = Lora(factors), self._base()
        files = {path: (lora, base)}
        if self.teacher_lora is not None:
            below = f"{base} with {self.settings.teacher_lora}"
            both = lora.stacked_on(self.teacher_lora)
            files = {path: (lora, below), path.with_name(WITH_TEACHER): (both, base)}
        for file, (content, below) in files.items():
            about = f"student of {below}, to be added to it at strength 1"
            save_diffusers_lora(content, file, description=about)
        if self.sampler.scheduler is not None:
            self.sampler.scheduler.save_pretrained(path.parent)
        weights = path.name if self.teacher_lora is None else WITH_TEACHER
        write_card(
            path.with_name("README.md"),
            base=base,
            weights=weights,
            pipeline=self.index["_class_name"],
            size=(self.family.height, self.family.width),
            sampler=self.sampler,
        )

    def evaluate(self, run: RunFolder, num_samples: int) -> list[dict[str, Any]]:
        """Teacher and student from the same noise and prompts.

        ``distance``: root mean square of the difference to the latents of the teacher at the
        pipeline's own number of steps, over that of these latents themselves.
        """
        self._load_student(run)
        rows, reference, batches = [], None, list(self._batches(num_samples))
        lanes = 2 if self.config.distill.guidance != 1.0 else 1
        for name, schedule in self._samplers().items():
            start = time.perf_counter()
            made = [self._latents(name, cond, noise, schedule) for cond, noise in batches]
            latents = torch.cat(made).cpu()
            seconds = time.perf_counter() - start
            reference = latents if reference is None else reference
            rows.append(
                {
                    "name": name,
                    "nfe": len(schedule.times) * (lanes if name.startswith("teacher") else 1),
                    "distance": float((latents - reference).norm() / reference.norm()),
                    "latents_per_s": num_samples / seconds,
                }
            )
        return rows

    def draw_pictures(self, run: RunFolder) -> list[Path]:
        self._load_student(run)
        captions, cond = self._grid(IMAGES)
        noise = self._noise(len(captions), SEED)
        images = {
            name: self._decoded(self._latents(name, cond, noise, schedule))
            for name, schedule in self._samplers().items()
        }
        image_rows(images, run / GRID, captions=captions)
        return [run / GRID, *super().draw_pictures(run)]

    def sample(
        self, run: RunFolder, path: Path, *, num: int, seed: int, prompts: Sequence[str] = ()
    ) -> None:
        self._load_student(run)
        captions, cond = self._grid(num or IMAGES)
        if prompts:
            captions = [prompts[i % len(prompts)] for i in range(max(num, len(prompts)))]
            cond = self.text.encode(captions)
        noise, steps = self._noise(len(captions), seed), self.config.distill.student_steps
        name = f"student, {steps} step{'s' * (steps != 1)}, seed {seed}"
        latents = self._latents("student", cond, noise, self.schedule())
        image_rows({name: self._decoded(latents)}, path, captions=captions)

    def export(self, run: RunFolder, out: Path) -> Path:
        self._load_student(run)
        pipe = self.family.pipe
        network = self._backbone.student_network().to("cpu")
        pipe.register_modules(transformer=network.transformer)
        if self.sampler.scheduler is not None:
            pipe.register_modules(scheduler=self.sampler.scheduler)
        pipe.save_pretrained(out)
        return out

    @cached_property
    def _backbone(self) -> SharedBackbone:
        settings, seed = self.settings, self.config.distill.seed
        return backbone_of(
            self.family,
            rank=settings.rank,
            alpha=settings.alpha,
            targets=names_of(settings.targets) if settings.targets else None,
            activation=self.config.train.activation,
            generator=Generator().manual_seed(seed),
        )

    @property
    def _any_cond(self) -> Cond:
        return {name: leaf[:1].cpu() for name, leaf in self.text.next_cond(0).items()}

    def _base(self) -> str:
        path = Path(self.config.teacher)
        return path.name if path.is_dir() else self.config.teacher

    def _load_student(self, run: RunFolder) -> None:
        """The adapter of the run's file, as its readers have it."""
        bank = self.backbone().adapters
        state = same_lora(load_file(run / STUDENT), bank.scale("student"))
        bank.load_adapter_state_dict("student", state, prefix="")

    def _samplers(self) -> dict[str, Schedule]:
        steps, most = self.config.distill.student_steps, len(self.teacher_schedule.times)
        return {
            f"teacher, {most} steps": self.teacher_schedule,
            f"teacher, {steps} steps": self.schedule(),
            f"student, {steps} steps": self.schedule(),
        }

    @torch.no_grad()
    def _latents(self, name: str, cond: Cond, noise: Tensor, schedule: Schedule) -> Tensor:
        """Samples ``[B, *S]`` of the sampler of this name."""
        backbone = self.backbone()
        if name.startswith("teacher"):
            return teacher_samples(backbone, cond, noise, schedule, self.config.distill.guidance)
        prepared = backbone.prepare(cond)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return backbone.forward(x[:, None], t, prepared, (STUDENT_LANE,))[:, 0]

        return generate(velocity, noise, steps=len(schedule.times), schedule=schedule)

    def _grid(self, num: int) -> tuple[list[str], Cond]:
        captions = self.prompts[:num]
        return captions, self.text.encode(captions)

    def _noise(self, num: int, seed: int) -> Tensor:
        """Standard normal ``[num, *S]``, the same on every device."""
        generator = Generator().manual_seed(seed)
        return torch.randn(num, *self.shape, generator=generator).to(self.device)

    def _batches(self, num: int):
        """Conditions of the run's first updates and noise, ``num`` samples in all."""
        for n, rows in enumerate(self._noise(num, SEED).split(self.config.train.batch_size)):
            cond = self.text.next_cond(n)
            yield {name: leaf[: len(rows)] for name, leaf in cond.items()}, rows

    def _decoded(self, latents: Tensor) -> Tensor:
        """uint8 images ``[B, 3, H, W]`` on the CPU, one at a time to save memory."""
        with visiting([self.family.pipe.vae], self.device):
            images = torch.cat([self.family.decode(row).cpu() for row in latents.split(1)])
        return (images.float() * 255).round().to(torch.uint8)


def parse_resolution(text: str) -> tuple[int | None, int | None]:
    """Height and width of HxW, or of one number for both; None where empty."""
    if not text:
        return None, None
    found = re.fullmatch(r"([1-9]\d{0,5})(?:[xX]([1-9]\d{0,5}))?", text)
    if not found:
        raise ValueError(
            f"pipeline.resolution must be HxW in pixels, such as 1024x768; got {text!r}"
        )
    return int(found.group(1)), int(found.group(2) or found.group(1))


def engine_config(config: PipelineRun, family: Family) -> PipelineRun:
    """The config with the guidance as the engine means it, and what the family cannot do off.

    ``ValueError`` for a guidance that was given in the engine's place, or ``train.capture on``.
    """
    distill, train = config.distill, config.train
    if distill.guidance not in (1.0, family.guidance):
        raise ValueError(
            f"distill.guidance follows from the pipeline's scale and must be {family.guidance:g} "
            f"here, got {distill.guidance:g}; give the scale with --guidance"
        )
    if family.reads_device:
        if train.capture == "on":
            raise ValueError(f"train.capture must be auto or off here: {family.reads_device}")
        train = replace(train, capture="off")
    return replace(config, distill=replace(distill, guidance=family.guidance), train=train)
