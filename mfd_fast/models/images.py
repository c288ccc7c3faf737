"""What small image models share: full copies of a network that knows its sizes; samples; grids."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from mfd_fast.backbones.lanes import CopiedBackbone
from mfd_fast.baselines.objectives import needs_of
from mfd_fast.baselines.sampling import StudentSampler
from mfd_fast.baselines.second_time import with_second_time
from mfd_fast.distill.config import DistillConfig
from mfd_fast.distill.distiller import Distiller
from mfd_fast.flow.integrate import generate, guided
from mfd_fast.flow.solvers import EVALUATIONS_PER_STEP
from mfd_fast.run.config import RunConfig
from mfd_fast.run.folder import STUDENT, RunFolder
from mfd_fast.run.task import Task, pictures

Sampler = Callable[[Tensor, Tensor], Tensor]

EVALUATION_SEED = 1
SEED_STRIDE = 1_000_003  # between the conditions of two seeds; above the updates of any run
GRID_COLUMNS = 10
SAMPLES = 40
BATCH_SIZE = 500
WARMUP_SAMPLES = 10


@dataclass(frozen=True)
class TeacherSampler:
    """``sampler(noise, cond) -> images`` of a network: equal solver steps, optional guidance."""

    model: nn.Module
    steps: int
    guidance: float = 1.0
    solver: str = "euler"

    @property
    def nfe(self) -> int:
        """Network evaluations of one sample; guidance doubles them, and so does Heun's solver."""
        passes = 1 if self.guidance == 1.0 else 2
        return self.steps * passes * EVALUATIONS_PER_STEP[self.solver]

    def __call__(self, noise: Tensor, cond: Tensor) -> Tensor:
        """Images like ``noise`` ``[B, C, H, W]``."""
        velocity = guided(lambda x, t: self.model(x, t, cond), self.model, self.guidance)
        return generate(velocity, noise, steps=self.steps, solver=self.solver)


