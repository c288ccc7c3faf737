"""What training changes, an object for each role, and everything that a checkpoint holds."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from mfd_fast.backbones.lanes import Backbone, buffers_of, swapped
from mfd_fast.backbones.networks import check_leads, check_statistics
from mfd_fast.distill.config import DistillConfig
from mfd_fast.distill.optim import (
    LossScale,
    average_,
    check_own,
    clip_and_step,
    load_optimizer,
    make_optimizer,
    set_warmup_lr,
    unwrapped,
)
from mfd_fast.distill.phases import no_phase
from mfd_fast.distill.ranks import (
    FlatGradients,
    Ranks,
    is_sharded,
    local,
    placed_like,
    placed_state,
    ranks_of,
)

TRAINED = ("aux", "student")


class Trained:
    """One trained role: its parameters, optimizer, loss scale, gradients and counters.

    The optimizer is over ``parameters``; its learning rate follows the config if ``sets_lr``.
    """

    def __init__(
        self,
        role: str,
        parameters: list[nn.Parameter],
        optimizer: Optimizer,
        config: DistillConfig,
        ranks: Ranks,
        *,
        device: torch.device,
        sets_lr: bool,
    ):
        self.parameters, self.optimizer, self.sets_lr = parameters, optimizer, sets_lr
        self.config = config.optim_of(role)
        # Whose gradients are added up here; those of shards are by fsdp.
        has_replicas = ranks.world > 1 and not any(map(is_sharded, parameters))
        self.gradients = FlatGradients(parameters) if has_replicas else None
        self.weight = 1.0 / config.micro_batches / (ranks.world if has_replicas else 1)
        self.loss_scale = LossScale(config.loss_scale, device) if config.loss_scale > 0 else None
        self.num_updates = 0
        self.skipped_in_a_row = torch.zeros((), device=device)

    def set_lr(self) -> None:
        """The learning rate of the coming update."""
        if self.sets_lr:
            set_warmup_lr(self.optimizer, self.config, self.num_updates)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's mean loss ``[]``."""
        scale = self.loss_scale
        (loss * (self.weight if scale is None else scale.scale * self.weight)).backward()

    @torch.no_grad()
    def step(self) -> tuple[Tensor, Tensor]:
        """Sum over replicas, clip, step or skip: the norm before clipping and 1.0 if it was
        skipped, ``[]`` each.
        """
        if self.gradients is not None:
            self.gradients.all_reduce()
        norm, skipped = clip_and_step(
            self.optimizer, clip_norm=self.config.clip_norm, loss_scale=self.loss_scale
        )
        self.skipped_in_a_row.add_(skipped).mul_(skipped)
        return norm, skipped


