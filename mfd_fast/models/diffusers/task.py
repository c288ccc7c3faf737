"""Any diffusers pipeline with an adapter: its folder or hub id and prompts in, a LoRA file out."""

import re
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from mfd_fast.backbones.compiled import BACKEND, check_compiler
from mfd_fast.backbones.lanes import STUDENT as STUDENT_LANE
from mfd_fast.backbones.networks import names_of
from mfd_fast.backbones.quantized import check_format
from mfd_fast.backbones.shared import SharedBackbone
from mfd_fast.backbones.swap import BlockSwap
from mfd_fast.distill.distiller import Distiller
from mfd_fast.flow.integrate import generate
from mfd_fast.flow.times import Schedule
from mfd_fast.models.diffusers.attention import use_attention
from mfd_fast.models.diffusers.backbone import backbone_of, teacher_samples
from mfd_fast.models.diffusers.base import (
    check_host,
    chosen,
    describe,
    free_memory,
    quantized_network,
    swap_plan,
)
from mfd_fast.models.diffusers.checkpoint import (
    CONFIGS,
    check_parts,
    load_pipeline,
    lora_files,
    merge_lora_files,
    networks,
    outline,
    read_index,
    visiting,
)
from mfd_fast.models.diffusers.family import Cond, Family, family_of
from mfd_fast.models.diffusers.presets import PipelineRun
from mfd_fast.models.diffusers.probe import probe
from mfd_fast.models.diffusers.record import record
from mfd_fast.models.diffusers.sampler import StudentSampler, student_sampler
from mfd_fast.models.diffusers.shapes import (
    check_teacher,
    engine_config,
    options_of,
    why_eager,
)
from mfd_fast.models.diffusers.student import load_student, save_student
from mfd_fast.models.diffusers.text import HostText
from mfd_fast.models.diffusers.video import Video, in_tiles
from mfd_fast.models.sana.lora_files import Lora
from mfd_fast.models.sana.text.prompts import Prompts, open_prompts
from mfd_fast.pictures.rows import image_rows, write_samples
from mfd_fast.pictures.videos import no_mp4, video_rows
from mfd_fast.run.console import progress
from mfd_fast.run.folder import RunFolder
from mfd_fast.run.task import Task, pictures

