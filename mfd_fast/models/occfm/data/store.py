"""One split of an occupancy data set as memory-mapped arrays, converted once from its files.

    STORE/<split>/index.json         scenes, and type, shape and checksum of every array
    STORE/<split>/trajectories.npy   float32 [N, 2]         metres to the next key frame
    STORE/<split>/labels.npy         uint8   [N, X, Y, Z]   class ids
    STORE/<split>/latents.npy        float32 [N, C, h, w]   unscaled; only if a VAE cached them

Frames lie scene by scene in order of time, so a window is one slice of every array.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mfd_fast.files.plain import read_json
from mfd_fast.files.whole import clean, written
from mfd_fast.models.occfm.data.files import (
    KeyFrame,
    info_path,
    labels_path,
    latents_path,
    read_key_frames,
    read_labels,
    read_latents,
)

FORMAT = 1
INDEX = "index.json"


class OccupancyStore:
    """The arrays of one split, mapped from disk: what is not touched takes no memory.

    Attributes:
        scenes: name and number of key frames of every scene, in order.
        arrays: ``trajectories``, and ``labels`` and ``latents`` if the store has them.
    """

    def __init__(self, folder: str | Path):
        """
        Raises:
            FileNotFoundError: ``folder`` is no store.
            ValueError: an array is missing, truncated or of another shape than the index says.
        """
        self.folder = Path(folder)
        index = self._read_index()
        self.scenes: list[tuple[str, int]] = [tuple(scene) for scene in index["scenes"]]
        self._expected: dict[str, dict[str, Any]] = index["arrays"]
        self.arrays = {name: self._map(name) for name in self._expected}
        if not all(type(n) is int and n > 0 for _, n in self.scenes) or any(
            len(array) != self.num_frames for array in self.arrays.values()
        ):
            raise ValueError(
                f"the scenes in {self.folder / INDEX} do not have the key frames of the arrays "
                "beside it; run mfd-fast prepare occfm again"
            )

    @property
    def num_frames(self) -> int:
        return sum(count for _, count in self.scenes)

    @property
    def digest(self) -> str:
        """The same for the same frames, wherever they lie."""
        index = json.dumps([self.scenes, self._expected], sort_keys=True)
        return hashlib.sha256(index.encode()).hexdigest()

    def array(self, name: str) -> np.ndarray:
        """One array; ``ValueError`` if the store was made without it."""
        if name not in self.arrays:
            raise ValueError(
                f"{self.folder} holds no {name}, only {sorted(self.arrays)}; put the files of "
                f"{name} into the data folder and run mfd-fast prepare occfm again"
            )
        return self.arrays[name]

    def starts(self, length: int, *, stride: int = 1) -> np.ndarray:
        """First frames int64 of every run of ``length`` frames that stays in one scene."""
        firsts = np.cumsum([0, *(count for _, count in self.scenes)])
        starts = [
            np.arange(first, first + max(0, count - length + 1))
            for first, (_, count) in zip(firsts, self.scenes, strict=False)
        ]
        return np.concatenate(starts)[::stride]

    def verify(self) -> None:
        """Compare every array with its checksum; ``ValueError`` names the first that differs."""
        for name, expected in self._expected.items():
            if (found := _sha256(self.folder / f"{name}.npy")) != expected["sha256"]:
                raise ValueError(
                    f"expected {self.folder / name}.npy with checksum {expected['sha256'][:12]}, "
                    f"got {found[:12]}; run mfd-fast prepare occfm again into another folder"
                )

    def _read_index(self) -> dict[str, Any]:
        path = self.folder / INDEX
        if not path.is_file():
            raise FileNotFoundError(
                f"{self.folder} is not a prepared split: it has no {INDEX}. One is made by "
                "mfd-fast prepare occfm --data DIR --out STORE"
            )
        try:
            index = read_json(path)
        except ValueError as error:
            raise ValueError(f"expected JSON in {path}, got something else ({error})") from error
        found = index.get("format") if isinstance(index, dict) else type(index).__name__
        if found != FORMAT:
            raise ValueError(
                f"expected format {FORMAT} in {path}, got {found}; run mfd-fast prepare occfm again"
            )
        return index

    def _map(self, name: str) -> np.ndarray:
        path, expected = self.folder / f"{name}.npy", self._expected[name]
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"expected an array of shape {expected['shape']} in {path}, got no complete one "
                f"({error}); run mfd-fast prepare occfm again"
            ) from error
        if list(array.shape) != expected["shape"] or array.dtype != expected["dtype"]:
            raise ValueError(
                f"expected {expected['dtype']} of shape {expected['shape']} in {path}, got "
                f"{array.dtype} of shape {list(array.shape)}; run mfd-fast prepare occfm again"
            )
        return array


def convert_split(
    data: str | Path,
    store: str | Path,
    split: str,
    *,
    size: str = "x16",
    skip_missing: bool = False,
) -> OccupancyStore:
    """Convert the files of one split to ``store/split``, whole or not at all.

    Labels are taken if ``data/nuscenes/gts`` is there, latents if their file is.  The latents file
    is read into memory whole; everything else is written frame by frame.

    Args:
        data: folder with ``nuscenes`` and ``nusc_latent_vae``; ``files.py``
            says what lies there.
        store: folder of the splits.
        split: ``training`` or ``validation``.
        size: which latents, by the name of their folder.
        skip_missing: drop key frames without latent, and latents without key frame, instead of
            refusing them; the frames around a gap then count as neighbours.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken, frames are missing, or the store has this split already.
    """
    data, target = Path(data), Path(store) / split
    if target.exists():
        raise ValueError(f"{target} exists; nothing was changed. Choose another folder with --out")
    frames = read_key_frames(info_path(data, split))
    cache = latents_path(data, split, size)
    latents = read_latents(cache) if cache.is_file() else None
    if latents is not None:
        frames = _matched(frames, latents, cache, skip_missing)
    has_labels = (data / "nuscenes" / "gts").is_dir()
    if latents is None and not has_labels:
        raise FileNotFoundError(
            f"expected labels in {data / 'nuscenes' / 'gts'} or latents at {cache}, found neither"
        )
    clean(target.parent)
    with written(target) as partial:
        partial.mkdir()
        arrays = {"trajectories": _write(partial, "trajectories", (f.displacement for f in frames),
                                         len(frames))}  # fmt: skip
        if has_labels:
            grids = (read_labels(labels_path(data, f.scene, f.token)) for f in frames)
            arrays["labels"] = _write(partial, "labels", grids, len(frames))
        if latents is not None:
            rows = (latents[f.token].astype(np.float32, copy=False) for f in frames)
            arrays["latents"] = _write(partial, "latents", rows, len(frames))
        index = {"format": FORMAT, "scenes": _runs(frames), "arrays": arrays}
        (partial / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return OccupancyStore(target)


def _matched(
    frames: list[KeyFrame], latents: dict[str, np.ndarray], cache: Path, skip_missing: bool
) -> list[KeyFrame]:
    """The key frames that have a latent; both sides must agree unless ``skip_missing``."""
    known = {frame.token for frame in frames}
    missing = [frame for frame in frames if frame.token not in latents]
    foreign = [token for token in latents if token not in known]
    if (missing or foreign) and not skip_missing:
        example = f"{missing[0].token} of {missing[0].scene}" if missing else foreign[0]
        raise ValueError(
            f"expected one latent for every key frame in {cache}, got {len(missing)} key frames "
            f"without latent and {len(foreign)} latents without key frame (first: {example}); copy "
            "the file again, or leave them out with --skip-missing"
        )
    kept = [frame for frame in frames if frame.token in latents]
    if not kept:
        raise ValueError(f"no key frame has a latent in {cache}; it belongs to another data set")
    return kept


def _runs(frames: list[KeyFrame]) -> list[list]:
    """Scene and number of its frames, in order."""
    counts: dict[str, int] = {}
    for frame in frames:
        counts[frame.scene] = counts.get(frame.scene, 0) + 1
    return [list(run) for run in counts.items()]


def _write(folder: Path, name: str, rows: Iterable[np.ndarray], count: int) -> dict[str, Any]:
    """Stack ``count`` rows into ``name.npy``, one at a time; what the index says about it."""
    path = folder / f"{name}.npy"
    array = None
    for i, row in enumerate(rows):
        if array is None:
            array = np.lib.format.open_memmap(path, "w+", row.dtype, (count, *row.shape))
        if row.shape != array.shape[1:]:
            raise ValueError(
                f"expected {name} of one shape, got {list(array.shape[1:])} and then "
                f"{list(row.shape)} in frame {i}; they belong to different data sets"
            )
        array[i] = row
    array.flush()
    return {"dtype": str(array.dtype), "shape": list(array.shape), "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
