"""Latents to images through the checkpoint's own AutoencoderDC (diffusers)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfd_fast.models.sana.loading import (
    CONFIG,
    STEM,
    component,
    read_checkpoint_json,
    weight_files,
)

VAE = "vae"
INSTALL = "decoding images needs diffusers: pip install 'mfd-fast[sana]'"


def check_decoder(
    folder_or_id: str | Path, *, revision: str | None = None, variant: str | None = None
) -> tuple[Path, str | None]:
    """The folder of a checkpoint's decoder and the variant that it has; no weight is read.

    Raises as :class:`LatentDecoder`.
    """
    _autoencoder()
    folder, variant, _ = component(folder_or_id, VAE, STEM, revision=revision, variant=variant)
    read_checkpoint_json(folder, f"{VAE}/{CONFIG}")
    weight_files(folder / VAE, variant, STEM)
    return folder / VAE, variant


def _autoencoder() -> Any:
    try:
        from diffusers import AutoencoderDC
    except ImportError as error:
        raise ImportError(INSTALL) from error
    return AutoencoderDC


class LatentDecoder:
    """``decode(latents) -> images`` of a checkpoint; held on the CPU between calls.

    Args:
        folder_or_id: a diffusers pipeline's folder, or a model id of the hub.
        revision, variant: as for ``load_sana_transformer``; a decoder without the variant is taken
            as it is.
        device: where it decodes; the weights are there only during a call.
        dtype: of the weights.

    Raises:
        OSError, ValueError: there is no ``vae`` in the checkpoint, by name.
        ImportError: says what to install.
    """

    def __init__(
        self,
        folder_or_id: str | Path,
        *,
        revision: str | None = None,
        variant: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        folder, variant = check_decoder(folder_or_id, revision=revision, variant=variant)
        self.device = torch.device(device)
        self.vae: Any = (
            _autoencoder()
            .from_pretrained(folder, variant=variant, torch_dtype=dtype, use_safetensors=True)
            .eval()
            .requires_grad_(False)
        )

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """uint8 images ``[B, 3, H, W]`` of latents ``[B, C, h, w]``, one at a time to save memory.

        On the CPU, whatever the device.
        """
        self.vae.to(self.device)
        scaled = latents.to(self.device, self.vae.dtype) / self.vae.config.scaling_factor
        images = [self.vae.decode(row, return_dict=False)[0] for row in scaled.split(1)]
        self.vae.to("cpu")
        pixels = torch.cat(images).float() / 2 + 0.5
        return (pixels.clamp(0, 1) * 255).round().to("cpu", torch.uint8)
