"""Launches every operator once, forward and backward, on small ragged shapes; for the sanitizers.

compute-sanitizer --tool memcheck python -m scripts.launch_every_kernel
MFD_FAST_BACKEND=triton python -m scripts.launch_every_kernel     # the Triton kernels instead
python -m scripts.launch_every_kernel --device cpu                # are the calls valid?
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from mfd_fast import ops

OPERATORS = sorted(
    path.stem for path in Path(ops.__file__).parent.glob("*.py") if "= define(" in path.read_text()
)


class Maker:
    """Random tensors of one device and dtype that want a gradient."""

    def __init__(self, device: str, dtype: torch.dtype):
        self.device, self.dtype = device, dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        tensor = torch.randn(shape, device=self.device).to(dtype or self.dtype)
        return tensor.requires_grad_()

    def plain(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, device=self.device) + 0.1


def ode_step(make: Maker) -> None:
    coef = make.plain(2, 5)
    for trajectories, lanes in ((1, 1), (2, 3)):
        x = make(2, trajectories, 77, dtype=torch.float32).detach()
        v = make(2, lanes, 77).detach()
        ops.ode_step_(x, v, None, coef, guidance=4.5)
        ops.ode_step_(x, v, torch.zeros_like(x), coef, guidance=4.5, x_in=torch.empty_like(v))


def mfd_loss(make: Maker):
    states = make(3, 2, 2100).detach()
    args = (states[:, 0], states[:, 1], make.plain(3), make.plain(3))
    return ops.mfd_loss_from_ends(make(3, 2100), *args)[0]


def quantize_rows(make: Maker):
    if make.device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        return  # no e4m3 there
    ops.quantize_rows(make(4, 9, 70).detach())


def renormalised_guidance(make: Maker) -> None:
    ops.renormalised_guidance(make(2, 3, 9, 70).detach(), 4.0)


def layer_norm_modulate(make: Maker):
    x, row = make(4, 9, 70), make(2, 70)
    plain = ops.layer_norm_modulate(x, row, row)
    return plain, *ops.residual_norm_modulate(x, make(4, 9, 70), row, row, row, bias=make(70))


def segmented_lora(make: Maker):
    y, x = make(3, 19, 2 * 24), make(3, 19, 40)
    rows = torch.tensor([1, -1, 0], dtype=torch.int32, device=make.device)
    factors = make(2, 2, 5, 40), make(2, 2, 24, 5)
    with torch.no_grad():
        ops.segmented_lora_(y.clone(), x, *factors, rows, 0.5)
    return ops.segmented_lora(y, x, *factors, rows, 0.5)


def short_attention(make: Maker):
    q, k, v = (make(5, 12, 3, 16) for _ in range(3))
    biased = ops.short_attention(q, k, v, bias=make(3, 12, 12))
    return biased, ops.short_attention(q, k, v, merge="row_major")


CALLS: dict[str, Callable] = {
    "gated_residual": lambda m: ops.gated_residual(m(4, 9, 70), m(4, 9, 70), m(2, 70), m(70)),
    "glu_depthwise": lambda m: ops.glu_depthwise(
        m(2, 15, 24), m(24, 1, 3, 3), m(24), 3, 5, in_bias=m(24)
    ),
    "interpolate": lambda m: ops.interpolate_with_target(
        m(3, 2100), m(3, 2100).detach(), m.plain(3)
    ),
    "layer_norm_modulate": layer_norm_modulate,
    "linear_attention": lambda m: ops.linear_attention(*(m(2, 19, 3, 16) for _ in range(3))),
    "mfd_loss": mfd_loss,
    "ode_step": ode_step,
    "quantize_rows": quantize_rows,
    "renormalised_guidance": renormalised_guidance,
    "rms_norm_modulate_silu": lambda m: ops.rms_norm_modulate_silu(
        m(4, 9, 70), m(70), m(2, 70), m(2, 70)
    ),
    "rms_norm_rotary": lambda m: ops.rms_norm_rotary(
        m(2, 9, 3, 16), m(16).detach(), m.plain(1, 9, 8), m.plain(1, 9, 8)
    ),
    "segmented_lora": segmented_lora,
    "short_attention": short_attention,
}


def launch(name: str, make: Maker) -> None:
    """One operator forward, and backward if it has a gradient."""
    result = CALLS[name](make)
    outputs = result if isinstance(result, tuple) else (result,)
    if result is not None:
        sum(output.float().sum() for output in outputs).backward()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    if missing := sorted(set(OPERATORS) - set(CALLS)):
        print(f"launch_every_kernel.py has no call for {missing}")
        return 1
    for name in OPERATORS:
        for dtype in (torch.float32, torch.bfloat16):
            launch(name, Maker(device, dtype))
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"launched {len(OPERATORS)} operators on {device}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
