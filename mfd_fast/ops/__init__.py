"""Fused operators: one file each (schema, fake, backends, autograd, public function)."""

from mfd_fast.ops.gated_residual import gated_residual
from mfd_fast.ops.glu_depthwise import glu_depthwise
from mfd_fast.ops.interpolate import interpolate, interpolate_with_target
from mfd_fast.ops.layer_norm_modulate import layer_norm_modulate, residual_norm_modulate
from mfd_fast.ops.linear_attention import linear_attention
from mfd_fast.ops.mfd_loss import mfd_loss, mfd_loss_from_ends
from mfd_fast.ops.ode_step import ode_step_
from mfd_fast.ops.quantize_rows import quantize_rows
from mfd_fast.ops.renormalised_guidance import renormalised_guidance
from mfd_fast.ops.rms_norm_modulate_silu import rms_norm_modulate_silu
from mfd_fast.ops.rms_norm_rotary import rms_norm_rotary
from mfd_fast.ops.segmented_lora import segmented_lora, segmented_lora_
from mfd_fast.ops.short_attention import short_attention, short_attention_qkv

__all__ = [
    "gated_residual",
    "glu_depthwise",
    "interpolate",
    "interpolate_with_target",
    "layer_norm_modulate",
    "linear_attention",
    "mfd_loss",
    "mfd_loss_from_ends",
    "ode_step_",
    "quantize_rows",
    "renormalised_guidance",
    "residual_norm_modulate",
    "rms_norm_modulate_silu",
    "rms_norm_rotary",
    "segmented_lora",
    "segmented_lora_",
    "short_attention",
    "short_attention_qkv",
]
