"""LayerNorm + modulation, forward and forward + backward to x: SANA 1024px, fp32 and bf16.

python -m bench.bench_layer_norm_modulate [--smoke] [--out FILE.json]
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, main
from mfd_fast.ops import layer_norm_modulate, reference

OP = "layer_norm_modulate"
CHANNELS, TOKENS = 2240, 1024
# (lanes, samples): one sample; its two teacher lanes and the auxiliary; four samples of these.
LANES = [(1, 1), (3, 1), (12, 4)]


def eager(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """As the diffusers block writes it, the rows repeated for every lane."""
    lanes = x.shape[0] // scale.shape[0]
    scale, shift = (m.repeat_interleave(lanes, 0).unsqueeze(1) for m in (scale, shift))
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def step(forward: Callable, x: Tensor, scale: Tensor, shift: Tensor, grad: Tensor) -> Tensor:
    """The gradient to x; the modulation is frozen, as it is under LoRA."""
    return torch.autograd.grad(forward(x, scale, shift), x, grad)[0]


def _inputs(
    lanes: int, samples: int, tokens: int, dtype: torch.dtype, device: str, train: bool
) -> tuple:
    x = torch.randn(lanes, tokens, CHANNELS, device=device).to(dtype)
    rows = torch.randn(samples, 6, CHANNELS, device=device).to(dtype)
    inputs = (x.requires_grad_(train), rows[:, 1], rows[:, 0])
    return (*inputs, torch.randn_like(x)) if train else inputs


def cases(device: str, smoke: bool) -> Iterator[Case]:
    forwards = {
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
        "ours": layer_norm_modulate,
    }
    name, tokens = ("smoke", 64) if smoke else ("sana-1024", TOKENS)
    for lanes, samples in LANES[:1] if smoke else LANES:
        for dtype in (torch.float32, torch.bfloat16):
            for train in (False, True):
                num_bytes = lanes * tokens * CHANNELS * dtype.itemsize
                exact = reference.layer_norm_modulate
                yield Case(
                    shape=f"{name} x{lanes}" + (" train" if train else ""),
                    dtype=str(dtype).removeprefix("torch."),
                    impls={n: partial(step, f) if train else f for n, f in forwards.items()},
                    inputs=partial(_inputs, lanes, samples, tokens, dtype, device, train),
                    bytes_moved=(5 if train else 2) * num_bytes,
                    exact=partial(step, exact) if train else exact,
                )


if __name__ == "__main__":
    raise SystemExit(main(OP, cases))