GRID = "samples_grid.png"
IMAGES, VIDEOS = 4, 2  # in a grid
SEED = 1
# Words in the names of published checkpoints that are students themselves.
DISTILLED = re.compile(
    r"schnell|turbo|lightning|sprint|distill|nocfg|hyper|-?\d+-?steps?", re.IGNORECASE
)


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
        check_teacher(config)
        if config.distill.student_solver != "euler":
            raise ValueError(
                "distill.student_solver must be euler, the step of the pipelines' schedulers; got "
                f"{config.distill.student_solver!r}"
            )
        self.options = options_of(self.settings)
        revision = self.settings.revision or None
        self.folder, self.index = read_index(config.teacher, revision, CONFIGS)
        self.is_local = Path(config.teacher).is_dir()
        self.gigabytes = check_parts(self.folder, self.index, is_local=self.is_local)
        if self.settings.teacher_lora:
            lora_files(self.settings.teacher_lora)
        outlined = family_of(outline(self.folder, self.index), **self.options)
        asked = config.pipeline.base
        self.config = chosen(engine_config(config, outlined), self.device)
        self.settings = self.config.pipeline
        check_format(self.settings.base)
        self.plan = swap_plan(self.config, outlined)
        if self.plan is not None:
            check_host(self.plan)
        self.is_plain = self.settings.base == "bf16" and self.plan is None
        self.about_base = ""
        if asked == "auto" or not self.is_plain:
            self.about_base = describe(self.config, outlined, self.plan)
        if asked == "auto":
            self.about_base += f" (auto, {free_memory(self.device) / 1e9:.3g} GB free)"
        self.shape, self.why_eager = outlined.sample_shape, why_eager(self.config, outlined)
        self.fps = outlined.fps if isinstance(outlined, Video) else None
        self.num_shown = IMAGES if self.fps is None else VIDEOS
        self.teacher_lora: Lora | None = None  # read with the weights

    def check(self) -> dict[str, str]:
        name = self.index["_class_name"]
        size = f", {self.gigabytes:.3g} GB" if self.is_local else ""
        found = {
            "teacher": f"{self.config.teacher}, {name}{size}",
            "prompts": f"{self.settings.prompts}, {len(self.prompts):,} prompts, encoded once",
            "latents": " x ".join(map(str, self.shape)),
        }
        if self.why_eager:
            how = f"eager ({self.why_eager}), activations {self.config.train.activation}"
            found["step"] = how
        if self.about_base:
            found["base"] = self.about_base
        if self.settings.teacher_lora:
            found["teacher LoRA"] = self.settings.teacher_lora
        if self.fps is not None and no_mp4():
            found["videos"] = f"contact sheets alone: {no_mp4()}"
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
        parts = self.family.networks.values()
        for network in parts:
            attention = use_attention(network, self.settings.attention, device=self.device)
        self.used["attention"] = attention
        if self.settings.compile:
            check_compiler(self.device)
            self.used["compile"] = "each kind of block once, in its first calls"
        # Swapped or sharded, no card need hold the whole network.
        if self.plan is None and self.config.train.shard == "none":
            for network in parts:
                network.to(self.device)
        return self._backbone

    def schedule(self) -> Schedule:
        return self.sampler.schedule

    @cached_property
    def family(self) -> Family:
        """The pipeline with its weights, the teacher's LoRA in them."""
        own = {} if self.is_plain else quantized_network(self.config, self.index, self.device)
        pipe = load_pipeline(
            self.config.teacher,
            getattr(torch, self.settings.dtype),
            revision=self.settings.revision or None,
            variant=self.settings.variant or None,
            **own,
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
        others = {*self.family.networks, "vae", "safety_checker"}
        encoders = [x for name, x in parts.items() if name not in others]
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
        captions, cond = self._grid(self.num_shown)
        latents = distiller.generate(self.noise(len(captions), SEED), cond)
        name = f"student after {distiller.num_updates['student']} updates"
        self._draw({name: latents}, path, captions)

    def save_student(self, distiller: Distiller, path: Path) -> None:
        with distiller.averaged_student():
            save_student(
                *(distiller.backbone.adapters, path, self.family, self.sampler),
                base=self.config.teacher,
                teacher_lora=self.teacher_lora,
                teacher_files=self.settings.teacher_lora,
            )

    def evaluate(self, run: RunFolder, num_samples: int) -> list[dict[str, Any]]:
        """Teacher and student from the same noise and prompts.

        ``distance``: root mean square of the difference to the latents of the teacher at the
        pipeline's own number of steps, over that of these latents themselves.
        """
        self._load_student(run)
        rows, reference, batches = [], None, list(self._batches(num_samples))
        lanes = 2 if self.config.distill.guidance != 1.0 else 1
        for name, schedule in progress(self._samplers().items(), "evaluating"):
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
        captions, cond = self._grid(self.num_shown)
        noise = self.noise(len(captions), SEED)
        latents = {
            name: self._latents(name, cond, noise, schedule)
            for name, schedule in self._samplers().items()
        }
        self._draw(latents, run / GRID, captions)
        return [run / GRID, *super().draw_pictures(run)]

    def sample(
        self, run: RunFolder, path: Path, *, num: int, seed: int, prompts: Sequence[str] = ()
    ) -> None:
        if self.fps is not None and no_mp4():
            raise ImportError(no_mp4())
        self._load_student(run)
        captions, cond = self._grid(num or self.num_shown)
        if prompts:
            captions = [prompts[i % len(prompts)] for i in range(max(num, len(prompts)))]
            cond = self.text.encode(captions)
        noise, steps = self.noise(len(captions), seed), self.config.distill.student_steps
        name = f"student, {steps} step{'s' * (steps != 1)}, seed {seed}"
        latents = self._latents("student", cond, noise, self.schedule())
        if self.fps is not None:
            self._draw({name: latents}, path, captions)
            return
        rows = {name: self._decoded(latents)}
        write_samples(rows[name], path, partial(image_rows, rows, path, captions=captions))

    def export(self, run: RunFolder, out: Path) -> Path:
        if not self.is_plain:  # the student goes into the weights as they lie in their files
            plain = replace(self.settings, base="bf16", base_memory=0.0)
            return type(self)(replace(self.config, pipeline=plain)).export(run, out)
        self._load_student(run)
        pipe = self.family.pipe
        network = self._backbone.student_network().to("cpu")
        pipe.register_modules(**{name: getattr(network, name) for name in self.family.networks})
        if self.sampler.scheduler is not None:
            pipe.register_modules(scheduler=self.sampler.scheduler)
        pipe.save_pretrained(out)
        return out

    @cached_property
    def _backbone(self) -> SharedBackbone:
        settings, seed = self.settings, self.config.distill.seed
        backbone = backbone_of(
            self.family,
            rank=settings.rank,
            alpha=settings.alpha,
            targets=names_of(settings.targets) if settings.targets else None,
            activation=self.config.train.activation,
            compiler=BACKEND if settings.compile else None,
            generator=Generator().manual_seed(seed),
            prepares=self.config.train.shard == "none",
        )
        if self.plan is not None:
            backbone.adapters.to(self.device)
            backbone.swap = BlockSwap(backbone.network, self.plan, self.device)
        return backbone

    @property
    def _any_cond(self) -> Cond:
        return {name: leaf[:1].cpu() for name, leaf in self.text.next_cond(0).items()}

    def _load_student(self, run: RunFolder) -> None:
        """The adapter of the run's file, as its readers have it."""
        bank = self.backbone().adapters
        state = load_student(run.path, self.family, bank.scale("student"))
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

    def noise(self, num: int, seed: int) -> Tensor:
        """Standard normal ``[num, *S]``, the same on every device."""
        generator = Generator().manual_seed(seed)
        return torch.randn(num, *self.shape, generator=generator).to(self.device)

    def _batches(self, num: int):
        """Conditions of the run's first updates and noise, ``num`` samples in all."""
        for n, rows in enumerate(self.noise(num, SEED).split(self.config.train.batch_size)):
            cond = self.text.next_cond(n)
            yield {name: leaf[: len(rows)] for name, leaf in cond.items()}, rows

    def _draw(self, latents: dict[str, Tensor], path: Path, captions: list[str]) -> None:
        """What the latents of every name are, as a picture, and of videos as MP4 files too."""
        made = {name: self._decoded(rows) for name, rows in latents.items()}
        if self.fps is None:
            image_rows(made, path, captions=captions)
        else:
            video_rows(made, path, captions=captions, fps=self.fps)

    def _decoded(self, latents: Tensor) -> Tensor:
        """uint8 images ``[B, 3, H, W]`` or videos ``[B, F, 3, H, W]`` on the CPU, one at a time and
        videos by tiles to save memory.
        """
        vae = self.family.pipe.vae
        with visiting([vae], self.device), in_tiles(vae) if self.fps else nullcontext():
            made = [self.family.decode(row).cpu() for row in latents.split(1)]
        return torch.cat([(x.float() * 255).round().to(torch.uint8) for x in made])
