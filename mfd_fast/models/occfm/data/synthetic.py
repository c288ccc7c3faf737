"""Synthetic driving scenes in the very files of Occ3D-nuScenes: a town in which boxes move.

The grids are in the frame of the ego car: axis 0 forward, axis 1 to the left, axis 2 up, the car in
the middle.  The next seconds can be foreseen from the last ones except for turns and changes of
speed, so a sampler of one step and one of ten do not give the same.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mfd_fast.models.occfm.data.classes import FREE, SPLITS, WINDOW
from mfd_fast.models.occfm.data.files import info_path, labels_path, write_key_frames, write_labels
from mfd_fast.models.occfm.data.traffic import (
    BLOCK,
    Box,
    block_boxes,
    draw_tracks,
    ground_labels,
    moving_boxes,
)

HEIGHT = 6.4  # metres that the grid spans upwards, whatever its number of layers
VALIDATION_SHARE = 4  # one scene of validation to so many of training


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """A synthetic data set; the defaults are the size of the real grids."""

    scenes: int = 8
    """Scenes of the training split; the validation split gets a quarter, at least one."""
    frames: int = 40
    """Key frames of a scene, half a second apart."""
    grid: tuple[int, int, int] = (200, 200, 16)
    """Voxels along forward, left and up."""
    voxel: float = 0.4
    """Metres of a voxel forward and left; upwards the grid always spans 6.4 m."""
    agents: int = 40
    """Moving things per scene."""
    seed: int = 0
    """The same seed gives the same files."""

    def __post_init__(self):
        if self.scenes < 1 or self.agents < 0:
            raise ValueError(
                f"expected scenes >= 1 and agents >= 0, got {self.scenes} and {self.agents}"
            )
        if self.frames < WINDOW:
            raise ValueError(f"expected frames >= {WINDOW}, one window, got {self.frames}")
        if len(self.grid) != 3 or min(self.grid) < 2 or self.voxel <= 0:
            raise ValueError(
                f"expected a grid of three sizes >= 2 and voxel > 0, got {self.grid} and "
                f"{self.voxel}"
            )


class SyntheticScene:
    """One scene: every frame is drawn when it is asked for.

    Args:
        config: the data set.
        split: ``training`` or ``validation``.
        number: which scene of the split.
    """

    def __init__(self, config: SyntheticConfig, split: str, number: int):
        self.config = config
        self._seed = (config.seed, list(SPLITS).index(split), number)
        rng = np.random.default_rng(self._seed)
        self.tracks = draw_tracks(rng, config.frames, config.agents)
        self.ego = self.tracks[0].poses

    def grid(self, frame: int) -> np.ndarray:
        """Class ids uint8 ``[X, Y, Z]`` around the ego car."""
        x, y = self._columns(frame)
        grid = np.full(self.config.grid, FREE, dtype=np.uint8)
        grid[:, :, 0] = ground_labels(x, y)
        layer = HEIGHT / self.config.grid[2]
        for box in [*self._still_boxes(x, y), *moving_boxes(self.tracks, frame)]:
            layers = max(1, round(box.height / layer))
            grid[_covered(box, x, y, self.config.voxel), 1 : 1 + layers] = box.label
        return grid

    def displacements(self, frame: int, steps: int = 6) -> np.ndarray:
        """Ego motion of the next ``steps`` frames, each in metres in the ego frame it starts from.

        float32 ``[steps, 2]``; zero beyond the end of the scene.
        """
        out = np.zeros((steps, 2), dtype=np.float32)
        for i, k in enumerate(range(frame, min(frame + steps, len(self.ego) - 1))):
            step = self.ego[k + 1, :2] - self.ego[k, :2]
            cos, sin = np.cos(self.ego[k, 2]), np.sin(self.ego[k, 2])
            out[i] = cos * step[0] + sin * step[1], cos * step[1] - sin * step[0]
        return out

    def _columns(self, frame: int) -> tuple[np.ndarray, np.ndarray]:
        """Town coordinates of the middle of every column, two arrays ``[X, Y]``."""
        forward, left = (
            (np.arange(size) + 0.5 - size / 2) * self.config.voxel for size in self.config.grid[:2]
        )
        forward, left = np.meshgrid(forward, left, indexing="ij")
        ego_x, ego_y, heading = self.ego[frame]
        cos, sin = np.cos(heading), np.sin(heading)
        return ego_x + cos * forward - sin * left, ego_y + sin * forward + cos * left

    def _still_boxes(self, x: np.ndarray, y: np.ndarray) -> list[Box]:
        blocks = [range(int(c.min() // BLOCK), int(c.max() // BLOCK) + 1) for c in (x, y)]
        return [box for i in blocks[0] for j in blocks[1] for box in block_boxes(self._seed, i, j)]


def _covered(box: Box, x: np.ndarray, y: np.ndarray, voxel: float) -> np.ndarray:
    """Which columns a box covers, bool ``[X, Y]``; it is never thinner than a voxel."""
    cos, sin = np.cos(box.heading), np.sin(box.heading)
    along = cos * (x - box.x) + sin * (y - box.y)
    across = cos * (y - box.y) - sin * (x - box.x)
    return (np.abs(along) <= max(box.length, voxel) / 2) & (
        np.abs(across) <= max(box.width, voxel) / 2
    )


def write_synthetic(data: str | Path, config: SyntheticConfig) -> None:
    """Write labels and scene lists of both splits below ``data``; latents come from a VAE later.

    Raises:
        ValueError: ``data`` holds files already.
    """
    data = Path(data)
    if data.is_dir() and any(data.iterdir()):
        raise ValueError(
            f"{data} already holds files; nothing was changed. Choose another folder with --data"
        )
    counts = {"training": config.scenes, "validation": max(1, config.scenes // VALIDATION_SHARE)}
    for split, count in counts.items():
        infos = {f"{split}-{i:04d}": _write_scene(data, config, split, i) for i in range(count)}
        write_key_frames(info_path(data, split), infos)


def _write_scene(data: Path, config: SyntheticConfig, split: str, number: int) -> list[dict]:
    scene = SyntheticScene(config, split, number)
    entries = []
    for frame in range(config.frames):
        token = f"{split[:5]}{config.seed:04x}{number:04x}{frame:04x}"
        write_labels(labels_path(data, f"{split}-{number:04d}", token), scene.grid(frame))
        entries.append({"token": token, "gt_ego_fut_trajs": scene.displacements(frame)})
    return entries
