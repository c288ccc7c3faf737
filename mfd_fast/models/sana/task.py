"""The SANA presets: a diffusers checkpoint, LoRA adapters, prompts in, a LoRA file out."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from mfd_fast.backbones.shared import SharedBackbone
from mfd_fast.distill.distiller import Distiller
from mfd_fast.flow.integrate import generate, guided
from mfd_fast.flow.times import Schedule
from mfd_fast.models.sana.backbone import sana_backbone
from mfd_fast.models.sana.decoder import LatentDecoder, check_decoder
from mfd_fast.models.sana.embeddings import TIMESTEPS
from mfd_fast.models.sana.loading import (
    check_sana_transformer,
    load_sana_transformer,
    read_checkpoint_json,
)
from mfd_fast.models.sana.lora_files import (
    Lora,
    merge_lora,
    read_lora,
    save_comfyui_lora,
    save_diffusers_lora,
)
from mfd_fast.models.sana.merged import save_merged
from mfd_fast.models.sana.network import SanaNetwork
from mfd_fast.models.sana.presets import SanaRun
from mfd_fast.models.sana.sampler import SOLVER, load_schedule
from mfd_fast.models.sana.scores import COLUMNS as SCORE_COLUMNS
from mfd_fast.models.sana.scores import SanaScores
from mfd_fast.models.sana.text.source import SanaText
from mfd_fast.pictures.rows import image_rows, write_samples
from mfd_fast.run.console import progress
from mfd_fast.run.folder import STUDENT, RunFolder
from mfd_fast.run.table import markdown_table
from mfd_fast.run.task import Task, pictures

WITH_TEACHER = "student_with_teacher_lora.safetensors"
COMFYUI = "{}_comfyui.safetensors"  # beside either
GRID = "samples_grid.png"
TEACHER_STEPS = 20  # SanaPipeline's own default
IMAGES = 4  # in a grid
SEED = 1

# Column of the printed table: title, key of the row, format.
COLUMNS = (
    ("sampler", "name", "s"),
    ("NFE", "nfe", "d"),
    ("distance to teacher", "distance", ".3f"),
    ("latents/s", "latents_per_s", ".2f"),
)


class SanaTask(Task):
    """See ``run.task.Task``."""

    def __init__(self, config: SanaRun):
        super().__init__(config)
        self.settings = config.sana
        revision, variant = config.sana.revision or None, config.sana.variant or None
        self.revision, self.which = revision, {"revision": revision, "variant": variant}
        self.checkpoint = config.teacher or self._random_checkpoint()
        self.dtype = getattr(torch, self.settings.dtype)
        self.schedule_of = load_schedule(self.checkpoint, self.revision)
        if config.distill.student_solver != SOLVER:
            raise ValueError(
                f"distill.student_solver must be {SOLVER}, the sampler that SANA checkpoints ship; "
                f"got {config.distill.student_solver!r}"
            )
        self.teacher_lora = (
            read_lora(self.settings.teacher_lora) if self.settings.teacher_lora else None
        )
        path = "transformer/config.json"
        self.transformer = read_checkpoint_json(self.checkpoint, path, self.revision)
        channels = int(self.transformer["caption_channels"])
        self.text = SanaText(config, self.checkpoint, channels=channels, device=self.device)

    def check(self) -> dict[str, str]:
        files = check_sana_transformer(self.checkpoint, **self.which)
        size = sum(path.stat().st_size for path in files) / 1e9
        where = self.config.teacher or "random weights"
        found = {
            "teacher": f"{where}, {len(files)} weight file(s), {size:.3g} GB",
            "prompts": self.text.check(),
            "latents": " x ".join(map(str, self.sample_shape)),
        }
        if self.teacher_lora is not None:
            layers = len(self.teacher_lora.factors)
            found["teacher LoRA"] = f"{self.settings.teacher_lora}, {layers} layers"
        decoder = partial(check_decoder, self.checkpoint, **self.which)
        return found | pictures(decoder, self.text.check_grid)

    def data(self) -> str:
        return self.text.digest

    def backbone(self) -> SharedBackbone:
        shape, null = self.sample_shape, self.text.null_cond
        return sana_backbone(self._network(), self.config, sample_shape=shape, null_cond=null)

    def schedule(self) -> Schedule:
        return self.schedule_of(self.config.distill.student_steps)

    def conditions(self) -> Callable[[int], Any]:
        """Embeddings and mask of the prompts, ``{"text": [B, L, C], "mask": [B, L]}``."""
        return self.text.conditions.next_cond

    @cached_property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape of the latents: the checkpoint's own, or that of ``sana.resolution``."""
        size = int(self.transformer["sample_size"])
        if self.settings.resolution:
            vae = read_checkpoint_json(self.checkpoint, "vae/config.json", self.revision)
            shrinks = 2 ** (len(vae["encoder_block_out_channels"]) - 1)
            size, rest = divmod(self.settings.resolution, shrinks)
            if rest or size < 1:
                raise ValueError(
                    f"sana.resolution must be a multiple of {shrinks}, got "
                    f"{self.settings.resolution}"
                )
        return int(self.transformer["in_channels"]), size, size

    def save_student(self, distiller: Distiller, path: Path) -> None:
        with distiller.averaged_student():
            lora = Lora.of(distiller.backbone.adapters, "student")
        base = Path(self.checkpoint).name if Path(self.checkpoint).is_dir() else self.checkpoint
        if self.teacher_lora is None:
            files = {path: (lora, base)}
        else:
            with_lora = f"{base} with {Path(self.settings.teacher_lora).name}"
            both = lora.stacked_on(self.teacher_lora)
            files = {path: (lora, with_lora), path.with_name(WITH_TEACHER): (both, base)}
        steps = self.config.distill.student_steps
        for file, (content, below) in files.items():
            what = "student" if content is lora else "student and teacher LoRA"
            about = f"{what} ({steps} steps, guidance 1), to be added to {below} at strength 1"
            save_diffusers_lora(content, file, description=about)
            comfyui = file.with_name(COMFYUI.format(file.stem))
            save_comfyui_lora(content, comfyui, description=about)

    def evaluate(
        self,
        run: RunFolder,
        num_samples: int,
        sources: Mapping[str, str] | None = None,
        prompts: str = "",
    ) -> list[dict[str, Any]]:
        """Teacher at 20 steps and the student from the same noise and prompts.

        ``distance``: root mean square of the difference to the teacher's latents, over that of the
        teacher's latents themselves.

        Args:
            run: with the student.
            num_samples: of each.
            sources: models of the scores that go into the rows, as ``SanaScores`` takes them.
            prompts: file of the prompts, for a run from a store.
        """
        scores, captions = None, []
        if sources:
            captions = self.text.captions(num_samples, prompts)
            scores = SanaScores(sources, device=self.device)
        guidance, steps = self.config.distill.guidance, self.config.distill.student_steps
        samplers = {
            f"teacher, {TEACHER_STEPS} steps": (None, TEACHER_STEPS, guidance),
            f"student, {steps} steps": (read_lora(run / STUDENT), steps, 1.0),
        }
        rows, reference = [], None
        batches = list(self._batches(num_samples))  # encoding is not part of the time
        for name, (lora, k, scale) in progress(samplers.items(), "evaluating"):
            network = self._network(lora)  # one at a time on the device
            start = time.perf_counter()
            latents = [self._latents(network, cond, noise, k, scale) for cond, noise in batches]
            latents = torch.cat(latents).cpu()
            seconds = time.perf_counter() - start
            reference = latents if reference is None else reference
            rows.append(
                {
                    "name": name,
                    "nfe": k * (2 if scale != 1.0 else 1),
                    "distance": float((latents - reference).norm() / reference.norm()),
                    "latents_per_s": num_samples / seconds,
                }
            )
            if scores is not None:
                rows[-1] |= scores.row(self._decoded({name: latents})[name], captions)
        return rows

    def format_table(self, rows: list[dict[str, Any]]) -> str:
        scored = all(key in rows[0] for _, key, _ in SCORE_COLUMNS)
        return markdown_table(rows, (*COLUMNS, *SCORE_COLUMNS) if scored else COLUMNS)

    def draw_pictures(self, run: RunFolder) -> list[Path]:
        captions, cond = self.text.grid(IMAGES)
        noise = self._noise(len(captions), SEED)
        steps, scale = self.config.distill.student_steps, self.config.distill.guidance
        network = self._network()
        latents = {
            f"teacher, {k} steps": self._latents(network, cond, noise, k, scale)
            for k in (TEACHER_STEPS, steps)
        }
        network = self._network(read_lora(run / STUDENT))
        latents[f"student, {steps} steps"] = self._latents(network, cond, noise, steps, 1.0)
        image_rows(self._decoded(latents), run / GRID, captions=captions)
        return [run / GRID, *super().draw_pictures(run)]

    def preview(self, distiller: Distiller, path: Path) -> None:
        """A grid of the student as it is now; between updates, never inside one."""
        captions, cond = self.text.grid(IMAGES)
        latents = distiller.generate(self._noise(len(captions), SEED), cond)
        name = f"student after {distiller.num_updates['student']} updates"
        image_rows(self._decoded({name: latents}), path, captions=captions)

    def sample(
        self, run: RunFolder, path: Path, *, num: int, seed: int, prompts: Sequence[str] = ()
    ) -> None:
        if prompts:
            captions = [prompts[i % len(prompts)] for i in range(max(num, len(prompts)))]
            cond = self.text.encode(captions)
        else:
            captions, cond = self.text.grid(num or IMAGES)
        steps, noise = self.config.distill.student_steps, self._noise(len(captions), seed)
        network = self._network(read_lora(run / STUDENT))
        latents = self._latents(network, cond, noise, steps, 1.0)
        name = f"student, {steps} step{'s' * (steps != 1)}, seed {seed}"
        rows = self._decoded({name: latents})
        write_samples(rows[name], path, partial(image_rows, rows, path, captions=captions))

    def usage(self, base: str) -> str:
        steps = self.config.distill.student_steps
        weights = STUDENT if self.teacher_lora is None else WITH_TEACHER
        return (
            "import torch\nfrom diffusers import SanaPipeline\n\n"
            f'pipe = SanaPipeline.from_pretrained("{base}", torch_dtype=torch.bfloat16)\n'
            'pipe.to("cuda")\n'
            f'pipe.load_lora_weights(".", weight_name="{weights}")  # "." is this folder\n'
            f'image = pipe("a prompt", num_inference_steps={steps}, guidance_scale=1.0).images[0]'
        )

    def export(self, run: RunFolder, out: Path) -> Path:
        network = self._network(read_lora(run / STUDENT))
        return save_merged(network, self.transformer, out, base=self.checkpoint, **self.which)

    def _random_checkpoint(self) -> str:
        """What ``sana-tiny`` distils: random weights, the same in every run."""
        from mfd_fast.models.sana.tiny import make_tiny_checkpoint

        self._folder = tempfile.TemporaryDirectory()  # removed with the task
        return str(make_tiny_checkpoint(self._folder.name))

    def _network(self, student: Lora | None = None) -> SanaNetwork:
        """The teacher's network, or the student's with its LoRA merged into the weights."""
        network = load_sana_transformer(
            self.checkpoint,
            **self.which,
            dtype=self.dtype,
            device=self.device,
            time_table=self.config.distill.grid == TIMESTEPS,
        )
        for lora in (self.teacher_lora, student):
            if lora is not None:
                merge_lora(network, lora)
        return network

    def _noise(self, num: int, seed: int) -> Tensor:
        """Standard normal ``[num, C, h, w]``, the same on every device."""
        generator = Generator().manual_seed(seed)
        return torch.randn(num, *self.sample_shape, generator=generator).to(self.device)

    def _batches(self, num: int):
        """Conditions of the run's first updates and noise, ``num`` samples in all."""
        noise, batch = self._noise(num, SEED), self.config.train.batch_size
        for n, rows in enumerate(noise.split(batch)):
            cond = self.text.next_cond(n)
            yield {name: leaf[: len(rows)] for name, leaf in cond.items()}, rows

    @torch.no_grad()
    def _latents(
        self, network: SanaNetwork, cond: Any, noise: Tensor, steps: int, guidance: float
    ) -> Tensor:
        """Latents ``[B, C, h, w]`` float32 by the checkpoint's sampler; text prepared once."""
        prepared = network.prepare(cond)
        null = network.prepare(self.text.null_cond(cond)) if guidance != 1.0 else prepared

        def velocity_of(rows):
            return lambda x, t: network(x.to(self.dtype), t, rows).float()

        velocity = guided(velocity_of(prepared), velocity_of(null), guidance)
        schedule = self.schedule_of(steps)
        return generate(velocity, noise, steps=steps, solver=SOLVER, schedule=schedule)

    def _decoded(self, latents: dict[str, Tensor]) -> dict[str, Tensor]:
        decode = LatentDecoder(self.checkpoint, **self.which, device=self.device)
        return {name: decode(rows) for name, rows in latents.items()}
