"""The loop a user would run instead: diffusers + PEFT, one sample, one network call after another.

The mathematics of Mean Flow Distillation (Eq. 15-20) with the settings of its published SANA
script, written out literally: every mean velocity is a Python loop of Euler steps, teacher and
auxiliary are integrated one after the other, guidance concatenates the two conditions, padded text
goes through every layer of every call, and the host reads the times and the losses.  It is the
baseline of the benchmarks, and the reference of ``test_sana_official_gradients.py``.

:class:`PublishedLoop` adds what the script runs besides the network: the text encoder on the prompt
and on the empty prompt at every update, image decoder and a PNG at every student update.

t = 1 is noise.  Times are whole timesteps in 0 ... 1000: the script rounds t, r and the end of
every step to 1/1000.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, SanaTransformer2DModel
from peft import LoraConfig
from torch import Tensor, nn

from bench.updates.sana_sizes import Published, Size, make_prompts, make_transformer
from mfd_fast.distill.phases import no_phase

GRID = 1000
AUX, STUDENT = "aux", "student"
TARGETS = ["to_q", "to_k", "to_v"]


@dataclass(frozen=True)
class OfficialSettings:
    """What the published script uses."""

    step: int = 20
    """Largest Euler step, in timesteps: h = .02."""
    guidance: float = 4.5
    """Of the teacher; auxiliary and student have none."""
    student_steps: int = 4
    rank: int = 64
    alpha: float = 64.0
    lr: float = 1e-4
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    is_8bit: bool = False
    """AdamW with 8-bit moments (bitsandbytes), as published; needs a GPU."""


class Prompt(NamedTuple):
    """Encoded text ``[B, L, channels]`` and its mask ``[B, L]``, padded to the full length."""

    text: Tensor
    mask: Tensor


Velocity = Callable[[Tensor, int], Tensor]


def flow_scheduler() -> DPMSolverMultistepScheduler:
    """The scheduler that SANA's checkpoints name."""
    return DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
    )


def euler_ends(t: int, r: int, step: int) -> list[int]:
    """The N + 1 timesteps that N = ceil((t - r) / step) equal steps visit, rounded; ``[t]`` if
    t = r.
    """
    count = math.ceil((t - r) / step)
    return [t, *(round(t - k * (t - r) / count) for k in range(1, count + 1))]


def mean_velocity(velocity: Velocity, x: Tensor, t: int, r: int, step: int) -> Tensor:
    """``(x - Phi(x; t -> r)) / (t - r)`` by Euler steps; the velocity itself at t = r."""
    if t == r:
        return velocity(x, t)
    ends = euler_ends(t, r, step)
    state = x
    for start, end in pairwise(ends):
        state = state - (start - end) / GRID * velocity(state, start)
    return (x - state) / ((t - r) / GRID)


