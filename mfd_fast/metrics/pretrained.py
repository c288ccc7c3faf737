"""Networks that judge images, from a folder or the hub: whole, of the right kind, or not at all.

    FOLDER/config.json, model*.safetensors, preprocessor_config.json and a tokenizer's files

FOLDER may also be a model id of the Hugging Face hub, of which only those files are fetched (or
found in the cache, offline).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mfd_fast.files.whole import first_line
from mfd_fast.hub import fetch, without_loading_bars

INSTALL = "judging images needs transformers and Pillow: pip install 'mfd-fast[eval]'"
CONFIG, WEIGHTS = "config.json", "model*.safetensors*"
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")
PREPARATION = ("*processor_config.json", "*token*.json", *VOCABULARIES, "merges.txt")
MAX_BATCH = 16  # images in one call of a network
MAX_NAMED = 3  # tensors named in an error


def model_folder(model: str | Path, *, has_weights: bool = True) -> Path:
    """The folder of a model, fetched if it is an id of the hub.

    Args:
        model: folder or model id.
        has_weights: False: its weights are not needed, nor fetched.

    ``FileNotFoundError`` if there is no such model, or no config.json in the folder.
    """
    folder = Path(model)
    if not folder.is_dir():
        patterns = [CONFIG, *PREPARATION, *([WEIGHTS] if has_weights else [])]
        folder = fetch(str(model), None, patterns)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} has no {CONFIG}; expected a folder that transformers' save_pretrained wrote"
        )
    return folder


def read_config(folder: Path, model_types: tuple[str, ...]) -> Any:
    """The config of a model of transformers; ``ValueError`` if it is of none of these types."""
    config = _read(folder, import_transformers().AutoConfig.from_pretrained, folder)
    if config.model_type not in model_types:
        raise ValueError(
            f"expected a model of type {' or '.join(model_types)} in {folder}, got a "
            f"{config.model_type}; name another folder or id"
        )
    return config


def load_network(
    class_name: str,
    config: Any,
    where: str | Path,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Any:
    """A network of transformers in float32, frozen, on the CPU.

    Args:
        class_name: its class there.
        config: of the network.
        where: the folder with its weights.
        tensors: weights by name, used instead; where then is the file they came from.
        options: of the class.

    Raises:
        OSError: the weights are missing.
        ValueError: they are not those of this network.
    """
    network, report = _read(
        where,
        getattr(import_transformers(), class_name).from_pretrained,
        where if tensors is None else None,
        config=config,
        state_dict=tensors,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"the weights in {where} are not those of a {class_name}: {len(missing)} tensors are "
            f"missing, {', '.join(missing[:MAX_NAMED])} first; name another, or copy it again"
        )
    return network.float().eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model; ``OSError`` or ``ValueError`` if it has none."""
    if not any(
        (folder / name).is_file() for name in VOCABULARIES
    ):  # transformers makes an empty one
        raise FileNotFoundError(
            f"{folder} has no tokenizer; expected one of {list(VOCABULARIES)} in it"
        )
    return _read(folder, import_transformers().AutoTokenizer.from_pretrained, folder)


class ImageProcessor:
    """uint8 images to what a network takes; resized by Pillow, as for the published scores.

    Args:
        folder: with the preprocessor_config.json to follow.
        size: without a folder: what CLIP's preprocessor does, at this size.
    """

    def __init__(self, folder: Path | None = None, *, size: int = 0):
        library = import_transformers()
        if folder is not None:
            load = library.AutoImageProcessor.from_pretrained
            self._process = _read(folder, load, folder, backend="pil")
        else:
            edges = {"height": size, "width": size}
            # Before they were two classes, the one without the suffix was Pillow's.
            kind = getattr(library, "CLIPImageProcessorPil", None) or library.CLIPImageProcessor
            self._process = kind(size={"shortest_edge": size}, crop_size=edges)

    def __call__(self, images: Tensor) -> Tensor:
        """Float32 ``[N, 3, h, w]`` on the CPU, of uint8 images ``[N, 3, H, W]``."""
        arrays = [image.numpy() for image in images.cpu()]
        made = self._process(arrays, return_tensors="pt", input_data_format="channels_first")
        return made["pixel_values"]


def check_images(images: Tensor) -> None:
    """``ValueError`` unless images are uint8 ``[N, 3, H, W]``, at least one."""
    is_batch = images.ndim == 4 and images.shape[1] == 3 and len(images) > 0
    if images.dtype != torch.uint8 or not is_batch:
        raise ValueError(
            f"expected uint8 images of shape [N, 3, H, W], got {images.dtype} of shape "
            f"{list(images.shape)}; scale floating point images to 0 ... 255 first"
        )


@torch.no_grad()
def in_batches(
    compute: Callable[..., Tensor], network: nn.Module, device: torch.device, *columns: Any
) -> Tensor:
    """``compute`` of ``MAX_BATCH`` rows at a time, put together on the CPU.

    Args:
        compute: takes a slice of each column.
        network: what it evaluates, on ``device`` during the call and on the CPU otherwise.
        columns: sequences or tensors of one length.
    """
    network.to(device)
    parts = [
        compute(*(column[start : start + MAX_BATCH] for column in columns)).cpu()
        for start in range(0, len(columns[0]), MAX_BATCH)
    ]
    network.to("cpu")
    return torch.cat(parts)


def import_transformers() -> Any:
    """transformers, if Pillow is there too; ``ImportError`` says what to install."""
    try:
        import PIL  # noqa: F401
        import transformers
    except ImportError as error:
        raise ImportError(INSTALL) from error
    without_loading_bars()
    return transformers


def _read(where: str | Path, load: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What ``load`` returns; its errors in one sentence, with the place in it."""
    try:
        return load(*args, **options)
    except OSError as error:
        raise OSError(f"{where}: {first_line(error)}") from error
    except Exception as error:  # a broken file, or one of another library version, may raise any
        raise ValueError(f"{where} cannot be used: {first_line(error)}") from error
