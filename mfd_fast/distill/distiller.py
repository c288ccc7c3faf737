"""The distillation step, as the algorithm in the paper; nothing here waits for the device."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_structure, tree_unflatten

from mfd_fast.backbones.lanes import (
    AUX,
    STUDENT,
    Backbone,
    Prepared,
    batch_size,
    check_noise,
    in_parts,
)
from mfd_fast.backbones.networks import evaluating
from mfd_fast.distill.config import DistillConfig
from mfd_fast.distill.objectives import IntervalObjective, aux_times, make_objective
from mfd_fast.distill.ranks import Ranks
from mfd_fast.distill.trained import TrainedRoles
from mfd_fast.flow.integrate import generate
from mfd_fast.flow.solvers import SolverTable, to_device
from mfd_fast.flow.times import Schedule
from mfd_fast.ops import interpolate_with_target


class Distiller(TrainedRoles):
    """Auxiliary and student updates of one backbone.

    Args:
        backbone: teacher, auxiliary and student (``CopiedBackbone`` or your own ``Backbone``).
        config: the method's settings.
        optimizers: ``{"aux": ..., "student": ...}`` if you own them, learning rates and warm-up
            included: only ``clip_norm`` is taken from the config then.  Fused AdamW from the config
            if None.
        ranks: the processes that share every update; those of ``torch.distributed`` if None.
        objective: what moves the student; the one that ``config.objective`` names if None.

    ``cond`` is a pytree whose leaves are ``[B, ...]``; its batch size is the batch size of the
    update, or this rank's share of it: rows rank, rank + world, ...

    Update n of a role has the n-th times, noise and learning rate, whether or not one before was
    skipped.  An update whose gradient is not finite changes no weight and no average.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: DistillConfig,
        optimizers: Mapping[str, Optimizer] | None = None,
        *,
        schedule: Schedule | None = None,
        ranks: Ranks | None = None,
        objective: IntervalObjective | None = None,
    ):
        self.objective = make_objective(config) if objective is None else objective
        self.schedule = schedule
        super().__init__(backbone, config, optimizers, self.objective.roles, ranks)

    def step(self, cond: Any) -> dict[str, Tensor]:
        """The next update of the cycle: ``aux_updates`` of the auxiliary, then
        ``student_updates``.  Returns the metrics of the role that was updated, and no others.
        """
        return self.student_step(cond) if self.next_role == "student" else self.aux_step(cond)

    @property
    def next_role(self) -> str:
        """``"aux"`` or ``"student"``: what :meth:`step` updates next."""
        position = sum(self.num_updates.values()) % self.cycle_length
        return "aux" if position < self.cycle_length - self.config.student_updates else "student"

    @property
    def cycle_length(self) -> int:
        """Updates of one cycle."""
        aux = self.config.aux_updates if "aux" in self.roles else 0
        return aux + self.config.student_updates

    def aux_step(self, cond: Any) -> dict[str, Tensor]:
        """One flow-matching update of the auxiliary on the student's samples (method, section 3).

        Returns ``aux_loss`` and ``aux_grad_norm``, device tensors ``[]``.
        """
        self.trained["aux"].set_lr()
        cond, samples = self._aux_source(cond)
        parts = in_parts(cond, self.config.micro_batches)
        done = [
            self._aux_backward(part, self._draw_aux_times(part), x0)
            for part, x0 in zip(parts, samples, strict=True)
        ]
        losses, samples = zip(*done, strict=True)
        self._aux_learned_from(samples, cond)
        metrics = self._apply("aux")
        self.trained["aux"].num_updates += 1
        return metrics | {"aux_loss": torch.stack(losses).mean()}

    def student_step(self, cond: Any) -> dict[str, Tensor]:
        """One update of the student by the objective (method, section 4).

        Returns ``student_loss``, ``distance`` (mean over samples of |u_T - u_A|_2, paper D.6),
        ``saturation`` (share of the samples' values beyond ``sample_bound``),
        ``student_grad_norm``, ``skipped`` (updates skipped so far) and ``skipped_in_a_row`` (of
        the role that is worse off), device tensors ``[]``.
        """
        self.trained["student"].set_lr()
        done = [self._student_backward(c) for c in in_parts(cond, self.config.micro_batches)]
        parts, samples = zip(*done, strict=True)
        self._student_left(samples, cond)
        metrics = {name: torch.stack([m[name] for m in parts]).mean() for name in parts[0]}
        metrics |= self._apply("student")
        self.trained["student"].num_updates += 1
        return metrics

    @torch.no_grad()
    def generate(self, noise: Tensor, cond: Any, *, use_ema: bool = True) -> Tensor:
        """Samples of the student, ``[B, *S]``, from noise ``[B, *S]``; EMA weights if kept, in eval
        mode.  ``ValueError`` if there is not one noise for each condition.
        """
        self._warn_if_untrained(stacklevel=4)  # the caller, beyond the decorator
        prepared = self.backbone.prepare(cond)
        check_noise(noise, prepared, self.backbone)
        with evaluating(self.backbone), self.averaged_student(use_ema):
            return self._sample_student(noise, prepared)

    def _aux_source(self, cond: Any) -> tuple[Any, Sequence[Tensor | None]]:
        """The condition that an auxiliary update learns with, and the samples of every
        micro-batch: kept ones with the condition they were made with, or None: it generates them.

        A sample serves several updates, each with new (t, eps).  Within a cycle that is exact: x_0
        has the student's law until the student moves, and the expectation over (t, eps) is as it
        was.  Over cycles it is not: the law is that of the student ``aux_kept`` updates ago, or
        fewer.
        """
        parts = self.config.micro_batches
        if not self.kept:
            return cond, [None] * parts
        x0, *leaves = self.kept[self.num_updates["aux"] % len(self.kept)]
        return tree_unflatten(leaves, tree_structure(cond)), in_parts(x0, parts)

    def _aux_learned_from(self, samples: Sequence[Tensor | None], cond: Any) -> None:
        """Keep what an auxiliary update generated, if the next one may see it."""
        if self.config.aux_samples != "new" and not self.kept:
            self._keep(samples, cond)

    def _student_left(self, samples: Sequence[Tensor | None], cond: Any) -> None:
        """The student moves on from its samples: keep them, stale as they are, or none."""
        if self.config.aux_samples == "student":
            self._keep(samples, cond)
        else:
            self.kept = []

    def _keep(self, samples: Sequence[Tensor], cond: Any) -> None:
        batch = [torch.cat(list(samples)), *(leaf.clone() for leaf in tree_leaves(cond))]
        self.kept = [batch, *self.kept][: self.config.aux_kept]

    def _aux_backward(
        self, cond: Any, t: Tensor, x0: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gradient of the flow-matching loss on samples x0 ``[B, *S]`` of the student, which are
        generated if None; the loss and the samples.

        t is ``[B * draws]``: every sample is noised to ``draws`` times (one in the paper), which
        the backbone sees as that many auxiliary lanes of the sample.
        """
        draws = self.config.aux_draws_per_sample
        prepared = self.backbone.prepare(cond)
        if x0 is None:
            with self.phase("aux/generate"), torch.no_grad():
                x0 = self._sample_student(self._noise(prepared.batch), prepared)
        with self.phase("aux/forward"):
            drawn = x0.repeat_interleave(draws, dim=0)
            x_t, target = interpolate_with_target(drawn, self._noise(prepared.batch, draws), t)
            lanes, times = x_t.unflatten(0, (-1, draws)), t.unflatten(0, (-1, draws))
            v = self.backbone.forward(lanes, times, prepared, (AUX,) * draws)
            loss = torch.nn.functional.mse_loss(v.flatten(0, 1).to(target.dtype), target)
        self._backward("aux", loss)
        return loss.detach(), x0

    def _student_backward(self, cond: Any) -> tuple[dict[str, Tensor], Tensor]:
        """Gradient of the objective on fresh samples; its metrics and the samples."""
        table = self._draw_table(cond).to(self.backbone.device)
        with self.phase("student/generate"):
            prepared, x0, noise = self._student_samples(cond, self._draw_backprop_step())
            saturation = self._saturation(x0)
        with self.phase("student/integrate"), evaluating(self.backbone):
            loss, metrics = self.objective.student_loss(self.backbone, prepared, x0, noise, table)
        self._backward("student", loss)
        return metrics | {"saturation": saturation}, x0.detach()

    def _student_samples(self, cond: Any, step: int | None) -> tuple[Prepared, Tensor, Tensor]:
        """The prepared condition, x_0 with its graph, and the noise it will be mixed with."""
        prepared = self.backbone.prepare(cond)
        x0 = self._sample_student(self._noise(prepared.batch), prepared, only_step=step)
        return prepared, x0, self._noise(prepared.batch)

    def _saturation(self, x0: Tensor) -> Tensor:
        return (x0.detach().abs() > self.config.sample_bound).float().mean()

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

        steps, solver = config.student_steps, config.student_solver
        return generate(velocity, noise, steps=steps, solver=solver, schedule=self.schedule)

    def _draw_aux_times(self, cond: Any) -> Tensor:
        """Times ``[B * draws]``, neighbouring ones of one sample; those of all ranks are drawn."""
        draws = self.config.aux_draws_per_sample
        all_draws = batch_size(cond) * self.ranks.world * draws
        t = aux_times(all_draws, self.config, self.host_generator).unflatten(0, (-1, draws))
        return to_device(self.ranks.rows(t).flatten(), self.backbone.device)

    def _draw_table(self, cond: Any) -> SolverTable:
        table = self.objective.draw(batch_size(cond) * self.ranks.world, self.host_generator)
        return self.ranks.table(table)

    def _draw_backprop_step(self) -> int | None:
        """The sampler step that the gradient enters, drawn on the host; None for all of them."""
        steps, enters = self.config.student_steps, self.config.student_backprop
        if enters == "random":
            return int(torch.randint(steps, (), generator=self.host_generator))
        return None if enters == "all" else steps - 1

    def _noise(self, batch: int, draws: int = 1) -> Tensor:
        """Standard normal ``[batch * draws, *S]``: this rank's rows of the noise of all ranks."""
        shape = (batch * self.ranks.world, draws, *self.backbone.sample_shape)
        noise = torch.randn(shape, generator=self.generator, device=self.backbone.device)
        return self.ranks.rows(noise).flatten(0, 1)
