"""Scores on CLIP embeddings: CLIP Score, PickScore, HPSv2 by the cosine, LAION's by a head.

    score = factor * cos(image, prompt)

CLIP Score (Hessel et al., 2021) with factor 100, on a public CLIP; torchmetrics' definition, whose
mean over a set is the number in tables.  PickScore (Kirstain et al., 2023) with the factor that its
CLIP-H learnt, over 100: the unit of the paper's Table 3.  HPSv2 (Wu et al., 2023) with factor 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mfd_fast.files.tensors import load_head, read_tensors
from mfd_fast.metrics.open_clip_names import to_transformers_names
from mfd_fast.metrics.pretrained import (
    ImageProcessor,
    in_batches,
    load_network,
    load_tokenizer,
    model_folder,
    read_config,
)

PICK_UNIT = 100.0  # the scores of its authors are 100 times those that tables print


class ClipEmbedder:
    """Unit embeddings of images and prompts.

    Args:
        model: folder or hub id of a CLIP in the layout of ``openai/clip-vit-large-patch14``.
        file: open_clip checkpoint whose weights are used instead of the model's.
        device: where they are computed; the weights are there only during a call.

    ``OSError`` or ``ValueError`` names a model that is missing or of another kind.
    """

    def __init__(self, model: str, file: str = "", *, device: torch.device | str = "cpu"):
        tensors = to_transformers_names(read_tensors(file), file) if file else None
        folder = model_folder(model, has_weights=not file)
        self.device = torch.device(device)
        config = read_config(folder, ("clip",))
        self.network = load_network("CLIPModel", config, file or folder, tensors=tensors)
        self._prepare = ImageProcessor(folder)
        self._tokenize = load_tokenizer(folder)
        self.max_length: int = self.network.config.text_config.max_position_embeddings

    def of_images(self, images: Tensor) -> Tensor:
        """``[N, D]`` on the CPU, of uint8 ``[N, 3, H, W]``."""
        return in_batches(self._images, self.network, self.device, images)

    def of_prompts(self, prompts: Sequence[str]) -> Tensor:
        """``[N, D]`` on the CPU; a prompt is cut to what the network can read."""
        return in_batches(self._prompts, self.network, self.device, list(prompts))

    def _images(self, images: Tensor) -> Tensor:
        pixels = self._prepare(images).to(self.device)
        pooled = self.network.vision_model(pixel_values=pixels).pooler_output
        return _unit(self.network.visual_projection(pooled))

    def _prompts(self, prompts: list[str]) -> Tensor:
        tokens = self._tokenize(
            prompts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.device)
        pooled = self.network.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return _unit(self.network.text_projection(pooled))


class CosineScore:
    """``factor * cos(image, prompt)`` of every pair, ``[N]`` on the CPU.

    With ``only_square``, ``ValueError`` for other images: where the preprocessor cuts their edges
    off, HPSv2's own keeps and pads them.
    """

    def __init__(self, embedder: ClipEmbedder, factor: float, *, only_square: bool = False):
        self.embedder, self.factor, self.only_square = embedder, factor, only_square

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if self.only_square and images.shape[-1] != images.shape[-2]:
            raise ValueError(
                f"HPSv2 is for square images here, got {list(images.shape[-2:])}; crop or pad them"
            )
        image, prompt = self.embedder.of_images(images), self.embedder.of_prompts(prompts)
        return self.factor * (image * prompt).sum(1)


class AestheticScore:
    """LAION's predicted rating of every image, roughly 1 to 10, ``[N]`` on the CPU.

    A linear head on CLIP image embeddings (Schuhmann et al., 2022); prompts do not matter.

    Args:
        model: the CLIP whose embeddings the head was trained on, ``openai/clip-vit-large-patch14``.
        file: the head, ``sac+logos+ava1-l14-linearMSE.pth``; it stays on the CPU.

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


def load_clip_score(model: str, file: str = "", *, device: torch.device | str) -> CosineScore:
    """CLIP Score; the usual model is ``openai/clip-vit-large-patch14``."""
    return CosineScore(ClipEmbedder(model, file, device=device), 100.0)


def load_pick_score(model: str, file: str = "", *, device: torch.device | str) -> CosineScore:
    """PickScore over 100; the model is ``yuvalkirstain/PickScore_v1``."""
    embedder = ClipEmbedder(model, file, device=device)
    return CosineScore(embedder, float(embedder.network.logit_scale.exp()) / PICK_UNIT)


def load_hps_score(model: str, file: str = "", *, device: torch.device | str) -> CosineScore:
    """HPSv2: ``laion/CLIP-ViT-H-14-laion2B-s32B-b79K``, whose config, tokenizer and preprocessor
    are used with the file ``HPS_v2_compressed.pt`` or ``HPS_v2.1_compressed.pt`` as published; or a
    folder that holds HPSv2's weights in transformers' layout.
    """
    return CosineScore(ClipEmbedder(model, file, device=device), 1.0, only_square=True)


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)
