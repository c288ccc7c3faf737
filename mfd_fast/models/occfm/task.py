"""The ``occfm`` presets: the 4D occupancy forecaster, distilled into one step."""

import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfd_fast.backbones.lanes import CopiedBackbone
from mfd_fast.backbones.shared import SharedBackbone
from mfd_fast.distill.distiller import Distiller
from mfd_fast.flow.times import Schedule
from mfd_fast.models.occfm.backbone import occfm_backbone
from mfd_fast.models.occfm.data.store import OccupancyStore
from mfd_fast.models.occfm.data.windows import OccupancyWindows
from mfd_fast.models.occfm.evaluate import (
    Forecaster,
    Windows,
    condition,
    decoded,
    evaluate_forecasts,
    format_table,
)
from mfd_fast.models.occfm.loading import (
    load_transition,
    load_vae,
    load_vae3d,
    save_occfm_transition,
)
from mfd_fast.models.occfm.network import OccfmNetwork
from mfd_fast.models.occfm.presets import OccfmRun
from mfd_fast.models.occfm.vae.fast_decoder import FastDecoder
from mfd_fast.run.folder import STUDENT, RunFolder
from mfd_fast.run.task import Task, pictures

EVALUATION_SEED = 1
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
SAMPLES = 3  # forecasts of one window


