"""The shapes of a run's family, with what its objective trains and nothing else."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mfd_fast.backbones.float8 import use_float8
from mfd_fast.backbones.lanes import Backbone, CopiedBackbone
from mfd_fast.baselines.objectives import needs_of
from mfd_fast.cost.cycle import is_interval
from mfd_fast.run.config import RunConfig
from mfd_fast.run.task import Shapes, check_samples


def shapes_of(config: RunConfig) -> Shapes:
    """``config.shapes()`` for :func:`mfd_fast.cost.trace_cycle`.

    ``ValueError`` for a preset that its objective cannot train.
    """
    return _trained(config, config.shapes())


def terms_of(config: RunConfig) -> list[tuple[int, Shapes]]:
    """``config.terms()`` in the same way."""
    return [(weight, _trained(config, model)) for weight, model in config.terms()]


def _trained(config: RunConfig, model: Shapes) -> Shapes:
    """The shapes with what the objective trains and nothing else."""
    objective = needs_of(config.distill)
    if config.train.float8:
        use_float8(model.backbone)
    if not is_interval(config.distill):
        _check_compared(config, model.backbone)
    if "aux" not in objective.roles:
        model.backbone.aux = torch.nn.Identity()  # a copy that nobody trains
    if not objective.uses_data:
        return model
    shape = model.backbone.sample_shape

    def with_samples(batch: int) -> tuple[Tensor, Any]:
        return torch.empty(batch, *shape, device="meta"), model.cond(batch)

    return replace(model, cond=with_samples)


def _check_compared(config: RunConfig, backbone: Backbone) -> None:
    """``ValueError`` if the preset cannot be distilled by a ``ComparedObjective``."""
    name = config.distill.objective
    if not isinstance(backbone, CopiedBackbone):
        raise ValueError(
            f"distill.objective={name!r} trains full copies of a network, and preset "
            f"{config.preset!r} trains adapters: take --objective mfd, or preset digits or cifar10"
        )
    check_samples(config)
    if config.train.capture == "on":
        raise ValueError(
            f"distill.objective={name!r} cannot be captured; set train.capture to auto or off"
        )
