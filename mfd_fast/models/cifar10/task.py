"""The ``cifar10`` preset: an unconditional UNet teacher, distilled into few steps (paper D.1)."""

from collections.abc import Callable, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from mfd_fast.backbones.lanes import CopiedBackbone
from mfd_fast.baselines.objectives import needs_of
from mfd_fast.baselines.sampling import StudentSampler
from mfd_fast.baselines.second_time import with_second_time
from mfd_fast.distill.distiller import Distiller
from mfd_fast.flow.solvers import to_device
from mfd_fast.metrics.image_features import FEATURES, distribution_scores, few_samples
from mfd_fast.models.cifar10.data import load_cifar10, to_unit_range
from mfd_fast.models.cifar10.unet import load_unet, save_unet
from mfd_fast.models.digits.evaluate import DiTSampler, Sampler, draw_images, sampler_name
from mfd_fast.models.digits.task import SEED_STRIDE
from mfd_fast.models.presets import Cifar10Run
from mfd_fast.models.table import markdown_table
from mfd_fast.run.device import pick_device
from mfd_fast.run.folder import STUDENT, RunFolder
from mfd_fast.run.task import pictures

EVALUATION_SEED = 1
SAMPLES = 40
GRID_COLUMNS = 10
COLUMNS = (
    ("sampler", "name", "s"),
    ("NFE", "nfe", "d"),
    ("FID", "fid", ".2f"),
    ("precision", "precision", ".3f"),
    ("recall", "recall", ".3f"),
    ("images/s", "samples_per_s", ".1f"),
)