class OccfmTask(Task):
    """See ``run.task.Task``."""

    def __init__(self, config: OccfmRun):
        super().__init__(config)
        self.settings = config.occfm
        if config.distill.student_solver != "euler":
            raise ValueError(
                "distill.student_solver must be euler, the sampler of OccFM; got "
                f"{config.distill.student_solver!r}"
            )
        files = (config.teacher, self.settings.store)
        if config.preset == "occfm-tiny" and not any(files):
            self.teacher_file, self.vae_file, self.store = self._random_files()
        elif not all(files):
            raise ValueError(
                f"expected --teacher FILE and --occfm.store STORE, got {files[0]!r} and "
                f"{files[1]!r}; mfd-fast prepare occfm makes a store"
            )
        else:
            self.teacher_file, self.store = config.teacher, Path(self.settings.store)
            self.vae_file = self.settings.vae or config.teacher
        if self.settings.dtype == "float16" and not config.distill.loss_scale:
            raise ValueError(
                "occfm.dtype float16 needs a loss scale, or small gradients vanish: set "
                "distill.loss_scale 65536, or take bfloat16"
            )
        self.teacher = self._load(self.teacher_file)
        self.training = self._windows("training")

    def _load(self, path: Path | str) -> OccfmNetwork:
        """Under adapters in ``occfm.dtype``; full copies in float32, with products in it."""
        dtype = DTYPES[self.settings.dtype]
        if self.settings.rank:
            return load_transition(path, device=self.device, dtype=dtype)
        network = load_transition(path, device=self.device)
        network.compute_dtype = None if dtype == torch.float32 else dtype
        return network

    def check(self) -> dict[str, str]:
        size = sum(parameter.numel() for parameter in self.teacher.parameters())
        load_vae(self.vae_file)
        if self.settings.vae3d:
            load_vae3d(self.settings.vae3d)
        return {
            "teacher": f"{self.teacher_file}, {size:,} parameters",
            "decoder": str(self.vae_file),
            "windows": f"{self.store}, {len(self.training):,} to train on, "
            f"{len(self._windows('validation')):,} to evaluate",
            **pictures(partial(import_module, "PIL.Image")),
        }

    def data(self) -> str:
        return self.training.store.digest

    def backbone(self) -> CopiedBackbone | SharedBackbone:
        return occfm_backbone(self.teacher, self.config)

    def conditions(self) -> Callable[[int], dict[str, Tensor]]:
        """History and trajectory of shuffled training windows."""
        batch, seed = self.config.train.batch_size, self.config.distill.seed

        def next_cond(n: int) -> dict[str, Tensor]:
            return condition(self.training.batch(n, batch, seed), self.device)

        return next_cond

    def schedule(self) -> Schedule:
        return self.teacher.schedule(self.config.distill.student_steps)

    def save_student(self, distiller: Distiller, path: Path) -> None:
        """The whole network; adapters are added to its weights."""
        metadata = {"steps": self.config.distill.student_steps}
        backbone = distiller.backbone
        with distiller.averaged_student():
            if not self.settings.rank:
                save_occfm_transition(backbone.student, path, metadata=metadata)
                return
            backbone.adapters.merge("student")
            save_occfm_transition(backbone.network, path, metadata=metadata)
            backbone.adapters.unmerge("student")

    def evaluate(self, run: RunFolder, num_samples: int) -> list[dict[str, Any]]:
        vae3d = self.settings.vae3d
        return evaluate_forecasts(
            self._forecasters(run),
            self.validation,
            self.vae,
            vae3d=load_vae3d(vae3d, device=self.device) if vae3d else None,
            num=num_samples,
            seed=EVALUATION_SEED,
        )

    def format_table(self, rows: list[dict[str, Any]]) -> str:
        return format_table(rows)

    def draw_pictures(self, run: RunFolder) -> list[Path]:
        from mfd_fast.models.occfm.pictures import forecast_animation, forecast_grid

        shown = self.validation.spread(3)[1:2]
        rows = {"ground truth": self.validation.truth(shown)[0]}
        noise, cond = self.validation.noise(shown, EVALUATION_SEED), self.validation.cond(shown)
        for name, forecaster in self._forecasters(run).items():
            rows[name.replace(", ", "\n")] = forecaster(noise, cond)[0]
        paths = [run / "forecast.png", run / "forecast.gif"]
        title = f"Forecasts of validation window {shown[0]}"
        forecast_grid(rows, paths[0], title=title, seen=self.validation.seen(shown)[0])
        forecast_animation(rows, paths[1])
        return [*paths, *super().draw_pictures(run)]

    def preview(self, distiller: Distiller, path: Path) -> None:
        from mfd_fast.models.occfm.pictures import forecast_grid

        shown = self.validation.spread(3)[1:2]
        noise, cond = self.validation.noise(shown, EVALUATION_SEED), self.validation.cond(shown)
        latents = distiller.generate(noise, cond) / self.teacher.config.latent_scale
        rows = {"ground truth": self.validation.truth(shown)[0]}
        rows["student"] = decoded(self.decoder, latents)[0]
        done = distiller.num_updates["student"]
        title, seen = f"after {done} student updates", self.validation.seen(shown)[0]
        forecast_grid(rows, path, title=title, seen=seen)

    def sample(
        self, run: RunFolder, path: Path, *, num: int, seed: int, prompts: Sequence[str] = ()
    ) -> None:
        """Several forecasts of one validation window, which ``seed`` chooses."""
        from mfd_fast.models.occfm.pictures import forecast_grid

        if prompts:
            raise ValueError("forecasts have a history, not prompts; drop --prompt")
        shown = [seed % len(self.validation.windows)]
        rows = {"ground truth": self.validation.truth(shown)[0]}
        cond, student = self.validation.cond(shown), self._student(run)
        for i in range(num or SAMPLES):
            noise = self.validation.noise(shown, seed + i)
            rows[f"student\nnoise {seed + i}"] = student(noise, cond)[0]
        seen = self.validation.seen(shown)[0]
        forecast_grid(rows, path, title=f"Validation window {shown[0]}", seen=seen)

    def usage(self, base: str) -> str:
        where = "from mfd_fast.models.occfm.loading import load_transition"
        return f'{where}\n\nstudent = load_transition("{STUDENT}")'

    @cached_property
    def vae(self):
        return load_vae(self.vae_file, device=self.device)

    @cached_property
    def decoder(self) -> FastDecoder:
        return FastDecoder(self.vae)

    @cached_property
    def validation(self) -> Windows:
        return Windows(self._windows("validation"), self.teacher)

    def _windows(self, split: str) -> OccupancyWindows:
        store = OccupancyStore(self.store / split)
        shape = store.array("latents").shape[1:]
        if shape != self.teacher.config.latent_shape:
            raise ValueError(
                f"the latents in {store.folder} are {list(shape)}, those of {self.teacher_file} "
                f"{list(self.teacher.config.latent_shape)}; prepare the latents of its VAE"
            )
        return OccupancyWindows(store, history=self.teacher.config.history_last)

    def _forecasters(self, run: RunFolder) -> dict[str, Forecaster]:
        steps, guidance = self.teacher.config.sample_steps, self.config.distill.guidance
        return {
            f"teacher, {steps} steps": self._forecaster(self.teacher, steps, guidance),
            "teacher, 1 step": self._forecaster(self.teacher, 1, guidance),
            self._student_name: self._student(run),
        }

    @property
    def _student_name(self) -> str:
        steps = self.config.distill.student_steps
        return f"student, {steps} step{'s' * (steps != 1)}"

    def _student(self, run: RunFolder) -> Forecaster:
        network = self._load(run / STUDENT)
        return self._forecaster(network, self.config.distill.student_steps, 1.0)

    def _forecaster(self, network: OccfmNetwork, steps: int, guidance: float) -> Forecaster:
        return Forecaster(network, self.decoder, steps, guidance)

    def _random_files(self) -> tuple[Path, Path, Path]:
        """What ``occfm-tiny`` distils if nothing is given: random weights, made-up scenes."""
        from mfd_fast.models.occfm.tiny import make_tiny_files

        self._folder = tempfile.TemporaryDirectory()  # removed with the task
        return make_tiny_files(Path(self._folder.name))
