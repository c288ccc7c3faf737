"""Small files of every kind that an OccFM run needs, the same in every run: random weights."""

from pathlib import Path

import torch

from mfd_fast.models.occfm import CONFIGS, OccfmNetwork
from mfd_fast.models.occfm.data.classes import SPLITS
from mfd_fast.models.occfm.data.store import convert_split
from mfd_fast.models.occfm.data.synthetic import SyntheticConfig, write_synthetic
from mfd_fast.models.occfm.loading import save_occfm_transition, save_occfm_vae
from mfd_fast.models.occfm.pretrain import cache_latents
from mfd_fast.models.occfm.vae.config import VAE_CONFIGS
from mfd_fast.models.occfm.vae.vae import OccupancyVae


def make_tiny_files(folder: Path) -> tuple[Path, Path, Path]:
    """A random teacher, a random VAE, and a store of its latents; where they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher, vae = OccfmNetwork(CONFIGS["tiny"]), OccupancyVae(VAE_CONFIGS["tiny"]).eval()
    save_occfm_transition(teacher, folder / "teacher.safetensors")
    save_occfm_vae(vae, folder / "vae.safetensors")
    grid = vae.config.grid_shape
    write_synthetic(folder / "data", SyntheticConfig(scenes=1, frames=14, grid=grid, voxel=1.0))
    for split in SPLITS:
        cache_latents(folder / "data", split, vae)
        convert_split(folder / "data", folder / "store", split)
    return folder / "teacher.safetensors", folder / "vae.safetensors", folder / "store"
