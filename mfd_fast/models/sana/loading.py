"""Loading a SANA transformer from diffusers' folder layout: JSON and safetensors, no pickles.

    FOLDER/transformer/config.json
    FOLDER/transformer/diffusion_pytorch_model[.VARIANT].safetensors
    or, sharded,       diffusion_pytorch_model.safetensors.index[.VARIANT].json and its shards

FOLDER may also be the transformer folder itself, or a model id of the Hugging Face hub, of which
only those files are fetched (or found in the cache, offline).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mfd_fast.files.compare import differences
from mfd_fast.files.plain import read_json
from mfd_fast.files.weights import outline
from mfd_fast.hub import fetch
from mfd_fast.models.sana.config import SanaConfig
from mfd_fast.models.sana.network import SanaNetwork

SUBFOLDER = "transformer"
CONFIG = "config.json"
STEM = "diffusion_pytorch_model"
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def load_sana_transformer(
    folder_or_id: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    time_table: bool = False,
) -> SanaNetwork:
    """The network of a checkpoint, frozen and in eval mode.

    Args:
        folder_or_id: a folder that diffusers' ``save_pretrained`` wrote (of a pipeline or of its
            transformer alone), or a model id such as ``"owner/name"``.
        revision: branch, tag or commit of a model id.
        variant: the part of the file names that diffusers calls so (``"fp16"``).
        dtype: what the weights are cast to as they are read; float32, bfloat16 or float64.
        device: where they are put, one tensor at a time: nothing is held twice.
        time_table: see ``SanaNetwork``.

    Raises:
        FileNotFoundError: names the folder, model or file that is missing.
        ValueError: a file that is broken, a config or tensors that do not fit, by name.
    """
    if dtype not in DTYPES:
        raise ValueError(
            f"dtype must be one of {list(DTYPES)}, got {dtype}; SANA's activations leave the range "
            "of float16"
        )
    network, files = _checked(folder_or_id, revision, variant, time_table=time_table)
    network.to(dtype).to_empty(device=device)
    _read_tensors(network, files)
    return network.eval().requires_grad_(False)


def check_sana_transformer(
    folder_or_id: str | Path, *, revision: str | None = None, variant: str | None = None
) -> list[Path]:
    """The weight files of a checkpoint, names and shapes compared, no weight read.

    Raises as :func:`load_sana_transformer`.
    """
    return _checked(folder_or_id, revision, variant, time_table=False)[1]


def _checked(
    folder_or_id: str | Path, revision: str | None, variant: str | None, *, time_table: bool
) -> tuple[SanaNetwork, list[Path]]:
    """The network on the meta device, and the files that fit it."""
    folder = _transformer_folder(folder_or_id, revision, variant)
    config = _read_config(folder / CONFIG)
    files = weight_files(folder, variant, STEM)
    found: dict[str, list[int]] = {}
    for path in files:
        with _open(path) as file:
            found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    try:
        network = outline(lambda: SanaNetwork(config, time_table=time_table), len(found))
    except (ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}; copy {folder} again") from error
    _check_tensors(network, found, folder)
    return network, files


def _transformer_folder(
    folder_or_id: str | Path, revision: str | None, variant: str | None
) -> Path:
    path = Path(folder_or_id)
    if path.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision {revision!r} belongs to a model id; {path} is a local folder"
            )
        folder = path / SUBFOLDER if (path / SUBFOLDER).is_dir() else path
    else:
        names = [CONFIG, *weight_patterns(variant, STEM)]
        patterns = [f"{SUBFOLDER}/{name}" for name in names]
        folder = fetch(str(folder_or_id), revision, patterns) / SUBFOLDER
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} has no {CONFIG}; expected the folder of a diffusers pipeline with "
            f"{SUBFOLDER}/{CONFIG}, or its {SUBFOLDER} folder"
        )
    return folder


def read_checkpoint_json(
    folder_or_id: str | Path, name: str, revision: str | None = None
) -> dict[str, Any]:
    """A JSON file of a checkpoint by its name in the folder, such as ``vae/config.json``.

    ``FileNotFoundError`` or ``ValueError`` names the file that is missing or broken.
    """
    folder = Path(folder_or_id)
    if not folder.is_dir():
        folder = fetch(str(folder_or_id), revision, [name])
    if not (folder / name).is_file():
        raise FileNotFoundError(
            f"{folder} has no {name}; expected the folder of a whole diffusers pipeline"
        )
    return _read_json(folder / name)


def component(
    folder_or_id: str | Path,
    part: str,
    stem: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    others: tuple[str, ...] = (),
) -> tuple[Path, str | None, str | None]:
    """Where a part of a pipeline other than the transformer lies.

    Args:
        folder_or_id, revision: as for :func:`load_sana_transformer`.
        part: its folder in the checkpoint, and ``stem`` of its weight files.
        variant: of the transformer; a part without it is taken as it is.
        others: further files of a hub model to fetch.

    Returns:
        The local folder of the checkpoint, the variant that the part has, and the commit of a hub
        model.
    """
    folder = Path(folder_or_id)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision {revision!r} belongs to a model id; {folder} is a local folder"
            )
        return folder, variant if _has_weights(folder / part, variant, stem) else None, None
    for choice in dict.fromkeys([variant, None]):
        names = [f"{part}/{name}" for name in (CONFIG, *weight_patterns(choice, stem))]
        folder = fetch(str(folder_or_id), revision, [*others, *names])
        if _has_weights(folder / part, choice, stem):
            return folder, choice, folder.name
    return folder, None, folder.name


def _has_weights(folder: Path, variant: str | None, stem: str) -> bool:
    return any(next(folder.glob(name), None) for name in weight_patterns(variant, stem))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


def _read_config(path: Path) -> SanaConfig:
    try:
        return SanaConfig.from_dict(_read_json(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _index_name(variant: str | None, stem: str) -> str:
    middle = "" if variant is None else f".{variant}"
    return f"{stem}.safetensors.index{middle}.json"


def weight_patterns(variant: str | None, stem: str) -> list[str]:
    """What the files with the weights of a variant may be called."""
    middle = "" if variant is None else f".{variant}"
    return [
        f"{stem}{middle}.safetensors",
        f"{stem}{middle}-*.safetensors",
        _index_name(variant, stem),
    ]


def weight_files(folder: Path, variant: str | None, stem: str) -> list[Path]:
    """The files with the weights, all of which exist.

    ``FileNotFoundError`` names what is missing, ``ValueError`` an index that is broken.
    """
    middle = "" if variant is None else f".{variant}"
    single, index = folder / f"{stem}{middle}.safetensors", folder / _index_name(variant, stem)
    if single.is_file():
        return [single]
    if not index.is_file():
        there = sorted(path.name for path in folder.iterdir() if path.name.startswith(stem))
        pickled = [name for name in there if name.endswith(".bin")]
        hint = (
            "only safetensors are read: convert the .bin with diffusers' save_pretrained"
            if pickled and pickled == there
            else "check the folder and the variant"
        )
        raise FileNotFoundError(
            f"{folder} has neither {single.name} nor {index.name}; of the weights it has "
            f"{there}: {hint}"
        )
    names = _read_json(index).get("weight_map")
    is_map = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
    if not is_map or any(Path(name).name != name for name in names.values()):
        raise ValueError(
            f"{index} must hold a weight_map from tensors to files of its own folder; copy it again"
        )
    shards = [folder / name for name in sorted(set(names.values()))]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise FileNotFoundError(
            f"{folder} lacks {missing} of the {len(shards)} files that {index.name} lists; "
            "copy or download it again"
        )
    return shards


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}); copy or download it again"
        ) from error


def check_complete(files: list[Path]) -> None:
    """``ValueError`` names the first file that is no whole safetensors file."""
    for path in files:
        with _open(path):
            pass


def _check_tensors(network: SanaNetwork, found: dict[str, list[int]], folder: Path) -> None:
    """Compare names and shapes before anything is read; ``ValueError`` names what differs."""
    wanted = network.state_dict()
    if listed := differences(found, wanted, unknown="not of this network"):
        raise ValueError(
            f"the tensors in {folder} do not fit its {CONFIG}: {listed}. Copy both again"
        )


@torch.no_grad()
def _read_tensors(network: SanaNetwork, files: list[Path]) -> None:
    """Copy every tensor into the network's own, cast and moved on the way."""
    targets: Mapping[str, Tensor] = network.state_dict()
    for path in files:
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118
                targets[name].copy_(file.get_tensor(name))
