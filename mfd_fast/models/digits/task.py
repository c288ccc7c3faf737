"""The ``digits`` preset: the packaged 8x8 class-conditional DiT, distilled into few steps."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from mfd_fast.backbones.activation import apply_activation_policy
from mfd_fast.backbones.lanes import CopiedBackbone
from mfd_fast.baselines.objectives import needs_of
from mfd_fast.baselines.sampling import StudentSampler
from mfd_fast.baselines.second_time import with_second_time
from mfd_fast.distill.distiller import Distiller
from mfd_fast.flow.solvers import to_device
from mfd_fast.metrics.image_features import few_samples
from mfd_fast.models.digits.classifier import NUM_CLASSES, NUM_FEATURES
from mfd_fast.models.digits.data import load_digits
from mfd_fast.models.digits.dit import load_dit, save_dit
from mfd_fast.models.digits.evaluate import (
    TEACHER_STEPS,
    draw_noise,
    evaluate_digits,
    format_table,
    sampler_name,
    teacher_samplers,
)
from mfd_fast.models.digits.teacher import load_classifier, load_teacher
from mfd_fast.run.config import RunConfig
from mfd_fast.run.device import pick_device
from mfd_fast.run.folder import STUDENT, RunFolder
from mfd_fast.run.task import pictures

EVALUATION_SEED = 1
SEED_STRIDE = 1_000_003  # between the label streams of two seeds; above the updates of any run
GRID_COLUMNS = 10
SAMPLES = 40
BLOCKS = r"blocks\.\d+"


class DigitsTask:
    """See ``tasks.base.Task``."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.device = pick_device(config.train.device)
        self.teacher = load_teacher(config.teacher or None).to(self.device)

    def check(self) -> dict[str, str]:
        size = sum(parameter.numel() for parameter in self.teacher.parameters())
        name = self.config.teacher or "packaged with mfd-fast"
        load_digits()  # what samples are compared with
        return {"teacher": f"{name}, {size:,} numbers", **pictures()}

    def data(self) -> str:
        return ""

    def remarks(self, num_samples: int) -> list[str]:
        return few_samples(num_samples, NUM_FEATURES)

    def backbone(self) -> CopiedBackbone:
        shape = (self.teacher.config.channels, *(self.teacher.config.image_size,) * 2)
        null = self.teacher.config.num_classes
        takes_second_time = needs_of(self.config.distill).second_time
        backbone = CopiedBackbone(
            self.teacher,
            student=with_second_time(self.teacher) if takes_second_time else None,
            sample_shape=shape,
            null_cond=lambda label: torch.full_like(label, null),
        )
        apply_activation_policy(backbone.student, self.config.train.activation, BLOCKS)
        return backbone

    def conditions(self) -> Callable[[int], Any]:
        """Uniform labels ``[B]`` int64; for an objective that uses data, (digits, their labels)."""
        if needs_of(self.config.distill).uses_data:
            return self._examples()
        batch, classes = self.config.train.batch_size, self.teacher.config.num_classes
        seed = self.config.distill.seed

        def next_cond(n: int) -> Tensor:
            generator = Generator().manual_seed(seed * SEED_STRIDE + n)
            labels = torch.randint(classes, (batch,), generator=generator)
            return to_device(labels, self.device)

        return next_cond

    def _examples(self) -> Callable[[int], tuple[Tensor, Tensor]]:
        images, labels = (part.to(self.device) for part in load_digits())
        batch, seed = self.config.train.batch_size, self.config.distill.seed

        def next_cond(n: int) -> tuple[Tensor, Tensor]:
            generator = Generator().manual_seed(seed * SEED_STRIDE + n)
            rows = to_device(torch.randint(len(images), (batch,), generator=generator), self.device)
            return images[rows], labels[rows]

        return next_cond

    def schedule(self) -> None:
        return None

    def preview(self, distiller: Distiller, path: Path) -> None:
        from mfd_fast.pictures.grids import sample_grid

        noise, labels = self._grid_noise(GRID_COLUMNS, EVALUATION_SEED)
        images = distiller.generate(noise, labels)
        done = distiller.num_updates["student"]
        sample_grid({"student": images}, path, title=f"after {done} student updates")

    def save_student(self, distiller: Distiller, path: Path) -> None:
        with distiller.averaged_student():
            save_dit(
                distiller.backbone.student,
                path,
                {
                    "steps": self.config.distill.student_steps,
                    "solver": self.config.distill.student_solver,
                },
            )

    def evaluate(self, run: RunFolder, num_samples: int) -> list[dict[str, Any]]:
        samplers = teacher_samplers(
            self.teacher, self.config.distill.guidance
        ) | self._student_sampler(run)
        return evaluate_digits(
            samplers,
            classifier=load_classifier().to(self.device),
            reference=sampler_name("teacher", TEACHER_STEPS[0]),
            num_samples=num_samples,
            seed=EVALUATION_SEED,
        )

    def format_table(self, rows: list[dict[str, Any]]) -> str:
        return format_table(rows)

    def draw_pictures(self, run: RunFolder) -> list[Path]:
        from mfd_fast.pictures.grids import sample_grid, training_curves

        noise, labels = self._grid_noise(GRID_COLUMNS, EVALUATION_SEED)
        teacher, student = (
            teacher_samplers(self.teacher, self.config.distill.guidance),
            self._student_sampler(run),
        )
        shown = {
            "teacher, 1 step": teacher[sampler_name("teacher", 1)],
            next(iter(student)): next(iter(student.values())),
            "teacher, 50 steps": teacher[sampler_name("teacher", 50)],
        }
        with torch.no_grad():
            rows = {name: sampler(noise, labels) for name, sampler in shown.items()}
        paths = [run / "samples_grid.png", run / "training_curves.png"]
        sample_grid(
            {"noise": noise} | rows, paths[0], title=f"{self.config.distill.objective}, digits"
        )
        training_curves(run.history(), paths[1])
        return paths

    def sample(
        self, run: RunFolder, path: Path, *, num: int, seed: int, prompts: Sequence[str] = ()
    ) -> None:
        from mfd_fast.pictures.grids import sample_grid

        if prompts:
            raise ValueError("digits have classes, not prompts; drop --prompt")
        num = num or SAMPLES
        noise, labels = self._grid_noise(num, seed)
        name, sampler = next(iter(self._student_sampler(run).items()))
        with torch.no_grad():
            images = sampler(noise, labels)
        sample_grid({name: images}, path, title=f"{num} samples, seed {seed}")

    def export(self, run: RunFolder, out: Path) -> Path:
        raise ValueError(f"{run / STUDENT} is a full checkpoint already; copy it")

    def _grid_noise(self, num: int, seed: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(num, device=self.device) % NUM_CLASSES
        return draw_noise(num, seed, self.device), labels

    def _student_sampler(self, run: RunFolder) -> dict[str, StudentSampler]:
        distill = self.config.distill
        model = load_dit(run / STUDENT).to(self.device).eval()
        name = sampler_name("student", distill.student_steps)
        return {name: StudentSampler(model, distill, needs_of(distill).sampler)}
