"""Weights of a small network and the config that rebuilds it, in one safetensors file.

The header holds a single metadata entry, JSON with sorted keys, so that the same weights always
give the same bytes.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mfd_fast.files.plain import parse_json
from mfd_fast.files.whole import written

HEADER_KEY = "mfd_fast"
SPARE_PARAMETERS = 1000  # so many a network may have that a file lacks, for the error to name one


def save_weights(
    network: nn.Module,
    path: str | Path,
    *,
    kind: str,
    config: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> None:
    """Write ``network`` to ``path`` in one atomic step; a killed write leaves no half file.

    Args:
        network: its state dict is written as it is, on the CPU, bit for bit.
        path: the file; its folder is made if it is missing.
        kind: what the network is (``"dit"``); ``load_weights`` refuses another kind.
        config: keyword arguments that build the network again, as JSON values.
        metadata: anything else worth keeping, as JSON values.
    """
    path = Path(path)
    header = {"kind": kind, "config": dict(config), "metadata": dict(metadata)}
    tensors = {name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()}
    with written(path) as partial:
        partial.write_bytes(save(tensors, {HEADER_KEY: json.dumps(header, sort_keys=True)}))


def load_weights(
    path: str | Path, *, kind: str
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Read what ``save_weights`` wrote: the tensors, the config and the metadata.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, not from ``save_weights``, or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a {kind} weights file at {path}, found none; check the path, or write one "
            f"with save_{kind}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER_KEY, "null")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = parse_json(text)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"expected a complete {kind} weights file at {path}, got {path.stat().st_size} bytes "
            f"that do not read as one ({error}); copy or train it again"
        ) from error
    if not isinstance(header, dict) or header.get("kind") != kind:
        found = header.get("kind") if isinstance(header, dict) else "no mfd_fast header"
        raise ValueError(
            f"expected {kind} weights in {path}, got a file with {found!r}; give the path of a "
            f"file written by save_{kind}"
        )
    config, metadata = header.get("config"), header.get("metadata")
    if not isinstance(config, dict) or not isinstance(metadata, dict):
        raise ValueError(f"the header of {path} has no config or metadata; copy or train it again")
    return tensors, config, metadata


def load_network(path: str | Path, kind: str, config: type, network: type) -> Any:
    """The ``network(config(...))`` of a file: float32, bit for bit, on the CPU, in eval mode.

    Raises: as :func:`load_weights`, and ``ValueError`` if the file does not fit its own config.
    """
    tensors, entries, _ = load_weights(path, kind=kind)
    entries = {name: tuple(v) if isinstance(v, list) else v for name, v in entries.items()}
    try:
        sizes = config(**entries)
        expected = outline(lambda: network(sizes), len(tensors))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"expected the config of a {network.__name__} in {path}, got {entries}; the file may "
            f"come from another version of mfd_fast, write it again ({error})"
        ) from error
    check_fit(expected, tensors, path)
    model = network(sizes)
    model.load_state_dict(tensors)
    return model.eval()


def outline(make: Callable[[], nn.Module], num_tensors: int) -> nn.Module:
    """The network without memory for it, to be compared with a file before it is made.

    Its sizes come from a config, which may claim anything: ``ValueError`` as soon as it has many
    more parameters than the file has tensors.
    """
    left = 2 * num_tensors + SPARE_PARAMETERS

    def at_most(*_module_name_and_parameter: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"the config asks for far more than the {num_tensors} tensors there")

    hook = register_module_parameter_registration_hook(at_most)
    try:
        with torch.device("meta"):
            return make()
    finally:
        hook.remove()


def check_fit(network: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """``ValueError`` when names or shapes of ``tensors`` are not those of ``network``."""
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if different := sorted(expected.items() ^ found.items()):
        name = different[0][0]
        raise ValueError(
            f"expected {name} of shape {expected.get(name, 'none')} in {path} to fit the config of "
            f"the same file, got {found.get(name, 'none')}; copy or train the file again"
        )
