"""Fused operators: one file each (schema, fake, backends, autograd, public function)."""

from mfd_fast.ops.interpolate import interpolate, interpolate_with_target
from mfd_fast.ops.mfd_loss import mfd_loss, mfd_loss_from_ends
from mfd_fast.ops.ode_step import ode_step_

__all__ = ["interpolate", "interpolate_with_target", "mfd_loss", "mfd_loss_from_ends", "ode_step_"]
