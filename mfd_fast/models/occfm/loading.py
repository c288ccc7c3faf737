"""Reading OccFM's networks, from published checkpoints or from files of this project.

A published checkpoint is a ``.ckpt`` that torch saved: ``state_dict`` has the weights as they were
trained, ``ema_model`` their running average (or None), every name with ``module.`` before it.  A
world model's has the whole VAE too.  It may hold tensors and plain containers; a pickle that names
anything else is refused unread (:mod:`mfd_fast.files.torch_pickles`).

Averaging also went over the integer buffers, the tables of offsets in a window, and rounded some of
their entries down by one.  The published scores were taken with these: they are kept, and counted
in a warning, unless ``repair`` asks for the tables as they were meant.

Files of this project are safetensors with the config in their header.
"""

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mfd_fast.files.compare import differences, some
from mfd_fast.files.torch_pickles import load_torch_file
from mfd_fast.files.weights import load_network, outline, save_weights
from mfd_fast.models.occfm.config import OccfmConfig
from mfd_fast.models.occfm.network import OccfmNetwork
from mfd_fast.models.occfm.run_config import RunConfigs, read_run_configs
from mfd_fast.models.occfm.vae.config import VAE_CONFIGS, VaeConfig
from mfd_fast.models.occfm.vae.swin import relative_index
from mfd_fast.models.occfm.vae.vae import OccupancyVae
from mfd_fast.models.occfm.vae.vae3d import OccupancyVae3d

TRANSITION = "transition_model."
VAE_PARTS = ("embedding.", "encoder.", "decoder.")
WRAPPER = "module."
INDEX = "relative_position_index"
TRANSITION_KIND, VAE_KIND, VAE3D_KIND = "occfm_transition", "occfm_vae", "occfm_vae3d"
OWN_SUFFIX = ".safetensors"
MAX_NAMED = 4  # tensors named in an error

Network = TypeVar("Network", bound=nn.Module)


