"""The distillation step.  Reads like the algorithm in the paper; nothing here waits for the
device.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Generator, Tensor
from torch.optim import Optimizer

from mfd_fast.backbones.lanes import (
    AUX,
    STUDENT,
    Backbone,
    Prepared,
    batch_size,
    buffers_of,
    check_noise,
    in_parts,
)
from mfd_fast.backbones.networks import check_leads, check_statistics, evaluating
from mfd_fast.distill.config import DistillConfig, OptimConfig
from mfd_fast.distill.objectives import aux_times
from mfd_fast.distill.optim import (
    LossScale,
    check_own,
    clip_and_step,
    load_optimizer,
    make_optimizer,
    set_warmup_lr,
    unwrapped,
)
from mfd_fast.distill.ranks import FlatGradients, Ranks, placed_like, placed_state, ranks_of
from mfd_fast.distill.registry import IntervalObjective, make_objective
from mfd_fast.distill.student import StudentWeights
from mfd_fast.flow.integrate import generate
from mfd_fast.flow.solvers import SolverTable, to_device
from mfd_fast.flow.times import Schedule
from mfd_fast.ops import interpolate_with_target


def no_phase(name: str) -> AbstractContextManager:
    """What a ``Distiller`` tells about its phases until somebody listens: nothing."""
    return _NOTHING


_NOTHING = nullcontext()


TRAINED = ("aux", "student")


class Distiller(StudentWeights):
    """Auxiliary and student updates of one backbone.

    Args:
        backbone: teacher, auxiliary and student (``CopiedBackbone`` or your own ``Backbone``).
        config: the method's settings.
        optimizers: ``{"aux": ..., "student": ...}`` if you own them, learning rates and warm-up
            included: only ``clip_norm`` is taken from the config then.  Fused AdamW from the config
            if None.
        ranks: the processes that share every update; those of ``torch.distributed`` if None.

    ``cond`` is a pytree whose leaves are ``[B, ...]``; its batch size is the batch size of the
    update, or this rank's share of it: rows rank, rank + world, ...

    Update n of a role has the n-th times, noise and learning rate, whether or not one before was
    skipped.  An update whose gradient is not finite changes no weight and no average.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: DistillConfig,
        optimizers: dict[str, Optimizer] | None = None,
        *,
        schedule: Schedule | None = None,
        ranks: Ranks | None = None,
    ):
        self.backbone = backbone
        self.config = config
        self.ranks = ranks_of(backbone) if ranks is None else ranks
        self.objective = self._bind_objective()
        self.roles: tuple[str, ...] = self.objective.roles
        if self.ranks.world > 1:
            check_statistics(backbone)
        buffers = buffers_of(backbone, self.roles)
        for role in self.roles:
            self.ranks.align(self.parameters_of(role) + buffers[f"{role}_buffers"])
            backbone.refresh(role)
        self._owns_rates = optimizers is None
        if optimizers is not None:
            trained = {role: self.parameters_of(role) for role in self.roles}
            check_own(optimizers, {role: self._optim(role) for role in self.roles}, trained)
        self.optimizers = optimizers or {role: self._make_optimizer(role) for role in self.roles}
        self.host_generator = Generator().manual_seed(config.seed)
        has_storage = backbone.device.type != "meta"  # without, shapes are all that is asked for
        self.generator = Generator(backbone.device if has_storage else "cpu")
        self.generator.manual_seed(config.seed)
        self.loss_scale = {
            role: LossScale(config.loss_scale, backbone.device)
            for role in (self.roles if config.loss_scale > 0 else ())
        }
        self.schedule = schedule
        # Entered around every phase, named role/part, by whoever measures them.
        self.phase: Callable[[str], AbstractContextManager] = no_phase
        self.num_updates = {"aux": 0, "student": 0}
        self.skipped = torch.zeros((), device=backbone.device)
        self.skipped_in_a_row = {role: torch.zeros_like(self.skipped) for role in TRAINED}
        self.ema = (
            [p.detach().clone() for p in backbone.parameters_of("student")]
            if config.ema_decay > 0
            else []
        )
        has_replicas = self.ranks.world > 1 and not self.ranks.is_sharded
        self.gradients = {
            role: FlatGradients(self.parameters_of(role))
            for role in (self.roles if has_replicas else ())
        }

    def aux_step(self, cond: Any) -> dict[str, Tensor]:
        """One flow-matching update of the auxiliary on the student's samples (method, section 3).

        Returns ``aux_loss`` and ``aux_grad_norm``, device tensors ``[]``.
        """
        self._set_lr("aux")
        parts = self._parts(cond)
        losses = [self._aux_backward(part, self._draw_aux_times(part)) for part in parts]
        metrics = self._apply("aux")
        self.num_updates["aux"] += 1
        return metrics | {"aux_loss": torch.stack(losses).mean()}

    def student_step(self, cond: Any) -> dict[str, Tensor]:
        """One update of the student by the objective (method, section 4).

        Returns ``student_loss``, ``distance`` (mean over samples of |u_T - u_A|_2, paper D.6),
        ``saturation`` (share of the samples' values beyond ``sample_bound``),
        ``student_grad_norm``, ``skipped`` (updates skipped so far) and ``skipped_in_a_row`` (of
        the role that is worse off), device tensors ``[]``.
        """
        self._set_lr("student")
        parts = [self._student_backward(part) for part in self._parts(cond)]
        metrics = {name: torch.stack([m[name] for m in parts]).mean() for name in parts[0]}
        metrics |= self._apply("student")
        self.num_updates["student"] += 1
        return metrics

    def step(self, cond: Any) -> dict[str, Tensor]:
        """The next update of the cycle: ``aux_updates`` of the auxiliary, then
        ``student_updates``.  Returns the metrics of the role that was updated, and no others.
        """
        return self.student_step(cond) if self.next_role == "student" else self.aux_step(cond)

    @property
    def next_role(self) -> str:
        """``"aux"`` or ``"student"``: what :meth:`step` updates next."""
        if "aux" not in self.roles:
            return "student"
        position = sum(self.num_updates.values()) % self.cycle_length
        return "aux" if position < self.config.aux_updates else "student"

    @property
    def cycle_length(self) -> int:
        """Updates of one cycle."""
        aux = self.config.aux_updates if "aux" in self.roles else 0
        return aux + self.config.student_updates

    @torch.no_grad()
    def generate(self, noise: Tensor, cond: Any, *, use_ema: bool = True) -> Tensor:
        """Samples of the student, ``[B, *S]``, from noise ``[B, *S]``; averaged weights if kept,
        in eval mode.  ``ValueError`` if there is not one noise for each condition.
        """
        self._warn_if_untrained(stacklevel=4)  # the caller, beyond the decorator
        prepared = self.backbone.prepare(cond)
        check_noise(noise, prepared, self.backbone)
        with evaluating(self.backbone), self.averaged_student(use_ema):
            return self._sample_student(noise, prepared)

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything a bit-exact continuation needs, besides the teacher."""
        return copy.deepcopy(self.live_state())

    def live_state(self) -> dict[str, Any]:
        """What :meth:`state_dict` copies: the tensors themselves, which the next update changes."""
        weights = {role: [p.detach() for p in self.parameters_of(role)] for role in self.roles}
        return {
            **weights,
            **buffers_of(self.backbone, self.roles),
            "ema": list(self.ema),
            "optimizers": {
                role: unwrapped(optimizer).state_dict()
                for role, optimizer in self.optimizers.items()
            },
            "loss_scale": {
                role: (scale.scale, scale.finite_steps) for role, scale in self.loss_scale.items()
            },
            "num_updates": dict(self.num_updates),
            "skipped": self.skipped,
            "skipped_in_a_row": dict(self.skipped_in_a_row),
            "host_generator": self.host_generator.get_state(),
            "generator": self.generator.get_state(),
        }

    def release_graphs(self) -> None:
        """Let go of memory that only further updates need; here there is none."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; ``ValueError`` if it belongs to another network."""
        buffers = buffers_of(self.backbone, self.roles)
        state = buffers | state  # checkpoints had none once
        lists = {role: self.parameters_of(role) for role in self.roles} | {"ema": self.ema}
        lists |= buffers
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
                    target.copy_(placed_like(value, target))
        for role, optimizer in self.optimizers.items():
            optimizer = unwrapped(optimizer)
            load_optimizer(optimizer, placed_state(state["optimizers"][role], optimizer))
        for role, scale in self.loss_scale.items():
            scale.scale.copy_(state["loss_scale"][role][0])
            scale.finite_steps.copy_(state["loss_scale"][role][1])
        for role in self.roles:
            self.backbone.refresh(role)
            self.skipped_in_a_row[role].copy_(state["skipped_in_a_row"][role])
        self.num_updates = dict(state["num_updates"])
        self.skipped.copy_(state["skipped"])
        self.host_generator.set_state(state["host_generator"])
        self.generator.set_state(state["generator"])

    def _make_optimizer(self, role: str) -> Optimizer:
        return make_optimizer(self.parameters_of(role), self._optim(role))

    def parameters_of(self, role: str) -> list[Tensor]:
        """What the role's optimizer trains."""
        return self.backbone.parameters_of(role)

    def _bind_objective(self) -> IntervalObjective:
        objective = make_objective(self.config)
        if not isinstance(objective, IntervalObjective):
            raise ValueError(
                f"Distiller trains by interval objectives; for distill.objective="
                f"{self.config.objective!r} call make_distiller(backbone, config)"
            )
        return objective

    def _aux_backward(self, cond: Any, t: Tensor) -> Tensor:
        """Gradient of the flow-matching loss on the student's samples; the loss.

        t is ``[B * draws]``: every sample is noised to ``draws`` times (one in the paper), which
        the backbone sees as that many auxiliary lanes of the sample.
        """
        draws = self.config.aux_draws_per_sample
        prepared = self.backbone.prepare(cond)
        with self.phase("aux/generate"), torch.no_grad():
            x0 = self._sample_student(self._noise(prepared.batch), prepared)
        with self.phase("aux/forward"):
            x0 = x0.repeat_interleave(draws, dim=0)
            x_t, target = interpolate_with_target(x0, self._noise(prepared.batch, draws), t)
            lanes, times = x_t.unflatten(0, (-1, draws)), t.unflatten(0, (-1, draws))
            v = self.backbone.forward(lanes, times, prepared, (AUX,) * draws)
            loss = torch.nn.functional.mse_loss(v.flatten(0, 1).to(target.dtype), target)
        self._backward("aux", loss)
        return loss.detach()

    def _student_backward(self, cond: Any) -> dict[str, Tensor]:
        """Gradient of the objective on fresh samples; its metrics."""
        table = self._draw_table(cond).to(self.backbone.device)
        with self.phase("student/generate"):
            prepared, x0, noise = self._student_samples(cond, self._draw_backprop_step())
        with self.phase("student/integrate"), evaluating(self.backbone):
            loss, metrics = self.objective.student_loss(self.backbone, prepared, x0, noise, table)
        self._backward("student", loss)
        return metrics | {"saturation": self._saturation}

    def _student_samples(self, cond: Any, step: int | None) -> tuple[Prepared, Tensor, Tensor]:
        """The prepared condition, x_0 with its graph, and the noise it will be mixed with."""
        prepared = self.backbone.prepare(cond)
        x0 = self._sample_student(self._noise(prepared.batch), prepared, only_step=step)
        self._saturation = (x0.detach().abs() > self.config.sample_bound).float().mean()
        return prepared, x0, self._noise(prepared.batch)

    def _sample_student(
        self, noise: Tensor, prepared: Prepared, *, only_step: int | None = None
    ) -> Tensor:
        """G(z, c): the student's own K-step sampler; the gradient enters every step, or only
        one.
        """
        config = self.config
        evaluation = iter(range(config.student_steps * 2))

        def velocity(x, t):
            enters = torch.is_grad_enabled() and only_step in (None, next(evaluation))
            with torch.set_grad_enabled(enters):
                return self.backbone.forward(x[:, None], t, prepared, (STUDENT,))[:, 0]

        return generate(
            velocity,
            noise,
            steps=config.student_steps,
            solver=config.student_solver,
            schedule=self.schedule,
        )

    def _backward(self, role: str, loss: Tensor) -> None:
        check_leads(loss, role)
        scale = self.loss_scale.get(role)
        weight = 1.0 / self.config.micro_batches
        if role in self.gradients:
            weight /= self.ranks.world  # the all-reduce adds
        with self.phase(f"{role}/backward"):
            (loss * (weight if scale is None else scale.scale * weight)).backward()

    def _apply(self, role: str) -> dict[str, Tensor]:
        """Clip, step or skip, average; the role's metrics."""
        with self.phase(f"{role}/optimizer"):
            return self._clip_and_step(role)

    @torch.no_grad()
    def _clip_and_step(self, role: str) -> dict[str, Tensor]:
        if role in self.gradients:
            self.gradients[role].all_reduce()
        norm, skipped = clip_and_step(
            self.optimizers[role],
            clip_norm=self._optim(role).clip_norm,
            loss_scale=self.loss_scale.get(role),
        )
        self.skipped += skipped
        self.skipped_in_a_row[role].add_(skipped).mul_(skipped)
        self._after_step(role, skipped)
        metrics = {f"{role}_grad_norm": norm}
        if role == "student":
            metrics["skipped"] = self.skipped.clone()
            metrics["skipped_in_a_row"] = torch.maximum(*self.skipped_in_a_row.values())
        return metrics

    def _after_step(self, role: str, skipped: Tensor) -> None:
        """Bring what follows the weights up to date; skipped ``[]`` is 1.0 if they stayed."""
        self.backbone.refresh(role)
        if role == "student":
            self._average(skipped)

    def _set_lr(self, role: str) -> None:
        if self._owns_rates:
            set_warmup_lr(self.optimizers[role], self._optim(role), self.num_updates[role])

    def _optim(self, role: str) -> OptimConfig:
        return self.config.optim_of(role)

    def _parts(self, cond: Any) -> list[Any]:
        return in_parts(cond, self.config.micro_batches)

    def _draw_aux_times(self, cond: Any) -> Tensor:
        """Times ``[B * draws]``, neighbouring ones of one sample; those of all ranks are drawn."""
        draws = self.config.aux_draws_per_sample
        all_draws = batch_size(cond) * self.ranks.world * draws
        t = aux_times(all_draws, self.config, self.host_generator).unflatten(0, (-1, draws))
        t = self.ranks.rows(t).flatten()
        return to_device(t, self.backbone.device)

    def _draw_table(self, cond: Any) -> SolverTable:
        table = self.objective.draw(batch_size(cond) * self.ranks.world, self.host_generator)
        return self.ranks.table(table)

    def _draw_backprop_step(self) -> int | None:
        """The sampler step that the gradient enters, drawn on the host; None for all of them."""
        config = self.config
        if config.student_backprop == "all":
            return None
        if config.student_backprop == "last":
            return config.student_steps - 1
        return int(torch.randint(config.student_steps, (), generator=self.host_generator))

    def _noise(self, batch: int, draws: int = 1) -> Tensor:
        """Standard normal ``[batch * draws, *S]``: this rank's rows of the noise of all ranks."""
        shape = (batch * self.ranks.world, draws, *self.backbone.sample_shape)
        noise = torch.randn(shape, generator=self.generator, device=self.backbone.device)
        return self.ranks.rows(noise).flatten(0, 1)
