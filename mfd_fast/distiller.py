"""The distillation step.  Reads like the algorithm in the paper; nothing here waits for the
device.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor
from torch.optim import Optimizer

from mfd_fast.backbone import AUX, STUDENT, Backbone, Prepared, swapped
from mfd_fast.config import DistillConfig
from mfd_fast.flow import sample_times
from mfd_fast.integrate import generate
from mfd_fast.objectives import make_objective
from mfd_fast.ops import interpolate_with_target
from mfd_fast.optim import clip_and_step, make_optimizer, set_warmup_lr


class Distiller:
    """Auxiliary and student updates of one backbone.

    Args:
        backbone: teacher, auxiliary and student (``CopiedBackbone`` or your own ``Backbone``).
        config: the method's settings.
        optimizers: ``{"aux": ..., "student": ...}`` if you own them; fused AdamW from the config if
            None.

    ``cond`` is a pytree whose leaves are ``[B, ...]``; its batch size is the batch size of the
    update.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: DistillConfig,
        optimizers: dict[str, Optimizer] | None = None,
    ):
        if optimizers is not None and set(optimizers) != {"aux", "student"}:
            raise ValueError(
                f"optimizers must have the keys aux and student; got {sorted(optimizers)}"
            )
        self.backbone = backbone
        self.config = config
        self.objective = make_objective(config)
        self.optimizers = optimizers or {
            "aux": make_optimizer(backbone.parameters_of("aux"), config.aux_optim),
            "student": make_optimizer(backbone.parameters_of("student"), config.student_optim),
        }
        self.host_generator = Generator().manual_seed(config.seed)
        self.generator = Generator(backbone.device).manual_seed(config.seed)
        self.num_updates = {"aux": 0, "student": 0}
        self.skipped = torch.zeros((), device=backbone.device)
        self.ema = [p.detach().clone() for p in self._student()] if config.ema_decay > 0 else []

    def aux_step(self, cond: Any) -> dict[str, Tensor]:
        """One flow-matching update of the auxiliary on the student's samples (method, section 3).

        Returns ``aux_loss`` and ``aux_grad_norm``, device tensors ``[]``.
        """
        config = self.config
        prepared = self.backbone.prepare(cond)
        with torch.no_grad():
            x0 = self._sample_student(self._noise(prepared.batch), prepared)
        t = sample_times(
            prepared.batch,
            config.aux_time_distribution,
            mean=config.aux_time_mean,
            std=config.aux_time_std,
            generator=self.host_generator,
        )
        t = self._to_device(t)
        x_t, target = interpolate_with_target(x0, self._noise(prepared.batch), t)
        v = self.backbone.forward(x_t[:, None], t, prepared, (AUX,))[:, 0]
        loss = torch.nn.functional.mse_loss(v.float(), target)
        norm = self._update("aux", loss)
        return {"aux_loss": loss.detach(), "aux_grad_norm": norm}

    def student_step(self, cond: Any) -> dict[str, Tensor]:
        """One update of the student by the objective (method, section 4).

        Returns ``student_loss``, ``distance`` (mean over samples of |u_T - u_A|_2, paper D.6),
        ``student_grad_norm`` and ``skipped`` (updates skipped so far), device tensors ``[]``.
        """
        prepared = self.backbone.prepare(cond)
        x0 = self._sample_student(self._noise(prepared.batch), prepared)
        table = self.objective.draw(prepared.batch, self.host_generator).to(x0.device)
        noise = self._noise(prepared.batch)
        loss, metrics = self.objective.student_loss(self.backbone, prepared, x0, noise, table)
        metrics["student_grad_norm"] = self._update("student", loss)
        if self.ema:
            torch._foreach_lerp_(self.ema, self._student(), 1.0 - self.config.ema_decay)
        return metrics | {"skipped": self.skipped.clone()}

    def step(self, cond: Any) -> dict[str, Tensor]:
        """The next update of the cycle: ``aux_updates`` of the auxiliary, then
        ``student_updates``.
        """
        return self.student_step(cond) if self.next_role == "student" else self.aux_step(cond)

    @property
    def next_role(self) -> str:
        """``"aux"`` or ``"student"``: what :meth:`step` updates next."""
        config = self.config
        cycle = config.aux_updates + config.student_updates
        position = sum(self.num_updates.values()) % cycle
        return "aux" if position < config.aux_updates else "student"

    @torch.no_grad()
    def generate(self, noise: Tensor, cond: Any, *, use_ema: bool = True) -> Tensor:
        """Samples of the student, ``[B, *S]``, from noise ``[B, *S]``; averaged weights if kept."""
        prepared = self.backbone.prepare(cond)
        with self.averaged_student(use_ema):
            return self._sample_student(noise, prepared)

    @contextmanager
    def averaged_student(self, use_ema: bool = True) -> Iterator[None]:
        """Inside the block the student holds its averaged weights (if an average is kept)."""
        if not (use_ema and self.ema):
            yield
            return
        with swapped(self._student(), self.ema):
            yield

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything a bit-exact continuation needs, besides the teacher."""
        return {
            "aux": [p.detach().clone() for p in self.backbone.parameters_of("aux")],
            "student": [p.detach().clone() for p in self._student()],
            "ema": [p.clone() for p in self.ema],
            "optimizers": {
                role: copy.deepcopy(opt.state_dict()) for role, opt in self.optimizers.items()
            },
            "num_updates": dict(self.num_updates),
            "skipped": self.skipped.clone(),
            "host_generator": self.host_generator.get_state(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; ``ValueError`` if it belongs to another network."""
        lists = {
            "aux": self.backbone.parameters_of("aux"),
            "student": self._student(),
            "ema": self.ema,
        }
        for name, mine in lists.items():
            theirs = state[name]
            if [p.shape for p in mine] != [p.shape for p in theirs]:
                raise ValueError(
                    f"the state's {name} has {len(theirs)} tensors of other shapes than this "
                    f"backbone's {len(mine)}; it belongs to another network or config"
                )
        with torch.no_grad():
            for name, mine in lists.items():
                for target, value in zip(mine, state[name], strict=True):
                    target.copy_(value)
        for role, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][role])
        self.num_updates = dict(state["num_updates"])
        self.skipped.copy_(state["skipped"])
        self.host_generator.set_state(state["host_generator"])
        self.generator.set_state(state["generator"])

    def _student(self) -> list[Tensor]:
        return self.backbone.parameters_of("student")

    def _noise(self, batch: int) -> Tensor:
        shape = (batch, *self.backbone.sample_shape)
        return torch.randn(shape, generator=self.generator, device=self.backbone.device)

    def _to_device(self, t: Tensor) -> Tensor:
        if self.backbone.device.type == "cpu":
            return t
        return t.pin_memory().to(self.backbone.device, non_blocking=True)

    def _sample_student(self, noise: Tensor, prepared: Prepared) -> Tensor:
        """G(z, c): the student's own sampler, K steps; the gradient flows through all of them."""

        def velocity(x, t):
            return self.backbone.forward(x[:, None], t, prepared, (STUDENT,))[:, 0]

        config = self.config
        return generate(velocity, noise, steps=config.student_steps, solver=config.student_solver)

    def _update(self, role: str, loss: Tensor) -> Tensor:
        """Backward, warm-up, clip, step or skip; returns the gradient norm."""
        optim = self.config.aux_optim if role == "aux" else self.config.student_optim
        optimizer = self.optimizers[role]
        loss.backward()
        set_warmup_lr(optimizer, optim, self.num_updates[role])
        norm, skipped = clip_and_step(optimizer, clip_norm=optim.clip_norm)
        self.skipped += skipped
        self.num_updates[role] += 1
        return norm
