"""OccFM's RMS norm + modulation + SiLU, forward and training, fp16 and fp32, channels last.

python -m bench.bench_rms_norm_modulate_silu [--smoke] [--out FILE.json]
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, main
from mfd_fast.ops import reference, rms_norm_modulate_silu

OP = "rms_norm_modulate_silu"
FRAMES = 12
# (name, height and width, channels): the two levels of the network and its last one.
LEVELS = [("50x50x128", 50, 128), ("25x25x256", 25, 256), ("50x50x64", 50, 64)]
BATCHES = [1, 4]


def eager(x: Tensor, gain: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """As the network is specified: in float32, as under autocast, the rows repeated per frame."""
    frames = x.shape[0] // scale.shape[0]
    scale, shift = (m.repeat_interleave(frames, 0)[:, None, None] for m in (scale, shift))
    h = F.normalize(x.float(), dim=-1) * x.shape[-1] ** 0.5 * gain.float()
    return F.silu(h * (1 + scale.float()) + shift.float()).to(x.dtype)


def step(forward: Callable, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The gradients to x, gain, scale and shift: OccFM's network is trained as a whole."""
    *leaves, grad = inputs
    return torch.autograd.grad(forward(*leaves), leaves, grad)


def _inputs(
    batch: int, size: int, channels: int, dtype: torch.dtype, device: str, train: bool
) -> tuple:
    x = torch.randn(batch * FRAMES, size, size, channels, device=device).to(dtype)
    rows = torch.randn(batch, 2 * channels, device=device).to(dtype).chunk(2, dim=1)
    leaves = (x, 1 + torch.rand(channels, device=device).to(dtype), *rows)
    if not train:
        return leaves
    return *(leaf.detach().requires_grad_() for leaf in leaves), torch.randn_like(x)


def cases(device: str, smoke: bool) -> Iterator[Case]:
    forwards = {
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
        "ours": rms_norm_modulate_silu,
    }
    for name, size, channels in [("5x5x64", 5, 64)] if smoke else LEVELS:
        for batch in BATCHES[:1] if smoke else BATCHES:
            for dtype in (torch.float16, torch.float32):
                for train in (False, True):
                    num_bytes = batch * FRAMES * size * size * channels * dtype.itemsize
                    exact = reference.rms_norm_modulate_silu
                    yield Case(
                        shape=f"occfm {name} x{batch}" + (" train" if train else ""),
                        dtype=str(dtype).removeprefix("torch."),
                        impls={n: partial(step, f) if train else f for n, f in forwards.items()},
                        inputs=partial(_inputs, batch, size, channels, dtype, device, train),
                        bytes_moved=(5 if train else 2) * num_bytes,
                        exact=partial(step, exact) if train else exact,
                    )


if __name__ == "__main__":
    raise SystemExit(main(OP, cases))