class Cifar10Task:
    """See ``tasks.base.Task``.  The condition of a sample is an empty row."""

    def __init__(self, config: Cifar10Run):
        self.config = config
        self.device = pick_device(config.train.device)
        if not config.teacher:
            raise ValueError(
                "cifar10 has no packaged teacher: train one with mfd-fast pretrain cifar10 and "
                "give its file with --teacher"
            )
        if config.cifar10.features != "none" and not config.cifar10.features_model:
            raise ValueError(
                f"cifar10.features={config.cifar10.features} needs cifar10.features_model"
            )
        self.teacher = load_unet(config.teacher).to(self.device)
        size = self.teacher.config
        self.shape = (size.channels, size.image_size, size.image_size)

    def check(self) -> dict[str, str]:
        size = sum(parameter.numel() for parameter in self.teacher.parameters())
        found = {"teacher": f"{self.config.teacher}, {size:,} numbers"}
        if self._uses_data() or self.config.cifar10.features != "none":
            found["data"] = f"{self.config.cifar10.data}, {len(self._images())} images"
        if self.config.cifar10.features != "none":
            found["features"] = f"{self.config.cifar10.features}, {self._features.size} numbers"
        return found | pictures()

    def data(self) -> str:
        return blake2b(self._images().numpy().data).hexdigest() if self._uses_data() else ""

    def remarks(self, num_samples: int) -> list[str]:
        if self.config.cifar10.features == "none":
            return []
        return few_samples(num_samples, self._features.size)

    def backbone(self) -> CopiedBackbone:
        takes_second_time = needs_of(self.config.distill).second_time
        return CopiedBackbone(
            self.teacher,
            student=with_second_time(self.teacher) if takes_second_time else None,
            sample_shape=self.shape,
        )

    def conditions(self) -> Callable[[int], Any]:
        """Empty rows ``[B, 0]``; for an objective that uses data, (images, empty rows)."""
        batch, seed = self.config.train.batch_size, self.config.distill.seed
        empty = torch.empty(batch, 0, device=self.device)
        if not self._uses_data():
            return lambda n: empty
        images = self._images()

        def next_cond(n: int) -> tuple[Tensor, Tensor]:
            generator = Generator().manual_seed(seed * SEED_STRIDE + n)
            rows = torch.randint(len(images), (batch,), generator=generator)
            return to_unit_range(to_device(images[rows], self.device)), empty

        return next_cond

    def schedule(self) -> None:
        return None

    def preview(self, distiller: Distiller, path: Path) -> None:
        done = distiller.num_updates["student"]
        self._draw_grid({"student": distiller.generate}, path, f"after {done} student updates")

    def save_student(self, distiller: Distiller, path: Path) -> None:
        steps = self.config.distill.student_steps
        with distiller.averaged_student():
            save_unet(distiller.backbone.student, path, {"steps": steps})

    @torch.no_grad()
    def evaluate(self, run: RunFolder, num_samples: int) -> list[dict[str, Any]]:
        """FID, precision and recall against the training images, if there are features."""
        settings = self.config.cifar10
        features = reference = None
        if settings.features != "none":
            features = self._features
            reference = features(self._images())
        noise, cond = self._noise(num_samples, EVALUATION_SEED)
        rows = []
        for name, sampler in (self._teacher_sampler() | self._student_sampler(run)).items():
            images, seconds = draw_images(sampler, noise, cond)
            scores = dict.fromkeys(("fid", "precision", "recall"))
            if features:
                scores = distribution_scores(reference, features(to_bytes(images)))
            speed = {"samples_per_s": num_samples / seconds}
            rows.append({"name": name, "nfe": sampler.nfe, **scores, **speed})
        return rows

    def format_table(self, rows: list[dict[str, Any]]) -> str:
        return markdown_table(rows, COLUMNS)

    def draw_pictures(self, run: RunFolder) -> list[Path]:
        from mfd_fast.pictures.grids import training_curves

        paths = [run / "samples_grid.png", run / "training_curves.png"]
        samplers = self._student_sampler(run) | self._teacher_sampler()
        self._draw_grid(samplers, paths[0], f"{self.config.distill.objective}, CIFAR-10")
        training_curves(run.history(), paths[1])
        return paths

    def sample(
        self, run: RunFolder, path: Path, *, num: int, seed: int, prompts: Sequence[str] = ()
    ) -> None:
        if prompts:
            raise ValueError("CIFAR-10 runs are unconditional; drop --prompt")
        num = num or SAMPLES
        title = f"{num} samples, seed {seed}"
        self._draw_grid(self._student_sampler(run), path, title, num=num, seed=seed)

    def export(self, run: RunFolder, out: Path) -> Path:
        raise ValueError(f"{run / STUDENT} is a full checkpoint already; copy it")

    @cached_property
    def _features(self) -> Any:
        settings = self.config.cifar10
        return FEATURES[settings.features](settings.features_model, device=self.device)

    def _uses_data(self) -> bool:
        return needs_of(self.config.distill).uses_data

    def _images(self) -> Tensor:
        if not self.config.cifar10.data:
            raise ValueError("give the folder of the CIFAR-10 archive with --cifar10.data")
        return load_cifar10(self.config.cifar10.data)[0]

    def _noise(self, num: int, seed: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(num, *self.shape, generator=Generator().manual_seed(seed))
        return noise.to(self.device), torch.empty(num, 0, device=self.device)

    def _draw_grid(
        self,
        samplers: dict[str, Sampler],
        path: Path,
        title: str,
        *,
        num: int = GRID_COLUMNS,
        seed: int = EVALUATION_SEED,
    ) -> None:
        from mfd_fast.pictures.grids import sample_grid

        noise, cond = self._noise(num, seed)
        with torch.no_grad():
            rows = {name: sampler(noise, cond) for name, sampler in samplers.items()}
        sample_grid(rows, path, title=title)

    def _teacher_sampler(self) -> dict[str, DiTSampler]:
        steps = self.config.cifar10.teacher_steps
        return {sampler_name("teacher", steps): DiTSampler(self.teacher, steps)}

    def _student_sampler(self, run: RunFolder) -> dict[str, StudentSampler]:
        distill = self.config.distill
        model = load_unet(run / STUDENT).to(self.device)
        name = sampler_name("student", distill.student_steps)
        return {name: StudentSampler(model, distill, needs_of(distill).sampler)}


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
