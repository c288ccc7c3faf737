"""OccFM (arXiv 2506.23434): forecasting occupancy by flow matching in a VAE's latent space."""

from mfd_fast.models.occfm.config import CONFIGS, OccfmConfig
from mfd_fast.models.occfm.network import BLOCKS, OccfmNetwork, null_condition
from mfd_fast.models.occfm.sampler import forecast

__all__ = ["BLOCKS", "CONFIGS", "OccfmConfig", "OccfmNetwork", "forecast", "null_condition"]
