"""LAION aesthetic predictor (Schuhmann et al., 2022): a linear head on CLIP image embeddings."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mfd_fast.files.tensors import load_head, read_tensors
from mfd_fast.metrics.clip_scores import ClipEmbedder


class AestheticScore:
    """Predicted rating of every image, roughly 1 to 10, ``[N]`` on the CPU; prompts do not matter.

    Args:
        model: folder or hub id of the CLIP whose embeddings the head was trained on,
            ``openai/clip-vit-large-patch14``.
        file: the head, ``sac+logos+ava1-l14-linearMSE.pth``.
        device: of the CLIP; the head is small and stays on the CPU.

    ``OSError`` or ``ValueError`` names what is missing or does not fit.
    """

    def __init__(self, model: str, file: str = "", *, device: torch.device | str = "cpu"):
        if not file:
            raise ValueError(
                "the aesthetic predictor is a CLIP and the file of its head; name both: "
                "openai/clip-vit-large-patch14:sac+logos+ava1-l14-linearMSE.pth"
            )
        tensors = read_tensors(file)
        self.embedder = ClipEmbedder(model, device=device)
        self.head = load_head(tensors, self.embedder.network.config.projection_dim, file)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.head(self.embedder.of_images(images))
