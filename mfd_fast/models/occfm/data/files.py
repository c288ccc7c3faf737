"""The files of occupancy forecasting: labels, scene lists and cached latents, read and written.

DATA/nuscenes/gts/<scene>/<token>/labels.npz                     class ids of one key frame
DATA/nuscenes/nuscenes_infos_{train,val}_temporal_v3_scene.pkl   scenes, order, ego motion
DATA/nusc_latent_vae/<size>/nus_sem_occ_{training,validation}.pkl  latents of a VAE, one a frame
"""

import math
import pickle
import reprlib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mfd_fast.files.pickles import load_plain_pickle
from mfd_fast.files.whole import written
from mfd_fast.models.occfm.data.classes import CLASSES, SPLITS

# zipfile's for a method or a flag that it does not know is the last one.
NPZ_ERRORS = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, KeyError, RuntimeError)
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
MAX_GRID_BYTES = 1 << 26  # of a key frame; 512 x 512 x 40 ids of four bytes are 40 MiB


class KeyFrame(NamedTuple):
    """One key frame of the scene list."""

    scene: str
    token: str
    displacement: np.ndarray
    """Ego motion in metres from this key frame to the next, float32 ``[2]``."""


def labels_path(data: Path, scene: str, token: str) -> Path:
    """Where the class ids of a key frame lie."""
    return data / "nuscenes" / "gts" / scene / token / "labels.npz"


def info_path(data: Path, split: str) -> Path:
    """Where the scene list of a split lies."""
    return data / "nuscenes" / f"nuscenes_infos_{SPLITS[split]}_temporal_v3_scene.pkl"


def latents_path(data: Path, split: str, size: str = "x16") -> Path:
    """Where the cached latents of a split lie; ``size`` is named after their channels."""
    return data / "nusc_latent_vae" / size / f"nus_sem_occ_{split}.pkl"


