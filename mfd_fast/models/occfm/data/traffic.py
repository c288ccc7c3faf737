"""A made-up town: straight roads on a square lattice, buildings and trees, and things that move.

Everything keeps to the right of its road, goes straight at a steady speed, and now and then turns
at a crossing or changes its speed: the next seconds follow from the last ones, but not wholly.
Positions are metres in the frame of the town; headings are radians against its first axis.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mfd_fast.models.occfm.data.classes import CLASSES, FRAME_SECONDS

BLOCK = 48.0  # between two parallel roads
ROAD = 5.0  # half width of a road
SIDEWALK = 2.5  # width of the pavement beside it
PATH_STEP = 0.25  # between two points of a path
SMOOTHING = 14.0  # a corner is rounded over about this length


class Kind(NamedTuple):
    """One kind of moving thing."""

    name: str
    share: float
    size: tuple[float, float, float]  # length, width, height
    speed: tuple[float, float]  # metres per second
    lane: float  # distance from the middle of the road


KINDS = (
    Kind("car", 0.42, (4.5, 1.9, 1.6), (3.0, 9.0), 2.5),
    Kind("pedestrian", 0.22, (0.8, 0.8, 1.7), (0.8, 1.8), ROAD + SIDEWALK / 2),
    Kind("truck", 0.10, (7.5, 2.6, 3.2), (3.0, 7.0), 2.5),
    Kind("bus", 0.08, (11.0, 2.9, 3.4), (3.0, 7.0), 2.5),
    Kind("bicycle", 0.06, (1.8, 0.8, 1.6), (2.5, 5.0), 4.2),
    Kind("motorcycle", 0.06, (2.2, 0.9, 1.5), (4.0, 9.0), 2.5),
    Kind("trailer", 0.03, (9.0, 2.6, 3.6), (3.0, 6.0), 2.5),
    Kind("construction_vehicle", 0.03, (6.0, 2.8, 3.0), (1.0, 3.0), 2.5),
)
EGO_SPEED = (3.0, 8.0)
TURN = 0.35  # chance of turning at a crossing, half to each side
NEW_SPEED = 0.06  # chance per frame of another speed
STOP = 0.25  # share of the new speeds that are zero
START = 0.2  # chance per frame that what stands drives on
STILL_SIZES = {"barrier": (1.8, 1.8, 1.0), "traffic_cone": (0.6, 0.6, 0.9)}


@dataclass(frozen=True)
class Box:
    """An upright box on the ground."""

    label: int
    x: float
    y: float
    heading: float
    length: float
    width: float
    height: float


class Track(NamedTuple):
    """Poses of one moving thing: float64 ``[frames, 3]``, x, y and heading."""

    poses: np.ndarray
    kind: Kind | None


def draw_tracks(rng: np.random.Generator, num_frames: int, num_agents: int) -> list[Track]:
    """The ego car, first, and ``num_agents`` others that start in its neighbourhood."""
    ego = _drive(rng, np.zeros(2), 2.5, EGO_SPEED, num_frames, may_stop=False)
    tracks = [Track(ego, None)]
    kinds = rng.choice(len(KINDS), num_agents, p=[kind.share for kind in KINDS])
    for kind in (KINDS[i] for i in kinds):
        crossing = np.round(ego[rng.integers(num_frames), :2] / BLOCK) + rng.integers(-1, 2, 2)
        poses = _drive(rng, crossing * BLOCK, kind.lane, kind.speed, num_frames)
        tracks.append(Track(poses, kind))
    return tracks


def moving_boxes(tracks: list[Track], frame: int) -> list[Box]:
    """Where everything but the ego car is in one frame."""
    return [
        Box(CLASSES.index(track.kind.name), *track.poses[frame], *track.kind.size)
        for track in tracks[1:]
    ]


def _drive(
    rng: np.random.Generator,
    crossing: np.ndarray,
    lane: float,
    speeds: tuple[float, float],
    num_frames: int,
    *,
    may_stop: bool = True,
) -> np.ndarray:
    """Poses ``[frames, 3]`` along a route that starts near ``crossing``."""
    speed = np.empty(num_frames)
    speed[0] = rng.uniform(*speeds)
    for i in range(1, num_frames):
        speed[i] = speed[i - 1]
        if rng.random() < NEW_SPEED or (speed[i] == 0 and rng.random() < START):
            speed[i] = 0.0 if may_stop and rng.random() < STOP else rng.uniform(*speeds)
    distance = rng.uniform(0, BLOCK) + np.cumsum(speed * FRAME_SECONDS) + SMOOTHING
    path = _smooth_path(_route(rng, crossing, lane, distance[-1] + 2 * SMOOTHING))
    along = np.arange(len(path)) * PATH_STEP
    x, y = (np.interp(distance, along, path[:, axis]) for axis in (0, 1))
    tangent = np.gradient(path, axis=0)
    heading = np.interp(distance, along, np.unwrap(np.arctan2(tangent[:, 1], tangent[:, 0])))
    return np.stack((x, y, heading), axis=1)


def _route(
    rng: np.random.Generator, crossing: np.ndarray, lane: float, length: float
) -> np.ndarray:
    """Corners ``[n, 2]`` of a route of at least ``length`` metres on the right-hand lanes."""
    heading = np.array([(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0)][rng.integers(4)])
    corners = [crossing + lane * _right_of(heading)]
    total = 0.0
    while total < length:
        crossing = crossing + BLOCK * heading
        turn = rng.choice((0, 1, -1), p=(1 - TURN, TURN / 2, TURN / 2))
        # The lane of the next road is met before its middle on a right turn, behind it on a left.
        corner = crossing + lane * _right_of(heading) - turn * lane * heading
        heading = heading if turn == 0 else turn * _right_of(heading)
        total += float(np.abs(corner - corners[-1]).sum())
        corners.append(corner)
    return np.array(corners)


def _right_of(heading: np.ndarray) -> np.ndarray:
    return np.array((heading[1], -heading[0]))


def _smooth_path(corners: np.ndarray) -> np.ndarray:
    """Points ``[n, 2]``, ``PATH_STEP`` apart along the corners, with the corners rounded."""
    lengths = np.abs(np.diff(corners, axis=0)).sum(1)
    at = np.concatenate(([0.0], np.cumsum(lengths)))
    along = np.arange(0.0, at[-1], PATH_STEP)
    points = np.stack([np.interp(along, at, corners[:, axis]) for axis in (0, 1)], axis=1)
    window = int(SMOOTHING / PATH_STEP) // 2 * 2 + 1
    padded = np.pad(points, ((window // 2,) * 2, (0, 0)), mode="edge")
    kernel = np.full(window, 1 / window)
    return np.stack([np.convolve(padded[:, axis], kernel, "valid") for axis in (0, 1)], axis=1)


def ground_labels(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Class ids uint8 of the ground at points ``x``, ``y`` of any one shape."""
    from_road = np.minimum(*(np.abs(c - BLOCK * np.round(c / BLOCK)) for c in (x, y)))
    # Every third block is paved.
    block_x, block_y = np.floor(x / BLOCK), np.floor(y / BLOCK)
    paved = (block_x + 2 * block_y) % 3 == 0
    open_ground = np.where(paved, CLASSES.index("other_flat"), CLASSES.index("terrain"))
    sidewalk = np.where(from_road < ROAD + SIDEWALK, CLASSES.index("sidewalk"), open_ground)
    return np.where(
        from_road < ROAD, CLASSES.index("driveable_surface"), sidewalk
    ).astype(np.uint8)  # fmt: skip


