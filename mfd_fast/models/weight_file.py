"""Weights of a small network and the config that rebuilds it, in one safetensors file.

The header holds a single metadata entry, JSON with sorted keys, so that the same weights always
give the same bytes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mfd_fast.files import written

HEADER_KEY = "mfd_fast"


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
        header = json.loads(text)
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
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
    return tensors, header["config"], header["metadata"]


def load_network(path: str | Path, kind: str, config: type, network: type) -> Any:
    """The ``network(config(...))`` of a file: float32, bit for bit, on the CPU, in eval mode.

    Raises: as :func:`load_weights`, and ``ValueError`` if the file does not fit its own config.
    """
    tensors, entries, _ = load_weights(path, kind=kind)
    try:
        model = network(config(**entries))
    except TypeError as error:
        raise ValueError(
            f"expected the config of a {network.__name__} in {path}, got {entries}; the file may "
            f"come from another version of mfd_fast, write it again ({error})"
        ) from error
    load_into(model, tensors, path)
    return model.eval()


def load_into(network: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Copy ``tensors`` into ``network``; ``ValueError`` when names or shapes differ."""
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if different := sorted(expected.items() ^ found.items()):
        name = different[0][0]
        raise ValueError(
            f"expected {name} of shape {expected.get(name, 'none')} in {path} to fit the config of "
            f"the same file, got {found.get(name, 'none')}; copy or train the file again"
        )
    network.load_state_dict(tensors)
