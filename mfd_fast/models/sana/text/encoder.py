"""Prompts to embeddings by the checkpoint's own Gemma, exactly as diffusers' SanaPipeline does.

    FOLDER/tokenizer/      tokenizer.json, tokenizer_config.json, ...
    FOLDER/text_encoder/   config.json and model[.VARIANT].safetensors, whole or sharded

The pipeline puts its "complex human instruction" before the prompt, lower-cases and strips the
prompt, pads or cuts to 300 tokens after the instruction, and keeps the first token and the last
299.  The empty prompt, the null condition, is encoded without the instruction.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mfd_fast.files.plain import read_json
from mfd_fast.hub import without_loading_bars
from mfd_fast.models.sana.loading import CONFIG, check_complete, component, weight_files

TOKENIZER, ENCODER, STEM = "tokenizer", "text_encoder", "model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")  # one of them is needed
MODEL_TYPE = "gemma2"
MAX_LENGTH = 300


class SanaTextEncoder:
    """``encode(prompts)`` through ``SanaPipeline.encode_prompt``.

    Args:
        pipeline: a ``SanaPipeline``; only its tokenizer and text encoder are used.
        checkpoint: what :meth:`describe` says about where they came from.
        device: where prompts are encoded.
        stays: False: the weights are on the device only while prompts are encoded.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        checkpoint: dict[str, Any],
        device: torch.device | str = "cpu",
        stays: bool = True,
    ):
        self.pipeline, self.checkpoint = pipeline, checkpoint
        self.device, self.stays = torch.device(device), stays
        self.model: nn.Module = pipeline.text_encoder.eval().requires_grad_(False)
        if stays:
            self.model.to(self.device)
        elif self.device.type == "cuda":
            for tensor in _tensors(self.model):
                tensor.data = tensor.data.pin_memory()
        self.instruction = list(_default_instruction(type(pipeline)))
        self.dim: int = self.model.config.hidden_size
        self.max_length = MAX_LENGTH

    def describe(self) -> dict[str, Any]:
        """See ``data.text_store.TextEncoder``."""
        import diffusers
        import transformers

        is_cuda = self.device.type == "cuda"
        return self.checkpoint | {
            "dim": self.dim,
            "max_length": self.max_length,
            "instruction": self.instruction,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(self.device) if is_cuda else "cpu",
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "diffusers": diffusers.__version__,
            },
        }

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings ``[B, 300, dim]`` in the model's dtype and mask ``[B, 300]`` bool, on the
        device; real tokens come first.
        """
        return self._encode(list(prompts), self.instruction)

    def null(self) -> Tensor:
        """The real tokens of the empty prompt ``[l, dim]``."""
        text, mask = self._encode([""], None)
        if not mask.any():
            raise ValueError(
                "the tokenizer makes no token of the empty prompt; expected <bos>, as Gemma's "
                "does: copy the checkpoint's tokenizer again"
            )
        return text[mask]

    @torch.no_grad()
    def _encode(self, prompts: list[str], instruction: list[str] | None) -> tuple[Tensor, Tensor]:
        with self._on_device():
            text, mask, _, _ = self.pipeline.encode_prompt(
                prompts,
                do_classifier_free_guidance=False,
                device=self.device,
                max_sequence_length=self.max_length,
                complex_human_instruction=instruction,
            )
        return text, mask.bool()

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """The weights are on the device inside; they do not change, so none is copied back."""
        if self.stays:
            yield
            return
        tensors = _tensors(self.model)
        host = [tensor.data for tensor in tensors]
        for tensor in tensors:
            tensor.data = tensor.data.to(self.device, non_blocking=True)
        try:
            yield
        finally:
            for tensor, data in zip(tensors, host, strict=True):
                tensor.data = data


def load_sana_text_encoder(
    folder_or_id: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    stays: bool = True,
) -> SanaTextEncoder:
    """The tokenizer and text encoder of a checkpoint.

    Args:
        folder_or_id: folder of a diffusers SANA pipeline, or its model id.
        revision: branch, tag or commit of a model id.
        variant: as for ``load_sana_transformer``; a text encoder without it is taken as it is.
        dtype: of the weights.
        device: where prompts are encoded.
        stays: see ``SanaTextEncoder``.

    Raises:
        FileNotFoundError: names the folder, model or file that is missing.
        ValueError: a file that is broken or of another kind of model.
        ImportError: names the packages to install.
    """
    SanaPipeline, AutoTokenizer = _classes()
    folder, variant, commit = component(
        folder_or_id, ENCODER, STEM, revision=revision, variant=variant, others=(f"{TOKENIZER}/*",)
    )
    files = _check_files(folder, variant)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / TOKENIZER, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder / TOKENIZER} cannot be loaded ({_on_one_line(error)}); copy it again"
        ) from error
    pipeline = SanaPipeline(
        tokenizer, _load_model(folder / ENCODER, variant, dtype), None, None, None
    )
    checkpoint = {
        "checkpoint": str(folder_or_id) if commit else folder.resolve().name,
        "revision": commit,
        "tokenizer": _hash(sorted((folder / TOKENIZER).iterdir())),
        "config": _hash([folder / ENCODER / CONFIG]),
        "weights": {file.name: file.stat().st_size for file in files},
    }
    return SanaTextEncoder(pipeline, checkpoint=checkpoint, device=device, stays=stays)


def check_sana_text_encoder(
    folder_or_id: str | Path, *, revision: str | None = None, variant: str | None = None
) -> list[Path]:
    """The weight files of a checkpoint's text encoder, none read.

    Raises as :func:`load_sana_text_encoder`.
    """
    _classes()
    folder, variant, _ = component(
        folder_or_id, ENCODER, STEM, revision=revision, variant=variant, others=(f"{TOKENIZER}/*",)
    )
    return _check_files(folder, variant)


def _classes() -> tuple[type, type]:
    try:
        from diffusers import SanaPipeline
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(
            f"encoding prompts needs diffusers and transformers ({error}): "
            "pip install 'mfd-fast[sana]'"
        ) from None
    return SanaPipeline, AutoTokenizer


def _check_files(folder: Path, variant: str | None) -> list[Path]:
    """The weights; raises if one of the files is missing or the model is no Gemma 2."""
    if not any((folder / TOKENIZER / name).is_file() for name in TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{folder / TOKENIZER} has none of {list(TOKENIZER_FILES)}; expected the folder of a "
            f"diffusers SANA pipeline with {TOKENIZER}/ and {ENCODER}/"
        )
    config = folder / ENCODER / CONFIG
    if not config.is_file():
        raise FileNotFoundError(
            f"{config} is missing; expected the folder of a diffusers SANA pipeline"
        )
    try:
        kind = read_json(config)["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{config} is broken ({error!r}); copy it again") from None
    if kind != MODEL_TYPE:
        raise ValueError(f"{config} must be of a {MODEL_TYPE} model, SANA's; got {kind!r}")
    files = weight_files(folder / ENCODER, variant, STEM)
    check_complete(files)
    return files


def _load_model(folder: Path, variant: str | None, dtype: torch.dtype) -> nn.Module:
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import Gemma2Model

    without_loading_bars()
    try:
        model, report = Gemma2Model.from_pretrained(
            folder,
            variant=variant,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise ValueError(
            f"{folder} cannot be loaded ({_on_one_line(error)}); copy it again"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"the weights in {folder} lack {len(missing)} tensors, {missing[0]} first; copy them "
            "again"
        )
    return model


def _on_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _default_instruction(pipeline: type) -> list[str]:
    """What the pipeline puts before a prompt unless told otherwise."""
    parameters = inspect.signature(pipeline.__call__).parameters
    return parameters["complex_human_instruction"].default


def _hash(files: Sequence[Path]) -> str:
    """SHA-256 of the names and contents."""
    digest = sha256()
    for file in filter(Path.is_file, files):
        digest.update(file.name.encode() + b"\0" + sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
