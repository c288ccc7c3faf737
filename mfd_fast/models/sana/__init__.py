"""SANA (Xie et al., 2024): the transformer of diffusers' checkpoints as a fast velocity network."""

from mfd_fast.models.sana.config import SanaConfig
from mfd_fast.models.sana.loading import load_sana_transformer
from mfd_fast.models.sana.network import BLOCKS, SanaNetwork
from mfd_fast.models.sana.text.trim import trim_text

__all__ = ["BLOCKS", "SanaConfig", "SanaNetwork", "load_sana_transformer", "trim_text"]
