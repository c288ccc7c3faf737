"""The student as a full checkpoint: base weights with the adapter merged, in diffusers' layout."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from mfd_fast.files.plain import read_json
from mfd_fast.hub import fetch
from mfd_fast.models.sana.loading import (
    CONFIG,
    STEM,
    SUBFOLDER,
    read_checkpoint_json,
    weight_patterns,
)
from mfd_fast.models.sana.network import SanaNetwork

MODEL_INDEX = "model_index.json"
SAFETENSORS = ".safetensors"
WEIGHTS = (SAFETENSORS, ".bin", ".msgpack", ".onnx", ".pt", ".pth", ".ckpt", ".h5", ".gguf")
STEMS = (STEM, "model")  # what diffusers and transformers call their weights
PLAIN = re.compile(r"[^.]+\.\w+(\.index\.json)?")  # a name without a variant
# Everything of a hub model that is no weights.
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*")


def save_merged(
    network: SanaNetwork,
    config: Mapping[str, Any],
    out: str | Path,
    *,
    base: str | Path,
    revision: str | None = None,
    variant: str | None = None,
) -> Path:
    """Write ``OUT/transformer`` and copy every other part of ``base`` beside it.

    Of several weights of a part, those of the variant are copied, under names without it, so that
    ``SanaPipeline.from_pretrained(OUT)`` needs no variant.

    Args:
        network: with everything merged.
        config: the checkpoint's own transformer/config.json.
        out: a folder that does not exist yet (of ``files.written``, to appear whole or not).
        base: the teacher's folder, or its model id on the hub, of which the rest is fetched.
        revision, variant: as for ``load_sana_transformer``.

    Raises:
        ValueError: ``out`` lies in ``base``.
        FileNotFoundError: ``base`` lacks a part that its model_index.json names.
    """
    out, folder = Path(out), _whole(base, revision, variant)
    if folder.resolve() in out.resolve().parents:
        raise ValueError(f"{out} lies in the checkpoint that it copies; choose another with --out")
    _copy_folder(folder, out, variant)
    (out / SUBFOLDER).mkdir()
    state = {
        name: tensor.cpu().contiguous().clone() for name, tensor in network.state_dict().items()
    }
    save_file(state, out / SUBFOLDER / f"{STEM}{SAFETENSORS}", metadata={"format": "pt"})
    (out / SUBFOLDER / CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n")
    return out / SUBFOLDER


def _whole(base: str | Path, revision: str | None, variant: str | None) -> Path:
    """A local folder with every part of the pipeline."""
    parts = [
        name
        for name, kind in read_checkpoint_json(base, MODEL_INDEX, revision).items()
        if isinstance(kind, list) and None not in kind and name != SUBFOLDER
    ]
    folder = Path(base)
    if not folder.is_dir():
        weights = _patterns(parts, variant)
        folder = fetch(str(base), revision, [*SMALL_FILES, *weights])
        bare = [name for name in parts if _lacks_weights(folder / name)]
        if bare:  # of these there is no such variant
            folder = fetch(str(base), revision, _patterns(bare, None))
    missing = [n for n in parts if not (folder / n).is_dir() or _lacks_weights(folder / n)]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}, which its {MODEL_INDEX} names, so the export "
            "would be no whole checkpoint; copy or download it again, or load the run's "
            "student.safetensors as a LoRA"
        )
    return folder


def _patterns(parts: list[str], variant: str | None) -> list[str]:
    return [
        f"{part}/{name}" for part in parts for s in STEMS for name in weight_patterns(variant, s)
    ]


def _is_weights(path: Path) -> bool:
    return path.suffix in WEIGHTS or ".index." in path.name


def _lacks_weights(folder: Path) -> bool:
    """A model, which has a config.json and no tokens, without any."""
    is_model = (folder / CONFIG).is_file() and "tokenizer" not in folder.name
    return is_model and not any(map(_is_weights, folder.iterdir()))


def _copy_folder(source: Path, target: Path, variant: str | None) -> None:
    """All but the transformer and hidden files; of the weights one set, without its variant."""
    target.mkdir(parents=True)
    mark = re.compile(rf"\.{re.escape(variant or '')}(?=[.-])")
    files = [path for path in source.iterdir() if path.is_file() and path.name[0] != "."]
    weights = [path for path in files if _is_weights(path)]
    marked = [path for path in weights if variant and mark.search(path.name)]
    chosen = marked or [path for path in weights if PLAIN.fullmatch(path.name)] or weights
    if any(path.suffix == SAFETENSORS for path in chosen):
        chosen = [path for path in chosen if SAFETENSORS in path.suffixes]
    for path in [*(path for path in files if path not in weights), *chosen]:
        name = mark.sub("", path.name, count=1) if path in marked else path.name
        if path in marked and ".index." in path.name:
            index = read_json(path)
            shards = index["weight_map"].items()
            index["weight_map"] = {key: mark.sub("", file, count=1) for key, file in shards}
            (target / name).write_text(json.dumps(index, indent=2) + "\n")
        else:
            shutil.copy2(path, target / name)
    for path in source.iterdir():
        if path.is_dir() and path.name[0] != "." and path.name != SUBFOLDER:
            _copy_folder(path, target / path.name, variant)