class TrainedRoles:
    """The trained roles of a backbone, the student's EMA and the random numbers; ``Distiller`` adds
    the updates.  The arguments are those of ``Distiller``, and the roles that are trained.
    """

    cycle_length: int

    def __init__(
        self,
        backbone: Backbone,
        config: DistillConfig,
        optimizers: Mapping[str, Optimizer] | None,
        roles: tuple[str, ...],
        ranks: Ranks | None,
    ):
        self.backbone, self.config, self.roles = backbone, config, roles
        self.phase: Callable[[str], AbstractContextManager] = no_phase  # or ``PhaseTimer.phase``
        self.ranks = ranks_of(backbone) if ranks is None else ranks
        if self.ranks.world > 1:
            check_statistics(backbone)
        buffers = buffers_of(backbone, roles)
        for role in roles:
            self.ranks.align(self.parameters_of(role) + buffers[f"{role}_buffers"])
            backbone.refresh(role)
        if optimizers is not None:
            configs = {role: config.optim_of(role) for role in roles}
            check_own(optimizers, configs, {role: self.parameters_of(role) for role in roles})
        self.trained = {
            role: Trained(
                role,
                self.parameters_of(role),
                self._make_optimizer(role) if optimizers is None else optimizers[role],
                config,
                self.ranks,
                device=backbone.device,
                sets_lr=optimizers is None,
            )
            for role in roles
        }
        self.skipped = torch.zeros((), device=backbone.device)
        student = backbone.parameters_of("student") if config.ema_decay > 0 else []
        self.ema = [parameter.detach().clone() for parameter in student]
        self.kept: list[list[Tensor]] = []  # samples of the student and the leaves of their cond
        self.host_generator = Generator().manual_seed(config.seed)
        has_storage = backbone.device.type != "meta"  # without, shapes are all that is asked for
        self.generator = Generator(backbone.device if has_storage else "cpu")
        self.generator.manual_seed(config.seed)

    def _make_optimizer(self, role: str) -> Optimizer:
        return make_optimizer(self.parameters_of(role), self.config.optim_of(role))

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        """What the role's optimizer trains."""
        return self.backbone.parameters_of(role)

    @property
    def optimizers(self) -> Mapping[str, Optimizer]:
        """Role -> its optimizer; others may be assigned, all at once."""
        return MappingProxyType({role: of.optimizer for role, of in self.trained.items()})

    @optimizers.setter
    def optimizers(self, optimizers: Mapping[str, Optimizer]) -> None:
        for role, trained in self.trained.items():
            trained.optimizer = optimizers[role]

    @property
    def num_updates(self) -> dict[str, int]:
        """Updates so far of ``"aux"`` and ``"student"``, trained or not; skipped ones count."""
        found = {role: trained.num_updates for role, trained in self.trained.items()}
        return dict.fromkeys(TRAINED, 0) | found

    @property
    def skipped_in_a_row(self) -> dict[str, Tensor]:
        """How many of the last updates of either role were skipped, device tensors ``[]``."""
        return {
            role: self.trained[role].skipped_in_a_row
            if role in self.trained
            else torch.zeros_like(self.skipped)
            for role in TRAINED
        }

    @property
    def loss_scale(self) -> dict[str, LossScale]:
        """Role -> its loss scale; empty without."""
        found = {role: trained.loss_scale for role, trained in self.trained.items()}
        return {role: scale for role, scale in found.items() if scale is not None}

    def release_graphs(self) -> None:
        """Let go of memory that only further updates need; here there is none."""

    def _backward(self, role: str, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's loss; ``ValueError`` if it leads to no parameter."""
        check_leads(loss, role)
        with self.phase(f"{role}/backward"):
            self.trained[role].backward(loss)

    @torch.no_grad()
    def _apply(self, role: str) -> dict[str, Tensor]:
        """Clip, step or skip, bring up to date what follows the weights; the role's metrics."""
        with self.phase(f"{role}/optimizer"):
            norm, skipped = self.trained[role].step()
            self.skipped += skipped
            self._after_step(role, skipped)
            metrics = {f"{role}_grad_norm": norm}
            if role == "student":
                metrics["skipped"] = self.skipped.clone()
                metrics["skipped_in_a_row"] = torch.maximum(*self.skipped_in_a_row.values())
            return metrics

    def _after_step(self, role: str, skipped: Tensor) -> None:
        """skipped ``[]`` is 1.0 if the weights stayed."""
        self.backbone.refresh(role)
        if role == "student" and self.ema:
            student = self.backbone.parameters_of("student")
            average_(self.ema, student, decay=self.config.ema_decay, skipped=skipped)

    @contextmanager
    def averaged_student(self, use_ema: bool = True) -> Iterator[None]:
        """Inside the block the student holds its EMA weights (if they are kept)."""
        if not (use_ema and self.ema):
            yield
            return
        try:
            student = [p.detach() for p in self.backbone.parameters_of("student")]
            with swapped(local(student), local(self.ema)):
                self.backbone.refresh("student")
                yield
        finally:
            self.backbone.refresh("student")

    def student_network(self, *, use_ema: bool = True) -> nn.Module:
        """A copy of the student as a network of its own, in eval mode; EMA weights if kept.

        Adapters are merged into it.  ``ValueError`` if its weights are spread over ranks.
        """
        self._warn_if_untrained(stacklevel=3)
        with self.averaged_student(use_ema):
            return self.backbone.student_network()

    def _warn_if_untrained(self, *, stacklevel: int) -> None:
        if self.num_updates["student"] == 0:
            before = self.cycle_length - self.config.student_updates
            warnings.warn(
                f"the student is still what it started as: a cycle of step() is {before} updates "
                f"of the auxiliary, then the student's, and {self.num_updates['aux']} were made",
                stacklevel=stacklevel,
            )

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything a bit-exact continuation needs, besides the teacher."""
        return copy.deepcopy(self.live_state())

    def live_state(self) -> dict[str, Any]:
        """What :meth:`state_dict` copies: the tensors themselves, which the next update changes.

        A collective call where samples are kept (``distill.aux_samples``).
        """
        optimizers, scales = self.optimizers.items(), self.loss_scale.items()
        return {
            **{role: [p.detach() for p in of.parameters] for role, of in self.trained.items()},
            **buffers_of(self.backbone, self.roles),
            "ema": list(self.ema),
            "optimizers": {role: unwrapped(of).state_dict() for role, of in optimizers},
            "loss_scale": {role: (of.scale, of.finite_steps) for role, of in scales},
            "num_updates": self.num_updates,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "kept": [[self.ranks.whole(rows) for rows in batch] for batch in self.kept],
            "host_generator": self.host_generator.get_state(),
            "generator": self.generator.get_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; ``ValueError`` if it belongs to another network."""
        buffers = buffers_of(self.backbone, self.roles)
        state = buffers | state  # checkpoints had none once
        lists = {role: of.parameters for role, of in self.trained.items()} | {"ema": self.ema}
        lists |= buffers
        for name, mine in lists.items():
            theirs = state[name]
            if [p.shape for p in mine] != [p.shape for p in theirs]:
                raise ValueError(
                    f"the state's {name} has {len(theirs)} tensors of other shapes than this "
                    f"backbone's {len(mine)}; it belongs to another network or config"
                )
        for name, mine in lists.items():
            for target, value in zip(mine, state[name], strict=True):
                target.copy_(placed_like(value, target))
        for role, trained in self.trained.items():
            optimizer = unwrapped(trained.optimizer)
            load_optimizer(optimizer, placed_state(state["optimizers"][role], optimizer))
            if (scale := trained.loss_scale) is not None:
                scale.scale.copy_(state["loss_scale"][role][0])
                scale.finite_steps.copy_(state["loss_scale"][role][1])
            trained.num_updates = state["num_updates"][role]
            trained.skipped_in_a_row.copy_(state["skipped_in_a_row"][role])
            self.backbone.refresh(role)
        self.skipped.copy_(state["skipped"])
        self.kept = [  # checkpoints had none once
            [self.ranks.rows(rows).to(self.backbone.device, copy=True) for rows in batch]
            for batch in state.get("kept", [])
        ]
        self.host_generator.set_state(state["host_generator"])
        self.generator.set_state(state["generator"])
