"""OccFM's decoder, latents to class ids: the reference, and the fast one for frozen weights.

Random weights of the published sizes.  Both decode the same latents in turns; their scores are held
to the tolerance rule before anything is timed.  Operators that compute are counted, and the bytes
that they read and write.
"""

from collections.abc import Iterator

import torch

from bench.harness import verify
from bench.running import Options
from bench.updates.occfm_network import counted
from mfd_fast.models.occfm.vae.config import VAE_CONFIGS, VaeConfig
from mfd_fast.models.occfm.vae.fast_decoder import FastDecoder
from mfd_fast.models.occfm.vae.vae import OccupancyVae

CASES = [(1, torch.float32), (1, torch.bfloat16)]  # frames, dtype


def make_vae(config: VaeConfig, device: str) -> OccupancyVae:
    torch.manual_seed(0)
    return OccupancyVae(config).eval().requires_grad_(False).to(device)


@torch.no_grad()
def rows_of(config: VaeConfig, frames: int, dtype: torch.dtype, options: Options) -> list[dict]:
    """One row each for the reference decoder ("eager") and the fast one ("ours")."""
    device, generator = options.device, torch.Generator().manual_seed(1)
    latents = torch.randn(frames, *config.latent_shape, generator=generator).to(device, dtype)
    fast, vae = FastDecoder(make_vae(config, device)).to(dtype), make_vae(config, device).to(dtype)
    name, wide = str(dtype).removeprefix("torch."), make_vae(config, device).double()
    scores = {"eager": vae.decode, "ours": fast}
    verify(scores, lambda: (latents[:1],), wide.decode, f"{frames} frame(s) {name}")
    impls = {"eager": vae.decode_classes, "ours": fast.decode_classes}
    return counted(impls, lambda: (latents,), options, frames=frames, dtype=name)


def benchmark(options: Options) -> tuple[str, dict, Iterator[list[dict]]]:
    config = VAE_CONFIGS["tiny" if options.smoke else "occfm_vae"]
    cases = CASES[: 1 if options.smoke else None]
    batches = (rows_of(config, frames, dtype, options) for frames, dtype in cases)
    return "occfm_decoder", {"smoke": options.smoke, "vae": vars(config)}, batches
