"""Synthetic driving scenes: repeatable, right in the ego frame, predictable but not wholly."""

from dataclasses import replace

import numpy as np
import pytest

from mfd_fast.models.occfm.data.classes import CLASSES, FREE
from mfd_fast.models.occfm.data.files import info_path, labels_path, read_key_frames, read_labels
from mfd_fast.models.occfm.data.synthetic import SyntheticConfig, SyntheticScene, write_synthetic
from mfd_fast.models.occfm.data.traffic import BLOCK, KINDS, draw_tracks, ground_labels

SMALL = SyntheticConfig(scenes=1, frames=20, grid=(32, 32, 4), voxel=1.25)


def test_the_written_files_are_the_frames_of_the_scene(tmp_path):
    write_synthetic(tmp_path / "data", replace(SMALL, frames=12))
    for split in ("training", "validation"):
        scene = SyntheticScene(replace(SMALL, frames=12), split, 0)
        frames = read_key_frames(info_path(tmp_path / "data", split))
        assert len(frames) == 12 and len({frame.token for frame in frames}) == 12
        for i, frame in enumerate(frames):
            found = read_labels(labels_path(tmp_path / "data", frame.scene, frame.token))
            assert np.array_equal(found, scene.grid(i))
            assert np.array_equal(frame.displacement, scene.displacements(i)[0])
    with pytest.raises(ValueError, match="data already holds files; nothing was changed"):
        write_synthetic(tmp_path / "data", SMALL)


def test_scenes_differ_and_repeat():
    def frames(config, split, number):
        scene = SyntheticScene(config, split, number)
        return np.stack([scene.grid(i) for i in (0, 10)])

    base = frames(SMALL, "training", 0)
    assert np.array_equal(base, frames(SMALL, "training", 0))
    for other in (
        frames(SMALL, "validation", 0),
        frames(SMALL, "training", 1),
        frames(replace(SMALL, seed=1), "training", 0),
    ):
        assert not np.array_equal(base, other)


@pytest.mark.parametrize(
    ("grid", "voxel"), [((200, 200, 16), 0.4), ((32, 32, 4), 1.25), ((16, 24, 2), 2.0)]
)
def test_any_grid_has_ground_below_and_things_upon_it(grid, voxel):
    scene = SyntheticScene(replace(SMALL, grid=grid, voxel=voxel), "training", 0)
    labels = scene.grid(3)
    assert labels.shape == grid and labels.dtype == np.uint8
    flat = {CLASSES.index(n) for n in ("driveable_surface", "sidewalk", "terrain", "other_flat")}
    assert set(np.unique(labels[:, :, 0])) <= flat
    above = labels[:, :, 1:]
    assert not set(np.unique(above)) & flat
    assert 0 < (above != FREE).mean() < 0.6
    # nothing floats: below every occupied voxel is an occupied one
    assert not ((above[:, :, 1:] != FREE) & (above[:, :, :-1] == FREE)).any()


def test_every_kind_of_thing_is_seen():
    seen = set()
    for number in range(6):
        scene = SyntheticScene(replace(SMALL, grid=(64, 64, 4), agents=80), "training", number)
        for frame in range(0, 20, 4):
            seen |= set(np.unique(scene.grid(frame)))
    wanted = {kind.name for kind in KINDS} | {"barrier", "traffic_cone", "manmade", "vegetation"}
    assert {CLASSES.index(name) for name in wanted} <= seen


def test_still_things_move_by_the_displacement_in_the_ego_frame():
    """Frame k + 1 is frame k seen from a car that went on by ``displacements(k)`` and turned."""
    config = replace(SMALL, agents=0, grid=(64, 64, 4), voxel=0.5)
    scenes = (SyntheticScene(config, "training", number) for number in range(50))
    turns = ((scene, np.abs(np.diff(scene.ego[:, 2]))) for scene in scenes)
    scene, turned = next((scene, turn) for scene, turn in turns if turn.max() > 0.1)
    for k in (0, int(turned.argmax())):
        forward, left = scene.displacements(k)[0]
        angle = scene.ego[k + 1, 2] - scene.ego[k, 2]
        old, new = scene.grid(k), scene.grid(k + 1)
        at = (np.arange(64) + 0.5 - 32) * config.voxel
        x, y = np.meshgrid(at, at, indexing="ij")
        old_x = forward + np.cos(angle) * x - np.sin(angle) * y
        old_y = left + np.sin(angle) * x + np.cos(angle) * y
        i, j = (np.floor(c / config.voxel + 32).astype(int) for c in (old_x, old_y))
        inside = (i >= 0) & (i < 64) & (j >= 0) & (j < 64)
        same = new[inside] == old[i[inside], j[inside]]
        # Only columns within a voxel of an edge can differ; a wrong sign would move every edge.
        edge = np.zeros((64, 64), bool)
        edge[1:] |= (new[1:] != new[:-1]).any(2)
        edge[:-1] |= (new[1:] != new[:-1]).any(2)
        edge[:, 1:] |= (new[:, 1:] != new[:, :-1]).any(2)
        edge[:, :-1] |= (new[:, 1:] != new[:, :-1]).any(2)
        assert inside.mean() > 0.5
        assert same.all(1)[~edge[inside]].all()


def test_motion_is_steady_with_some_turns_and_new_speeds():
    tracks = draw_tracks(np.random.default_rng(0), 200, 100)
    steps = np.stack([np.diff(track.poses[:, :2], axis=0) for track in tracks])
    change = np.linalg.norm(np.diff(steps, axis=1), axis=2)
    steady = (change < 1e-9).mean()
    assert 0.5 < steady < 0.95
    headings = np.stack([track.poses[:, 2] for track in tracks])
    assert np.abs(headings[:, -1] - headings[:, 0]).max() > 1.0
    speeds = np.linalg.norm(steps, axis=2) / 0.5
    for track, speed in zip(tracks[1:], speeds[1:], strict=True):
        assert speed.max() <= track.kind.speed[1] + 1e-9
    assert speeds[0].min() > 1.0  # the ego car never stands


def test_everything_keeps_to_its_lane_between_crossings():
    road, sidewalk = CLASSES.index("driveable_surface"), CLASSES.index("sidewalk")
    for track in draw_tracks(np.random.default_rng(1), 200, 60)[1:]:
        x, y = track.poses[:, 0], track.poses[:, 1]
        far = np.maximum(*(np.abs(c - BLOCK * np.round(c / BLOCK)) for c in (x, y))) > 14
        under = set(np.unique(ground_labels(x[far], y[far])))
        assert under <= {sidewalk if track.kind.name == "pedestrian" else road}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scenes": 0}, "scenes >= 1 and agents >= 0, got 0"),
        ({"frames": 11}, "frames >= 12, one window, got 11"),
        ({"grid": (8, 8, 1)}, "three sizes >= 2"),
        ({"voxel": 0.0}, "voxel > 0"),
    ],
)
def test_impossible_settings_are_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        replace(SMALL, **changes)