def load_transition(
    path: str | Path,
    *,
    config: OccfmConfig | None = None,
    ema: bool | None = None,
    base_folder: str | Path = ".",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> OccfmNetwork:
    """The transition network of a world model's checkpoint, frozen, in eval mode.

    Args:
        path: a published ``.ckpt``, or what :func:`save_occfm_transition` wrote.
        config: of a ``.ckpt``; None for that of the YAML file in its run's folder.
        ema: the average (True) or the weights as trained (False); None for the average if the file
            has one.
        base_folder: see :func:`read_run_configs`.
        dtype, device: of the result.

    Raises:
        FileNotFoundError: the file, or the YAML it needs, is missing.
        ValueError: names the file and what is wrong with it, or the tensors that do not fit.
    """
    path = Path(path)
    if path.suffix == OWN_SUFFIX:
        network = load_network(path, TRANSITION_KIND, OccfmConfig, OccfmNetwork)
    else:
        state = read_checkpoint(path, ema=ema)
        if not any(name.startswith(TRANSITION) for name in state):
            raise ValueError(
                f"expected a world model in {path}, got a checkpoint without {TRANSITION}*; a VAE "
                "is read by load_vae"
            )
        if config is None:
            config = run_configs_of(path, base_folder=base_folder).transition
            if config is None:
                raise ValueError(f"the YAML beside {path} is one of a VAE; give config=")
        own = {n.removeprefix(TRANSITION): t for n, t in state.items() if n.startswith(TRANSITION)}
        _check_names(state, (TRANSITION, *VAE_PARTS), path)
        network = _filled(OccfmNetwork, config, own, path)
    return _frozen(network, dtype, device)


def load_vae(
    path: str | Path,
    *,
    config: VaeConfig | None = None,
    ema: bool | None = None,
    repair: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> OccupancyVae:
    """The VAE of a checkpoint (a world model's has it too), frozen, in eval mode.

    Args:
        path: a published ``.ckpt``, or what :func:`save_occfm_vae` wrote.
        config: of a ``.ckpt``; None for the published sizes with the file's latent channels.
        ema: see :func:`load_transition`.
        repair: put back the tables of offsets that averaging damaged.
        dtype, device: of the result.

    Raises: as :func:`load_transition`.
    """
    config = config or VAE_CONFIGS["occfm_vae"]
    return _load_vae(OccupancyVae, Path(path), config, ema, repair, dtype, device)


def load_vae3d(
    path: str | Path,
    *,
    config: VaeConfig | None = None,
    ema: bool | None = None,
    repair: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> OccupancyVae3d:
    """The 3-D VAE of a checkpoint; everything else as :func:`load_vae`."""
    config = config or VAE_CONFIGS["occfm_3dvae"]
    return _load_vae(OccupancyVae3d, Path(path), config, ema, repair, dtype, device)


def save_occfm_transition(
    network: OccfmNetwork, path: str | Path, *, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a teacher or student with its config, atomically; :func:`load_transition` reads it."""
    save_weights(
        network,
        path,
        kind=TRANSITION_KIND,
        config=asdict(network.config),
        metadata=metadata or {},
    )


def save_occfm_vae(
    vae: OccupancyVae, path: str | Path, *, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a VAE with its config, atomically; ``load_vae`` or ``load_vae3d`` reads it."""
    kind = VAE_KIND if vae.config.clip is None else VAE3D_KIND
    save_weights(vae, path, kind=kind, config=asdict(vae.config), metadata=metadata or {})


def run_configs_of(checkpoint: str | Path, *, base_folder: str | Path = ".") -> RunConfigs:
    """The configurations of a published checkpoint, from the YAML file of its run's folder.

    That is the folder of the checkpoint or, of ``RUN/ckpt/NAME.ckpt``, RUN.  ``FileNotFoundError``
    if neither has a YAML file, ``ValueError`` if one has several.
    """
    folder = Path(checkpoint).resolve().parent
    for candidate in (folder, folder.parent):
        files = sorted([*candidate.glob("*.yaml"), *candidate.glob("*.yml")])
        if len(files) > 1:
            raise ValueError(
                f"{candidate} has {len(files)} YAML files, {[f.name for f in files]}; leave the "
                "run's own there, or give config="
            )
        if files:
            return read_run_configs(files[0], base_folder=base_folder)
    raise FileNotFoundError(
        f"neither {folder} nor {folder.parent} has the YAML file of the run of "
        f"{Path(checkpoint).name}; put it there, or give config="
    )


def read_checkpoint(path: str | Path, *, ema: bool | None = None) -> dict[str, Tensor]:
    """The tensors of a published ``.ckpt`` by their plain names, on the CPU.

    Args:
        path: the file.
        ema: see :func:`load_transition`.
    """
    path = Path(path)
    content = load_torch_file(path)
    if not isinstance(content, dict) or "state_dict" not in content:
        keys = sorted(map(str, content))[:MAX_NAMED] if isinstance(content, dict) else content
        found = f"keys {keys}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(
            f"expected 'state_dict' (and 'ema_model') in {path}, got {found}; give a checkpoint "
            "of OccFM"
        )
    average = content.get("ema_model")
    if ema and average is None:
        raise ValueError(f"{path} has no average (ema_model); give ema=False")
    use_average = average is not None if ema is None else ema
    return _plain_names(average if use_average else content["state_dict"], path)


def _plain_names(state: Any, path: Path) -> dict[str, Tensor]:
    """Without the count of averages and without one ``module.`` before every name."""
    if not isinstance(state, dict) or not state:
        raise ValueError(f"expected the tensors of a network in {path}, got {type(state).__name__}")
    state = {name: value for name, value in state.items() if name != "n_averaged"}
    if strange := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"expected only tensors in {path}, got others: {some(strange)}")
    if all(name.startswith(WRAPPER) for name in state):
        return {name.removeprefix(WRAPPER): value for name, value in state.items()}
    if wrapped := [name for name in state if name.startswith(WRAPPER)]:
        raise ValueError(f"{path}: {WRAPPER} is before some names and not others: {some(wrapped)}")
    return state


def _load_vae(
    cls: type[OccupancyVae],
    path: Path,
    config: VaeConfig,
    ema: bool | None,
    repair: bool,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Any:
    if path.suffix == OWN_SUFFIX:
        kind = VAE3D_KIND if cls is OccupancyVae3d else VAE_KIND
        return _frozen(load_network(path, kind, VaeConfig, cls), dtype, device)
    state = read_checkpoint(path, ema=ema)
    _check_names(state, (TRANSITION, *VAE_PARTS), path)
    own = {name: tensor for name, tensor in state.items() if name.startswith(VAE_PARTS)}
    first = own.get("decoder.conv_in.weight")
    if first is not None and first.ndim == 4:
        config = VaeConfig(**{**asdict(config), "latent_channels": first.shape[1]})
    vae = _filled(cls, config, own, path)
    _check_tables(vae, path, repair)
    return _frozen(vae, dtype, device)


def _check_names(state: Mapping[str, Tensor], parts: tuple[str, ...], path: Path) -> None:
    if unknown := [name for name in state if not name.startswith(parts)]:
        raise ValueError(
            f"expected only {[f'{part}*' for part in parts]} in {path}, got {some(unknown)}"
        )


def _filled(cls: type[Network], config: Any, tensors: Mapping[str, Tensor], path: Path) -> Network:
    """Load strictly; ``ValueError`` names what is missing, unknown or of another shape or kind."""
    try:
        wanted = outline(lambda: cls(config), len(tensors)).state_dict()
    except (ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path} and its config do not belong together: {error}") from error
    faults = differences(tensors, wanted), _of_another_kind(tensors, wanted)
    if listed := "; ".join(filter(None, faults)):
        raise ValueError(
            f"the tensors in {path} are not those of {cls.__name__}: {listed}. Check "
            "that the file and the config belong together"
        )
    network = cls(config)
    network.load_state_dict(tensors)
    return network


def _of_another_kind(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    kinds = [
        f"{name} {tensors[name].dtype} in place of {wanted[name].dtype}"
        for name in sorted(wanted.keys() & tensors.keys())
        if tensors[name].is_floating_point() != wanted[name].is_floating_point()
    ]
    return f"of another kind: {some(kinds)}" if kinds else ""


def _check_tables(vae: OccupancyVae, path: Path, repair: bool) -> None:
    """Count, and if asked repair, entries of the tables of offsets that are not the formula's."""
    meant, wrong = relative_index(), 0
    tables = [buffer for name, buffer in vae.named_buffers() if name.endswith(INDEX)]
    for table in tables:
        if table.min() < 0 or table.max() > meant.max():
            raise ValueError(
                f"{path}: a {INDEX} has entries outside 0 to {meant.max().item()}; copy it again"
            )
        wrong += int((table != meant).sum())
        if repair:
            table.copy_(meant)
    if wrong:
        done = (
            "repaired" if repair else "kept as the published scores have them (repair=True mends)"
        )
        warnings.warn(
            f"{path}: {wrong} of {len(tables) * meant.numel()} offsets in the windows' tables are "
            f"not what they were meant to be, an effect of averaging; {done}",
            stacklevel=4,
        )


def _frozen(network: Network, dtype: torch.dtype, device: torch.device | str) -> Network:
    return network.to(device=device, dtype=dtype).eval().requires_grad_(False)