class ImageTask(Task):
    """A network with a config of ``channels`` and ``image_size`` that fits three times.

    A family gives what is left open below, and ``evaluate``.
    """

    TITLE: ClassVar[str]
    NO_PROMPTS: ClassVar[str]
    load: ClassVar[Callable[[str | Path], nn.Module]]
    save: ClassVar[Callable[[nn.Module, Path, Mapping[str, Any]], None]]
    null_cond: ClassVar[Callable[[Any], Any] | None] = None

    def __init__(self, config: RunConfig):
        super().__init__(config)
        self.teacher = self.load_teacher().to(self.device)
        sizes = self.teacher.config
        self.shape = (sizes.channels, sizes.image_size, sizes.image_size)

    def load_teacher(self) -> nn.Module:
        """In eval mode, on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} must define load_teacher")

    def files(self) -> dict[str, str]:
        """What :meth:`check` finds besides the teacher."""
        return {}

    def condition(self, num: int) -> Tensor:
        """Balanced conditions of ``num`` samples."""
        raise NotImplementedError(f"{type(self).__name__} must define condition")

    def drawn(self, batch: int) -> Callable[[Generator], Any]:
        """Draws the condition of an update."""
        raise NotImplementedError(f"{type(self).__name__} must define drawn")

    def drawn_with_data(self, batch: int) -> Callable[[Generator], tuple[Tensor, Any]]:
        """Draws (images, their conditions)."""
        raise NotImplementedError(f"{type(self).__name__} must define drawn_with_data")

    def check(self) -> dict[str, str]:
        size = sum(parameter.numel() for parameter in self.teacher.parameters())
        name = self.config.teacher or "packaged with mfd-fast"
        return {"teacher": f"{name}, {size:,} parameters", **self.files(), **pictures()}

    def backbone(self) -> CopiedBackbone:
        return full_copies(self.teacher, self.config.distill, self.null_cond)

    def conditions(self) -> Callable[[int], Any]:
        draw = self.drawn_with_data if self.uses_data else self.drawn
        seed, draw = self.config.distill.seed, draw(self.config.train.batch_size)
        return lambda n: draw(Generator().manual_seed(seed * SEED_STRIDE + n))

    def preview(self, distiller: Distiller, path: Path) -> None:
        done = distiller.num_updates["student"]
        self.draw_grid({"student": distiller.generate}, path, f"after {done} student updates")

    def save_student(self, distiller: Distiller, path: Path) -> None:
        distill = self.config.distill
        about = {"steps": distill.student_steps, "solver": distill.student_solver}
        with distiller.averaged_student():
            type(self).save(distiller.backbone.student, path, about)

    def shown(self, run: RunFolder) -> dict[str, Sampler]:
        """The rows of a finished run's grid."""
        raise NotImplementedError(f"{type(self).__name__} must define shown")

    def draw_pictures(self, run: RunFolder) -> list[Path]:
        path = run / "samples_grid.png"
        self.draw_grid(self.shown(run), path, f"{self.config.distill.objective}, {self.TITLE}")
        return [path, *super().draw_pictures(run)]

    def sample(self, run: RunFolder, path: Path, *, num: int, seed: int, prompts=()) -> None:
        if prompts:
            raise ValueError(f"{self.NO_PROMPTS}; drop --prompt")
        num = num or SAMPLES
        with torch.no_grad():
            rows = {
                name: sampler(*self.noise(num, seed))
                for name, sampler in self.student_sampler(run).items()
            }
        from mfd_fast.pictures.grids import sample_grid
        from mfd_fast.pictures.rows import write_samples

        (images,), title = rows.values(), f"{num} samples, seed {seed}"
        write_samples(images, path, lambda: sample_grid(rows, path, title=title))

    def usage(self, base: str) -> str:
        module, load = type(self).load.__module__, type(self).load.__name__
        return f'from {module} import {load}\n\nstudent = {load}("{STUDENT}")'

    @property
    def uses_data(self) -> bool:
        """Whether the objective takes samples of the data."""
        return needs_of(self.config.distill).uses_data

    def noise(self, num: int, seed: int) -> tuple[Tensor, Tensor]:
        """Noise ``[num, C, H, W]``, the same on every device, and its conditions."""
        noise = torch.randn(num, *self.shape, generator=Generator().manual_seed(seed))
        return noise.to(self.device), self.condition(num)

    @torch.no_grad()
    def draw_grid(
        self,
        samplers: Mapping[str, Sampler],
        path: Path,
        title: str,
        *,
        num: int = GRID_COLUMNS,
        seed: int = EVALUATION_SEED,
    ) -> None:
        """A picture with a row for every sampler, all from the same noise."""
        from mfd_fast.pictures.grids import sample_grid

        noise, cond = self.noise(num, seed)
        rows = {name: sampler(noise, cond) for name, sampler in samplers.items()}
        sample_grid(rows, path, title=title)

    def student_sampler(self, run: RunFolder) -> dict[str, StudentSampler]:
        """The student of a finished run, by its name in table and pictures."""
        distill = self.config.distill
        model = type(self).load(run / STUDENT).to(self.device)
        name = sampler_name("student", distill.student_steps)
        return {name: StudentSampler(model, distill, needs_of(distill).sampler)}


def full_copies(
    teacher: nn.Module, config: DistillConfig, null_cond: Callable[[Any], Any] | None = None
) -> CopiedBackbone:
    """Three full copies; the student takes a second time if the objective asks for one."""
    sizes, has_second = teacher.config, needs_of(config).second_time
    return CopiedBackbone(
        teacher,
        student=with_second_time(teacher) if has_second else None,
        sample_shape=(sizes.channels, sizes.image_size, sizes.image_size),
        null_cond=null_cond,
    )


def sampler_name(role: str, steps: int) -> str:
    """How tables and pictures call a sampler, ``"teacher, 50 steps"``."""
    return f"{role}, {steps} step{'' if steps == 1 else 's'}"


def draw_images(sampler: Sampler, noise: Tensor, cond: Tensor) -> tuple[Tensor, float]:
    """Images clamped to [-1, 1], and the seconds that sampling took after a small warm-up."""
    batches = list(zip(noise.split(BATCH_SIZE), cond.split(BATCH_SIZE), strict=True))
    sampler(noise[:WARMUP_SAMPLES], cond[:WARMUP_SAMPLES])
    _finish(noise.device)
    start = time.perf_counter()
    images = torch.cat([sampler(*batch) for batch in batches])
    _finish(noise.device)
    return images.clamp(-1, 1), time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
