"""Which distiller trains a backbone, and whether its updates run as CUDA graphs."""

from typing import Any, get_args

from mfd_fast.backbones.lanes import Backbone
from mfd_fast.distill.captured import CapturedDistiller, why_eager
from mfd_fast.distill.config import DistillConfig
from mfd_fast.distill.distiller import Distiller
from mfd_fast.distill.objectives import OBJECTIVES
from mfd_fast.run.config import Capture, RunConfig


def make_distiller(
    backbone: Backbone, config: DistillConfig, *, capture: Capture = "auto", **options: Any
) -> Distiller:
    """The distiller that trains ``backbone`` by ``config.objective``.

    Args:
        capture: run updates as CUDA graphs: ``"auto"`` where that is possible, ``"on"`` or a
            ``ValueError``, ``"off"``.  A network that reads the device in its forward is found out
            in a warm-up update: ``"auto"`` warns and goes on without graphs.
        options: keyword arguments of the distiller.
    """
    ranks = options.get("ranks")
    is_sharded = ranks is not None and ranks.is_sharded
    if is_captured(capture, config, backbone.device.type, is_sharded=is_sharded):
        return CapturedDistiller(backbone, config, may_fall_back=capture == "auto", **options)
    if config.objective in OBJECTIVES:
        return Distiller(backbone, config, **options)
    from mfd_fast.baselines.distiller import ComparisonDistiller  # few runs need it

    return ComparisonDistiller(backbone, config, **options)


def is_captured(
    capture: Capture, config: DistillConfig, device: str, *, is_sharded: bool = False
) -> bool:
    """Whether ``train.capture`` makes graphs here; ``ValueError`` if it is on and cannot."""
    why = why_eager(config, device, is_sharded=is_sharded)
    if capture not in get_args(Capture):
        raise ValueError(f"capture must be one of {list(get_args(Capture))}, got {capture!r}")
    if why and capture == "on":
        raise ValueError(f"{why}; set train.capture to auto or off")
    return capture != "off" and not why


def run_is_captured(config: RunConfig, device: str) -> bool:
    """:func:`is_captured` of a whole run."""
    is_sharded = config.train.shard == "fsdp"
    return is_captured(config.train.capture, config.distill, device, is_sharded=is_sharded)


def capture_summary(config: RunConfig, device: str) -> str:
    """How the updates of a run go, and why, for the table of its start."""
    setting = f"train.capture {config.train.capture}"
    if run_is_captured(config, device):
        return f"captured as CUDA graphs ({setting})"
    if config.train.capture == "off":
        return f"eager ({setting})"
    is_sharded = config.train.shard == "fsdp"
    return f"eager ({setting}: {why_eager(config.distill, device, is_sharded=is_sharded)})"
