"""Occupancy of driving scenes: the classes, the window and the clock of Occ3D-nuScenes."""

CLASSES = (
    "others",
    "barrier",
    "bicycle",
    "bus",
    "car",
    "construction_vehicle",
    "motorcycle",
    "pedestrian",
    "traffic_cone",
    "trailer",
    "truck",
    "driveable_surface",
    "other_flat",
    "sidewalk",
    "terrain",
    "manmade",
    "vegetation",
    "free",
)
"""The name of every class id; the last one is the empty voxel."""

FREE = CLASSES.index("free")
"""Class id of an empty voxel."""

FRAME_SECONDS = 0.5
"""Time between two key frames."""

HISTORY, FUTURE = 6, 6
"""Frames of a window that are given, and frames that are forecast."""

WINDOW = HISTORY + FUTURE
"""Frames of a window: consecutive key frames of one scene."""

SPLITS = {"training": "train", "validation": "val"}
"""Name of a split in the latent cache -> its name in the info file."""