def block_boxes(seed: tuple[int, ...], block_x: int, block_y: int) -> list[Box]:
    """Buildings, trees, barriers and cones of one block, always the same for the same seed."""
    # Entropy of a generator must not be negative; the blocks' numbers may be.
    rng = np.random.default_rng((*seed, block_x % 2**20, block_y % 2**20))
    inner = ROAD + SIDEWALK
    low = np.array((block_x, block_y)) * BLOCK + inner
    side = BLOCK - 2 * inner
    boxes = []
    for _ in range(rng.integers(3, 9)):
        width = rng.uniform(2.0, 4.5)
        boxes.append(_still("vegetation", low + rng.random(2) * side, (width, width, 4.0)))
    for _ in range(rng.integers(1, 4)):
        size = rng.uniform(8.0, 18.0, 2)
        middle = low + size / 2 + rng.random(2) * (side - size)
        boxes.append(_still("manmade", middle, (*size, rng.uniform(4.0, 9.0))))
    for _ in range(rng.integers(0, 3)):
        beside_road = np.array((rng.uniform(inner, BLOCK - inner), ROAD - 0.6))
        spot = np.array((block_x, block_y)) * BLOCK + rng.permutation(beside_road)
        name = ("barrier", "traffic_cone")[rng.integers(2)]
        boxes.append(_still(name, spot, STILL_SIZES[name]))
    return boxes


def _still(name: str, middle: np.ndarray, size: tuple[float, float, float]) -> Box:
    return Box(CLASSES.index(name), float(middle[0]), float(middle[1]), 0.0, *map(float, size))