def read_labels(path: Path) -> np.ndarray:
    """Class ids uint8 ``[X, Y, Z]`` of one key frame.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: truncated, without ``semantics``, not a grid, or ids that are no class.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"expected the labels of a key frame at {path}, found none; copy the missing frame"
        )
    try:
        grid = _array_of(path, "semantics")
    except NPZ_ERRORS as error:
        raise ValueError(
            f"expected an array 'semantics' in {path}, got {path.stat().st_size} bytes without a "
            f"readable one ({error}); copy the file again"
        ) from error
    if grid.ndim != 3 or grid.dtype.kind not in "iu" or grid.size == 0:
        raise ValueError(
            f"expected class ids of shape [X, Y, Z] in {path}, got {grid.dtype} of shape "
            f"{list(grid.shape)}; copy the file again"
        )
    if grid.min() < 0 or grid.max() >= len(CLASSES):
        raise ValueError(
            f"expected class ids 0 to {len(CLASSES) - 1} in {path}, got {grid.min()} to "
            f"{grid.max()}; these are not Occ3D-nuScenes labels"
        )
    return grid.astype(np.uint8)


def _array_of(path: Path, name: str) -> np.ndarray:
    """An array of an ``.npz``: a zip file of ``.npy`` files.

    Its header may claim any shape, and deflate holds a thousand zeros in a byte: what is more than
    a grid is refused before there is room for it.
    """
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        if archive.getinfo(file.name).compress_type not in ZIP_METHODS:
            raise ValueError("it is compressed by another method than numpy's")
        if (version := np.lib.format.read_magic(file)) != (1, 0):
            raise ValueError(f"an array's header has version {version} instead of (1, 0)")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if (size := math.prod(shape) * dtype.itemsize) > MAX_GRID_BYTES:
            raise ValueError(
                f"its header claims {size} bytes, more than the {MAX_GRID_BYTES} of a grid here"
            )
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)


def read_key_frames(path: Path) -> list[KeyFrame]:
    """Every key frame of the scene list, scene by scene in order of time.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is broken, or an entry is not as it should be.
    """
    tree = load_plain_pickle(path)
    scenes = tree.get("infos") if isinstance(tree, dict) else None
    if not isinstance(scenes, dict) or not scenes:
        raise ValueError(
            f"expected a dict with the scenes under 'infos' in {path}, got {_describe(tree)}; "
            "give the scene list that ends in _temporal_v3_scene.pkl"
        )
    frames = []
    for scene, entries in scenes.items():
        if not isinstance(entries, list):
            raise ValueError(
                f"expected a list of key frames for {scene} in {path}, got {_describe(entries)}"
            )
        frames += [_key_frame(entry, scene, i, path) for i, entry in enumerate(entries)]
    if len({frame.token for frame in frames}) != len(frames):
        raise ValueError(f"expected every token once in {path}, got some twice; copy it again")
    return frames


def _key_frame(entry: Any, scene: Any, position: int, path: Path) -> KeyFrame:
    where = f"key frame {position} of {scene} in {path}"
    if not isinstance(entry, dict) or not {"token", "gt_ego_fut_trajs"} <= entry.keys():
        raise ValueError(f"expected a dict with token and gt_ego_fut_trajs as {where}, got "
                         f"{_describe(entry)}")  # fmt: skip
    steps = _numbers(entry["gt_ego_fut_trajs"], f"gt_ego_fut_trajs of {where}")
    if steps.ndim != 2 or steps.shape[0] < 1 or steps.shape[1] != 2:
        raise ValueError(
            f"expected gt_ego_fut_trajs of shape [steps, 2] in {where}, got {list(steps.shape)}"
        )
    if not isinstance(scene, str) or not isinstance(entry["token"], str):
        raise ValueError(f"expected texts as scene and token of {where}, got "
                         f"{_describe(scene)} and {_describe(entry['token'])}")  # fmt: skip
    return KeyFrame(scene, entry["token"], steps[0].astype(np.float32))


def read_latents(path: Path) -> dict[str, np.ndarray]:
    """Token -> latent ``[C, h, w]`` of that key frame, unscaled, floats, views into the pickle.

    The whole file is held in memory, once.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is broken, or an entry is not as it should be.
    """
    entries = load_plain_pickle(path)
    if not isinstance(entries, list) or not entries:
        raise ValueError(
            f"expected a list of cached frames in {path}, got {_describe(entries)}; give the "
            "latents that a VAE cached, nus_sem_occ_training.pkl or nus_sem_occ_validation.pkl"
        )
    latents: dict[str, np.ndarray] = {}
    for i, entry in enumerate(entries):
        token, latent = _latent(entry, f"entry {i} of {path}")
        if token in latents:
            raise ValueError(f"expected every token once in {path}, got {token} twice")
        latents[token] = latent
    shapes = {latent.shape for latent in latents.values()}
    if len(shapes) > 1:
        raise ValueError(f"expected latents of one shape in {path}, got {sorted(shapes)}")
    return latents


def _latent(entry: Any, where: str) -> tuple[str, np.ndarray]:
    if not isinstance(entry, dict) or not {"x_sampled", "gt_path"} <= entry.keys():
        raise ValueError(
            f"expected a dict with x_sampled and gt_path as {where}, got {_describe(entry)}"
        )
    value = _numbers(entry["x_sampled"], f"x_sampled of {where}")
    if value.ndim != 4 or value.shape[0] != 1:
        raise ValueError(
            f"expected x_sampled of shape [1, C, h, w] in {where}, got {list(value.shape)}"
        )
    if value.dtype.kind != "f" or not np.isfinite(value).all():
        raise ValueError(
            f"expected finite latents in {where}, got {value.dtype}, infinite or NaN values"
        )
    return _token(entry["gt_path"], where), value[0]


def _token(gt_path: Any, where: str) -> str:
    """``data/nuscenes/gts/<scene>/<token>/labels.npz``, bare or in nested lists of one element."""
    while isinstance(gt_path, (list, tuple)) and len(gt_path) == 1:
        gt_path = gt_path[0]
    parts = gt_path.split("/") if isinstance(gt_path, str) else []
    if len(parts) < 3 or parts[-1] != "labels.npz":
        raise ValueError(
            f"expected a gt_path ending in <scene>/<token>/labels.npz in {where}, got "
            f"{reprlib.repr(gt_path)}"
        )
    return parts[-2]


def _numbers(value: Any, what: str) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"expected numbers as {what}, got something else: {error}") from error
    if array.dtype.kind not in "iuf":
        raise ValueError(f"expected numbers as {what}, got {_describe(value)}")
    return array


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return f"a dict with {sorted(key for key in value if isinstance(key, str))[:8]}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if hasattr(value, "__len__") else "")


def write_labels(path: Path, grid: np.ndarray) -> None:
    """Class ids uint8 ``[X, Y, Z]`` as a ``labels.npz`` in which every voxel was seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seen = np.ones_like(grid)
    np.savez_compressed(path, semantics=grid, mask_lidar=seen, mask_camera=seen)


def write_key_frames(path: Path, scenes: Mapping[str, list[dict[str, Any]]]) -> None:
    """A scene list: scene -> dicts with ``token`` and ``gt_ego_fut_trajs`` ``[steps, 2]``."""
    _write_pickle(path, {"infos": dict(scenes), "metadata": {"version": "synthetic"}})


def write_latents(
    data: Path, split: str, encode: Callable[[np.ndarray], np.ndarray], *, size: str = "x16"
) -> Path:
    """Cache the latent of every key frame of a split; returns the file.

    Args:
        data: folder with labels and scene list.
        split: ``training`` or ``validation``.
        encode: class ids uint8 ``[X, Y, Z]`` -> one drawn latent ``[C, h, w]``, unscaled.
        size: name of the folder of the file, by custom ``x`` and the number of channels.
    """

    def entries() -> Iterable[dict[str, Any]]:
        for frame in read_key_frames(info_path(data, split)):
            latent = encode(read_labels(labels_path(data, frame.scene, frame.token)))
            yield {
                "x_sampled": np.asarray(latent, dtype=np.float32)[None],
                "gt_path": [[f"data/nuscenes/gts/{frame.scene}/{frame.token}/labels.npz"]],
                "gt_trajs": frame.displacement[None],
            }

    path = latents_path(data, split, size)
    _write_pickle(path, list(entries()))
    return path


def _write_pickle(path: Path, value: Any) -> None:
    with written(path) as partial, partial.open("wb") as file:
        pickle.dump(value, file, protocol=4)
