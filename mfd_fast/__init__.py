"""Distil flow-matching models into one- to four-step students by Mean Flow Distillation."""

from mfd_fast.backbones.adapters import AdapterBank
from mfd_fast.backbones.lanes import (
    AUX,
    STUDENT,
    TEACHER,
    TEACHER_UNCOND,
    Backbone,
    CopiedBackbone,
    Lane,
)
from mfd_fast.backbones.shared import SharedBackbone
from mfd_fast.distill.captured import CapturedDistiller
from mfd_fast.distill.config import DistillConfig, OptimConfig
from mfd_fast.distill.distiller import Distiller
from mfd_fast.distill.ranks import Ranks
from mfd_fast.flow.integrate import generate, guided, mean_velocity
from mfd_fast.flow.times import (
    Schedule,
    dpm_flow_schedule,
    sample_time_pairs,
    sample_times,
    shifted_schedule,
)
from mfd_fast.ops import interpolate, mfd_loss
from mfd_fast.run.checkpoint_writer import Checkpointer
from mfd_fast.run.config import TrainConfig
from mfd_fast.run.loop import train
from mfd_fast.run.maker import make_distiller
from mfd_fast.run.resume import resume_from

__version__ = "0.1.0"

__all__ = [
    "AUX",
    "STUDENT",
    "TEACHER",
    "TEACHER_UNCOND",
    "AdapterBank",
    "Backbone",
    "CapturedDistiller",
    "Checkpointer",
    "CopiedBackbone",
    "DistillConfig",
    "Distiller",
    "Lane",
    "OptimConfig",
    "Ranks",
    "Schedule",
    "SharedBackbone",
    "TrainConfig",
    "dpm_flow_schedule",
    "generate",
    "guided",
    "interpolate",
    "make_distiller",
    "mean_velocity",
    "mfd_loss",
    "resume_from",
    "sample_time_pairs",
    "sample_times",
    "shifted_schedule",
    "train",
]
