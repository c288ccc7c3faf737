"""ImageReward (Xu et al., 2023): BLIP's text encoder looks at the image, a head reads the score.

The published ImageReward.pt holds BLIP under its authors' names; the networks are transformers'
``BlipVisionModel`` and ``BlipTextModel``, their sizes those of the tensors.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mfd_fast.files.tensors import load_head, read_tensors
from mfd_fast.metrics.pretrained import (
    ImageProcessor,
    import_transformers,
    in_batches,
    load_network,
    load_tokenizer,
    model_folder,
)

HEAD_WIDTH = 64  # of an attention head, in both networks
MAX_LENGTH = 35  # tokens of a prompt, padded to this
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output on its authors' data
IMAGE, TEXT, HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
NOT_USED = ("blip.vision_proj.", "blip.text_proj.")
VISION_NAMES = {  # part of a name in the file -> in transformers
    "norm.": "post_layernorm.",
    "patch_embed.proj": "embeddings.patch_embedding",
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "blocks.": "encoder.layers.",
    ".attn.proj": ".self_attn.projection",
    ".attn.": ".self_attn.",
    ".norm1": ".layer_norm1",
    ".norm2": ".layer_norm2",
}


class ImageReward:
    """The reward of every image for its prompt, ``[N]`` on the CPU.

    Args:
        model: folder or hub id of BERT's tokenizer, ``google-bert/bert-base-uncased``.
        file: ``ImageReward.pt``.
        device: where it is computed; the weights are there only during a call.

    ``OSError`` or ``ValueError`` names what is missing or does not fit.
    """

    def __init__(self, model: str, file: str = "", *, device: torch.device | str = "cpu"):
        if not file:
            raise ValueError(
                "ImageReward is a tokenizer and the file of its weights; name both: "
                "google-bert/bert-base-uncased:ImageReward.pt"
            )
        self.device = torch.device(device)
        vision, text, head = parts_of(read_tensors(file), file)
        try:
            seeing = vision_config(vision)
            reading = text_config(text, seeing.hidden_size)
        except KeyError as error:
            raise ValueError(
                f"{file} does not hold ImageReward: it lacks {error}; name another file"
            ) from None
        self._vision = load_network("BlipVisionModel", seeing, file, tensors=vision)
        self._text = load_network(
            "BlipTextModel", reading, file, tensors=text, add_pooling_layer=False
        )
        self._head = load_head(head, reading.hidden_size, file)
        self._networks = nn.ModuleList([self._vision, self._text, self._head])
        self._prepare = ImageProcessor(size=self._vision.config.image_size)
        self._tokenize = load_tokenizer(model_folder(model, has_weights=False))
        if len(self._tokenize) > self._text.config.vocab_size:
            raise ValueError(
                f"the tokenizer of {model} has {len(self._tokenize)} words, {file} embeds "
                f"{self._text.config.vocab_size}; name google-bert/bert-base-uncased"
            )

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return in_batches(self._rewards, self._networks, self.device, images, list(prompts))

    def _rewards(self, images: Tensor, prompts: list[str]) -> Tensor:
        tokens = self._tokenize(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=MAX_LENGTH,
            return_tensors="pt",
        ).to(self.device)
        seen = self._vision(self._prepare(images).to(self.device)).last_hidden_state
        read = self._text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=seen,
        ).last_hidden_state
        return (self._head(read[:, 0]) - MEAN) / STD


def parts_of(tensors: Mapping[str, Tensor], file: str | Path) -> list[dict[str, Tensor]]:
    """Image encoder, text encoder and head, under transformers' names.

    ``ValueError`` unless every part is there and nothing else.
    """
    parts: dict[str, dict[str, Tensor]] = {IMAGE: {}, TEXT: {}, HEAD: {}}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in (*parts, *NOT_USED) if name.startswith(prefix)), None)
        if prefix is None:
            raise ValueError(
                f"{file} does not hold ImageReward: it holds {name}; name another file"
            )
        name = name.removeprefix(prefix)
        for ours, theirs in VISION_NAMES.items() if prefix == IMAGE else ():
            name = name.replace(ours, theirs)
        parts.setdefault(prefix, {})[name] = tensor
    return [parts[IMAGE], parts[TEXT], parts[HEAD]]


def vision_config(tensors: Mapping[str, Tensor]) -> Any:
    """BLIP's ViT of the size of ``tensors``, with the 1e-6 that BLIP's norms have."""
    width, _, patch, _ = tensors["embeddings.patch_embedding.weight"].shape
    grid = round((tensors["embeddings.position_embedding"].shape[1] - 1) ** 0.5)
    return import_transformers().BlipVisionConfig(
        hidden_size=width,
        intermediate_size=tensors["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_num_layers("encoder.layers.", tensors),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=grid * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )


def text_config(tensors: Mapping[str, Tensor], image_width: int) -> Any:
    """BLIP's BERT of the size of ``tensors``, with cross attention to the image."""
    vocabulary, width = tensors["embeddings.word_embeddings.weight"].shape
    return import_transformers().BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=image_width,
        intermediate_size=tensors["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_num_layers("encoder.layer.", tensors),
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=tensors["embeddings.position_embeddings.weight"].shape[0],
        is_decoder=True,
    )


def _num_layers(prefix: str, tensors: Mapping[str, Tensor]) -> int:
    return len({name.split(".")[2] for name in tensors if name.startswith(prefix)})
