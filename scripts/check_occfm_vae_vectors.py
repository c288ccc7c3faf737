"""Every pinned vector of OccFM's VAEs at full size; minutes on a CPU.

python scripts/check_occfm_vae_vectors.py [occfm_vae] [occfm_3dvae]

The test suite checks all but the 3-D VAE's encoder and second half, and the encoder's weak vector.
Each line is a vector that was met with all its probes; the first that is not ends the run.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/models/occfm"))

from occfm_fill import VECTORS, fill
from test_occfm_vae import check_decoder, check_encoder, pinned_ids, pinned_latents

from mfd_fast.models.occfm.vae.config import VAE_CONFIGS
from mfd_fast.models.occfm.vae.vae import OccupancyVae
from mfd_fast.models.occfm.vae.vae3d import OccupancyVae3d

CASES = [
    ("occfm_vae", "sine", OccupancyVae),
    ("occfm_vae", "hash", OccupancyVae),
    ("occfm_3dvae", "hash", OccupancyVae3d),
]


@torch.no_grad()
def main() -> None:
    names = sys.argv[1:] or [name for name, _, _ in CASES]
    for name, kind, cls in [case for case in CASES if case[0] in names]:
        vae, expected = fill(cls(VAE_CONFIGS[name]), kind).eval(), VECTORS[name][kind]
        frames = vae.config.clip or 1
        check_decoder(vae, pinned_latents(frames), expected)
        print(f"{name} {kind}: decoder and {len(expected['decoder_probes'])} probes", flush=True)
        check_encoder(vae, pinned_ids(frames), expected)
        print(f"{name} {kind}: encoder and {len(expected['encoder_probes'])} probes", flush=True)


if __name__ == "__main__":
    main()
