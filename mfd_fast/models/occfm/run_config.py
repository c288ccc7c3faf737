"""The YAML file of an OccFM run: what its checkpoints were trained as.

A mapping anywhere in the file may name a ``_BASE_CONFIG_``: that file is the mapping's content, and
its other keys override it.  Sections are found by a key that only they have, wherever they stand.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mfd_fast.files.plain import read_yaml
from mfd_fast.models.occfm.config import OccfmConfig
from mfd_fast.models.occfm.vae.config import VaeConfig

BASE = "_BASE_CONFIG_"
MAX_BASES = 8  # files that name one another

# The section with the network's sizes and the one with the sampler's, by a key of their own.
NETWORK_KEY, LOSS_KEY = "MODEL_CHANNELS", "UNCOND_SCALE"
DEFAULTS = {"HIST_LAST": 6, "SEQUENCE_LENGTH": 6}


class RunConfigs(NamedTuple):
    """What a run's YAML describes; ``transition`` is None in the run of a VAE."""

    transition: OccfmConfig | None
    vae: VaeConfig


def read_run_configs(path: str | Path, *, base_folder: str | Path = ".") -> RunConfigs:
    """The configurations of a run.

    Args:
        path: the YAML file in the folder of the run.
        base_folder: what the paths of base files start from: the folder that training ran in.

    Raises:
        FileNotFoundError: this file or a base of it is missing.
        ValueError: it is no YAML of a run, a key is missing, or a value does not fit.
    """
    path = Path(path)
    tree = _resolve(_read(path), path, Path(base_folder), MAX_BASES)
    sections = list(_mappings(tree))
    network = _section(sections, NETWORK_KEY)
    try:
        if network is None:
            channels = _value(sections, "LATENT_DIM")
            return RunConfigs(None, VaeConfig(latent_channels=channels))
        loss = _section(sections, LOSS_KEY) or {}
        transition = _transition_config(network, loss, sections)
        return RunConfigs(transition, VaeConfig(latent_channels=transition.latent_channels))
    except (KeyError, TypeError, ValueError) as error:
        reason = f"key {error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path} does not describe a model that can be built here: {reason}; give config="
        ) from error


def _transition_config(
    network: Mapping[str, Any], loss: Mapping[str, Any], sections: list[Mapping[str, Any]]
) -> OccfmConfig:
    pairs = {
        "IN_CHANNELS and OUT_CHANNELS": (network["IN_CHANNELS"], network["OUT_CHANNELS"]),
        "the sides of INPUT_SIZE": tuple(network["INPUT_SIZE"]),
        "the ATTN_HEADs": (network["TEMPORAL_ATTN_HEAD"], network["SPATIAL_ATTN_HEAD"]),
    }
    for what, values in pairs.items():
        if len(values) != 2 or values[0] != values[1]:
            raise ValueError(f"expected {what} to be equal, got {list(values)}")
    return OccfmConfig(
        latent_channels=network["IN_CHANNELS"],
        grid=network["INPUT_SIZE"][0],
        history_last=_value(sections, "HIST_LAST"),
        trajectory_length=_value(sections, "TRAJECTORY_LENGTH"),
        frames=2 * _value(sections, "SEQUENCE_LENGTH"),
        base_width=network["INIT_3D_CONV_CHANNELS"],
        level_multipliers=tuple(network["CHANNEL_MULTI"]),
        condition_width=network["MODEL_CHANNELS"],
        heads=network["TEMPORAL_ATTN_HEAD"],
        head_width=network["ATTN_DIM"],
        first_kernel=network["INIT_KERNEL_SIZE"],
        latent_scale=float(loss["RESCALE_FACTOR"]),
        guidance=float(loss["UNCOND_SCALE"]),
        sample_steps=loss["SAMPLE_STEP"],
        sample_shift=float(loss["ALPHA_STEP"]),
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"expected the YAML file of a run at {path}, found none")
    try:
        tree = read_yaml(path)
    except ValueError as error:
        raise ValueError(f"{path} is not plain YAML ({error}); copy it again") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold a YAML mapping, got a {type(tree).__name__}")
    return tree


def _resolve(tree: Any, source: Path, base_folder: Path, depth: int) -> Any:
    """``tree`` with the content of every base file it names."""
    if not isinstance(tree, dict):
        return tree
    own = {key: value for key, value in tree.items() if key != BASE}
    if BASE in tree:
        path = base_folder / str(tree[BASE])
        if depth == 0:
            raise ValueError(f"{source}: {MAX_BASES} files name one another as {BASE}")
        if not path.is_file():
            raise FileNotFoundError(
                f"{source} builds on {tree[BASE]}, which is not in {base_folder.resolve()}; give "
                "base_folder=, the folder that training ran in, or config="
            )
        own = _override(_resolve(_read(path), path, base_folder, depth - 1), own)
    return {key: _resolve(value, source, base_folder, depth) for key, value in own.items()}


def _override(base: Any, own: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(own, dict)):
        return own
    both = base.keys() & own.keys()
    return {**base, **own, **{key: _override(base[key], own[key]) for key in both}}


def _mappings(tree: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(tree, dict):
        yield tree
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    for child in children:
        yield from _mappings(child)


def _section(sections: list[Mapping[str, Any]], key: str) -> Mapping[str, Any] | None:
    found = [section for section in sections if key in section]
    if any(section != found[0] for section in found):
        raise ValueError(f"{len(found)} sections of a run's YAML have {key} and differ")
    return found[0] if found else None


def _value(sections: list[Mapping[str, Any]], key: str) -> Any:
    """The one value of ``key``, wherever it stands, or its default."""
    found = [section[key] for section in sections if key in section]
    if any(value != found[0] for value in found):
        raise ValueError(f"{key} has several values: {found}")
    if not found and key not in DEFAULTS:
        raise KeyError(key)
    return found[0] if found else DEFAULTS[key]
