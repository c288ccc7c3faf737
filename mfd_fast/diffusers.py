"""``mfd_fast.diffusers.distillation(pipe)``: the library form; needs ``mfd_fast[sana]``."""

from mfd_fast.models.diffusers.distillation import Distillation, distillation

__all__ = ["Distillation", "distillation"]
