"""Occupancy seen from above: the colour of the highest occupied voxel, lighter the higher it is."""

import numpy as np

from mfd_fast.models.occfm.data.classes import CLASSES, FREE

COLOURS = {
    "others": "#5f6b7a",
    "barrier": "#e8590c",
    "bicycle": "#d6336c",
    "bus": "#f59f00",
    "car": "#1c7ed6",
    "construction_vehicle": "#8d6e00",
    "motorcycle": "#ae3ec9",
    "pedestrian": "#e03131",
    "traffic_cone": "#ff922b",
    "trailer": "#5c4033",
    "truck": "#6741d9",
    "driveable_surface": "#c3c9d1",
    "other_flat": "#d8cfc0",
    "sidewalk": "#e3b7c9",
    "terrain": "#cfe3a8",
    "manmade": "#8c9aa8",
    "vegetation": "#3f9142",
    "free": "#ffffff",
}
LOWEST = 0.72  # brightness of the lowest layer of an object; the highest has 1
SHADOW = 0.55  # what a higher neighbour leaves of a column's brightness at its foot
PALETTE = np.array(
    [[int(COLOURS[name][i : i + 2], 16) / 255 for i in (1, 3, 5)] for name in CLASSES]
)


def birds_eye_view(grid: np.ndarray) -> np.ndarray:
    """RGB float64 ``[X, Y, 3]`` in [0, 1] of class ids ``[X, Y, Z]``: forward up, left to the left.

    A column shows its highest occupied voxel.  The ground keeps its colour, things above it get
    brighter with height, and the foot of what is higher is in its shadow.
    """
    occupied = grid != FREE
    layers = grid.shape[2]
    top = np.where(occupied.any(2), layers - 1 - occupied[:, :, ::-1].argmax(2), 0)
    label = np.take_along_axis(grid, top[:, :, None], axis=2)[:, :, 0]
    brightness = LOWEST + (1 - LOWEST) * top / max(1, layers - 1)
    brightness = np.where(top == 0, 1.0, brightness)
    # The light comes from ahead on the left.
    ahead = np.pad(top, ((0, 1), (0, 1)), mode="edge")[1:, 1:]
    rise = np.clip(ahead - top, 0, layers) / max(1, layers - 1)
    brightness = brightness * (1 - (1 - SHADOW) * np.sqrt(rise))
    return (PALETTE[label] * brightness[:, :, None])[::-1, ::-1]


def shown_classes(*grids: np.ndarray) -> list[str]:
    """Names of the classes that the grids hold, without the empty one, in order of their ids."""
    present = {int(label) for grid in grids for label in np.unique(grid)}
    return [CLASSES[label] for label in sorted(present - {FREE})]
