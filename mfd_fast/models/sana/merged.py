"""The student as a full checkpoint: base weights with the adapter merged, in diffusers' layout."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from mfd_fast.models.sana.loading import CONFIG, STEM, SUBFOLDER
from mfd_fast.models.sana.network import SanaNetwork


def save_merged(
    network: SanaNetwork, config: Mapping[str, Any], out: str | Path, *, base: Path | None
) -> Path:
    """Write ``OUT/transformer``; the rest of a local ``base`` pipeline is copied beside it.

    Args:
        network: with everything merged.
        config: the checkpoint's own transformer/config.json.
        out: a folder that does not exist yet.
        base: the teacher's folder; None for a model of the hub, whose other parts stay there.

    ``ValueError`` if ``out`` exists.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists; choose another folder with --out")
    if base is not None:
        shutil.copytree(base, out, ignore=shutil.ignore_patterns(SUBFOLDER))
    folder = out / SUBFOLDER
    folder.mkdir(parents=True)
    state = {
        name: tensor.cpu().contiguous().clone() for name, tensor in network.state_dict().items()
    }
    save_file(state, folder / f"{STEM}.safetensors", metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n")
    return folder