class LiteralLoop:
    """Auxiliary and student updates of one SANA transformer with two PEFT adapters.

    Args:
        transformer: the frozen teacher; gets the adapters ``aux`` and ``student``.
        scheduler: the student's sampler, as :func:`flow_scheduler`.
    """

    def __init__(
        self,
        transformer: SanaTransformer2DModel,
        scheduler: DPMSolverMultistepScheduler,
        settings: OfficialSettings,
    ):
        self.transformer = transformer.eval().requires_grad_(False)
        self.scheduler, self.settings = scheduler, settings
        lora = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            init_lora_weights="gaussian",
            target_modules=TARGETS,
        )
        for name in (AUX, STUDENT):
            transformer.add_adapter(lora, adapter_name=name)
        self.optimizers = {name: self._optimizer(name) for name in (AUX, STUDENT)}
        self.last_sample: Tensor | None = None  # of the student's update, for a picture of it
        self.phase = no_phase  # entered around every phase, named as a Distiller's

    def parameters_of(self, role: str) -> dict[str, nn.Parameter]:
        """The LoRA factors of an adapter, by name without the adapter's."""
        return {
            name.replace(f".{role}", ""): parameter
            for name, parameter in self.transformer.named_parameters()
            if ".lora_" in name and f".{role}." in name
        }

    def use(self, adapter: str | None) -> None:
        """Switch to an adapter, or to the teacher; PEFT trains the active one only."""
        if adapter is None:
            self.transformer.disable_adapters()
            return
        self.transformer.enable_adapters()
        self.transformer.set_adapter(adapter)

    def velocity(self, prompt: Prompt) -> Velocity:
        """Of the network as it is switched now."""

        def call(x: Tensor, timestep: int) -> Tensor:
            return self.transformer(
                x,
                encoder_hidden_states=prompt.text,
                encoder_attention_mask=prompt.mask,
                timestep=torch.full((len(x),), timestep, dtype=torch.float32, device=x.device),
                return_dict=False,
            )[0]

        return call

    def guided(self, prompt: Prompt, null: Prompt) -> Velocity:
        """Classifier-free guidance, both conditions in one batch."""
        both = Prompt(*(torch.cat(pair) for pair in zip(null, prompt, strict=True)))
        velocity = self.velocity(both)

        def call(x: Tensor, timestep: int) -> Tensor:
            unconditional, conditional = velocity(torch.cat([x] * 2), timestep).chunk(2)
            return unconditional + self.settings.guidance * (conditional - unconditional)

        return call

    def generate(self, noise: Tensor, prompt: Prompt) -> Tensor:
        """The student's samples by the checkpoint's scheduler."""
        self.use(STUDENT)
        velocity = self.velocity(prompt)
        self.scheduler.set_timesteps(self.settings.student_steps, device=noise.device)
        x = noise
        for timestep in self.scheduler.timesteps:
            v = velocity(x, int(timestep))
            x = self.scheduler.step(v, timestep, x, return_dict=False)[0]
        return x

    def aux_loss(self, noise: Tensor, eps: Tensor, t: int, prompt: Prompt) -> Tensor:
        """Flow matching of the auxiliary on a sample of the student."""
        with self.phase("aux/generate"), torch.no_grad():
            x0 = self.generate(noise, prompt)
        with self.phase("aux/forward"):
            self.use(AUX)
            v = self.velocity(prompt)(self.noised(x0, eps, t), t)
            return F.mse_loss(v, eps - x0)

    def student_loss(
        self, noise: Tensor, eps: Tensor, t: int, r: int, prompt: Prompt, null: Prompt
    ) -> Tensor:
        """The surrogate loss: its gradient at x_t is (u_T - u_A) / numel."""
        with self.phase("student/generate"):
            x0 = self.generate(noise, prompt)
            self.last_sample = x0.detach()
            x_t = self.noised(x0, eps, t)
        with self.phase("student/integrate"):
            u_aux, u_teacher = self.mean_velocities(x_t.detach(), t, r, prompt, null)
            self.use(STUDENT)
            return ((u_teacher - u_aux) * x_t).mean()

    @torch.no_grad()
    def mean_velocities(
        self, x_t: Tensor, t: int, r: int, prompt: Prompt, null: Prompt
    ) -> tuple[Tensor, Tensor]:
        """u_A and u_T, one integration after the other."""
        step = self.settings.step
        self.use(AUX)
        u_aux = mean_velocity(self.velocity(prompt), x_t, t, r, step)
        self.use(None)
        u_teacher = mean_velocity(self.guided(prompt, null), x_t, t, r, step)
        return u_aux, u_teacher

    @staticmethod
    def noised(x0: Tensor, eps: Tensor, t: int) -> Tensor:
        """``(1 - t) x_0 + t eps``."""
        return (1 - t / GRID) * x0 + t / GRID * eps

    def aux_update(self, noise: Tensor, prompt: Prompt, t: int | None = None) -> float:
        """One step of the auxiliary; t is drawn if it is None."""
        t = draw_timestep(noise.device) if t is None else t
        loss = self.aux_loss(noise, torch.randn_like(noise), t, prompt)
        return self._apply(AUX, loss)

    def student_update(
        self, noise: Tensor, prompt: Prompt, null: Prompt, interval: tuple[int, int] | None = None
    ) -> float:
        """One step of the student; the interval (t, r) is drawn if it is None."""
        if interval is None:
            pair = draw_timestep(noise.device), draw_timestep(noise.device)
            interval = max(pair), min(pair)
        loss = self.student_loss(noise, torch.randn_like(noise), *interval, prompt, null)
        return self._apply(STUDENT, loss)

    def _apply(self, role: str, loss: Tensor) -> float:
        """Backward, clip, step; the host waits for the loss, as published."""
        with self.phase(f"{role}/backward"):
            loss.backward()
        optimizer = self.optimizers[role]
        parameters = optimizer.param_groups[0]["params"]
        with self.phase(f"{role}/optimizer"):
            nn.utils.clip_grad_norm_(parameters, self.settings.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

    def _optimizer(self, role: str) -> torch.optim.Optimizer:
        settings = self.settings
        kind = torch.optim.AdamW
        if settings.is_8bit:
            from bitsandbytes.optim import AdamW8bit

            kind = AdamW8bit
        return kind(
            self.parameters_of(role).values(),
            lr=settings.lr,
            betas=(0.9, 0.999),
            weight_decay=settings.weight_decay,
        )


def draw_timestep(device: torch.device) -> int:
    """Uniform, drawn on the device and read by the host."""
    return round(torch.rand((), device=device).item() * GRID)


class PublishedLoop:
    """The loop that encodes its prompts at every update and decodes an image at the student's."""

    def __init__(self, loop: LiteralLoop, besides: Published):
        self.loop, self.besides = loop, besides

    def aux_update(self, noise: Tensor, t: int | None = None) -> float:
        """As the loop's."""
        with self.loop.phase("aux/encode"):
            prompt = Prompt(*self.besides.encode(*self.besides.prompt()))
        return self.loop.aux_update(noise, prompt, t)

    def student_update(self, noise: Tensor, interval: tuple[int, int] | None = None) -> float:
        """As the loop's; the sample it trained on becomes an image."""
        besides = self.besides
        both = (besides.prompt(), besides.empty())
        with self.loop.phase("student/encode"):
            prompt, null = (Prompt(*besides.encode(*ids)) for ids in both)
        loss = self.loop.student_update(noise, prompt, null, interval)
        with self.loop.phase("student/image"):
            besides.write_image(self.loop.last_sample)
        return loss


def make_loop(
    size: Size,
    settings: OfficialSettings | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[LiteralLoop, Prompt, Prompt]:
    """A loop on random weights, a prompt and the empty prompt; with the published settings."""
    transformer = make_transformer(size, device=device, dtype=dtype)
    prompt, null = (Prompt(*p) for p in make_prompts(size, device=device, dtype=dtype))
    loop = LiteralLoop(transformer, flow_scheduler(), settings or OfficialSettings())
    return loop, prompt, null
