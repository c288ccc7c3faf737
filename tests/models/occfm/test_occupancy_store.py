"""The memory-mapped store of occupancy data: conversion, windows, batches, the command."""

import json
import pickle
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from mfd_fast.cli import main
from mfd_fast.models.occfm.data.files import info_path, labels_path, latents_path, write_latents
from mfd_fast.models.occfm.data.store import OccupancyStore, convert_split
from mfd_fast.models.occfm.data.synthetic import SyntheticConfig, write_synthetic
from mfd_fast.models.occfm.data.windows import OccupancyClips, OccupancyWindows

CONFIG = SyntheticConfig(scenes=2, frames=14, grid=(16, 16, 4), voxel=2.0, agents=5)


def encode(grid):
    """A stand-in for a VAE: every frame has its own latent [4, 4, 4]."""
    return grid[::4, ::4].transpose(2, 0, 1).astype(np.float32) / 17


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    data = tmp_path_factory.mktemp("data") / "data"
    write_synthetic(data, CONFIG)
    for split in ("training", "validation"):
        write_latents(data, split, encode)
    return data


@pytest.fixture(scope="module")
def store(source, tmp_path_factory):
    return convert_split(source, tmp_path_factory.mktemp("store"), "training")


@pytest.fixture
def data(source, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(source, tmp_path / "data")


# Conversion ---------------------------------------------------------------------------------


def test_the_store_holds_what_the_files_hold(source, store):
    infos = pickle.loads(info_path(source, "training").read_bytes())["infos"]
    assert store.scenes == [(name, len(entries)) for name, entries in infos.items()]
    row = 0
    for scene, entries in infos.items():
        for entry in entries:
            grid = np.load(labels_path(source, scene, entry["token"]))["semantics"]
            assert np.array_equal(store.array("labels")[row], grid)
            assert np.array_equal(store.array("latents")[row], encode(grid))
            assert np.array_equal(
                store.array("trajectories")[row], entry["gt_ego_fut_trajs"][0].astype(np.float32)
            )
            row += 1
    assert store.num_frames == row == 28
    store.verify()


def test_latents_in_any_order_are_put_in_order(data, store, tmp_path):
    path = latents_path(data, "training")
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes())[::-1]))
    again = convert_split(data, tmp_path / "store", "training")
    assert np.array_equal(again.array("latents"), store.array("latents"))


def test_labels_alone_and_latents_alone_are_enough(data, tmp_path):
    shutil.rmtree(data / "nuscenes" / "gts")
    only_latents = convert_split(data, tmp_path / "a", "training")
    assert sorted(only_latents.arrays) == ["latents", "trajectories"]
    with pytest.raises(ValueError, match=r"holds no labels, only \['latents', 'trajectories'\]"):
        OccupancyClips(only_latents).batch(0, 1, 0)
    shutil.rmtree(data / "nusc_latent_vae")
    with pytest.raises(FileNotFoundError, match="found neither"):
        convert_split(data, tmp_path / "b", "training")
    write_synthetic(tmp_path / "fresh", CONFIG)
    only_labels = convert_split(tmp_path / "fresh", tmp_path / "c", "training")
    assert sorted(only_labels.arrays) == ["labels", "trajectories"]


def missing_labels(data):
    next((data / "nuscenes" / "gts" / "training-0001").iterdir()).joinpath("labels.npz").unlink()


def other_grid(data):
    path = sorted((data / "nuscenes" / "gts" / "training-0001").iterdir())[3] / "labels.npz"
    np.savez(path, semantics=np.zeros((16, 17, 4), np.uint8))


def truncated_labels(data):
    path = sorted((data / "nuscenes" / "gts" / "training-0001").iterdir())[3] / "labels.npz"
    path.write_bytes(path.read_bytes()[:-40])


def missing_latents(data):
    path = latents_path(data, "training")
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes())[2:]))


def foreign_latents(data):
    shutil.copy(latents_path(data, "validation"), latents_path(data, "training"))


def missing_scenes(data):
    info_path(data, "training").unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (missing_labels, r"labels of a key frame at .*training-0001.*labels.npz, found none"),
        (other_grid, r"labels of one shape, got \[16, 16, 4\] and then \[16, 17, 4\] in frame 17"),
        (truncated_labels, r"'semantics' in .*labels.npz"),
        (missing_latents, r"2 key frames without latent .* --skip-missing"),
        (foreign_latents, r"28 key frames without latent and 14 latents without key frame"),
        (missing_scenes, r"pickle at .*nuscenes_infos_train_temporal_v3_scene.pkl, found none"),
    ],
)
def test_damaged_data_is_refused_and_leaves_no_store(data, tmp_path, damage, reason):
    damage(data)
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        convert_split(data, tmp_path / "store", "training")
    assert not list((tmp_path / "store").glob("*")) and not list((tmp_path / "store").glob(".*"))


def test_missing_frames_can_be_left_out(data, store, tmp_path):
    missing_latents(data)
    kept = convert_split(data, tmp_path / "store", "training", skip_missing=True)
    assert kept.num_frames == 26
    assert np.array_equal(kept.array("latents"), store.array("latents")[2:])
    foreign_latents(data)
    with pytest.raises(ValueError, match="no key frame has a latent"):
        convert_split(data, tmp_path / "other", "training", skip_missing=True)


def test_a_killed_conversion_leaves_nothing_that_looks_like_a_store(source, tmp_path):
    code = (
        "import os, sys\n"
        "from mfd_fast.models.occfm.data import store as s\n"
        "s._sha256 = lambda path: os._exit(9) if path.name == 'latents.npy' else 'x'\n"
        f"s.convert_split({str(source)!r}, {str(tmp_path)!r}, 'training')\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert all(path.name.startswith(".writing-") for path in tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match=r"not a prepared split: it has no index.json"):
        OccupancyStore(tmp_path / "training")
    convert_split(source, tmp_path, "training").verify()
    assert [path.name for path in tmp_path.iterdir()] == ["training"]


def test_an_existing_split_is_not_touched(source, tmp_path):
    first = convert_split(source, tmp_path, "training")
    before = (first.folder / "index.json").stat().st_mtime_ns
    with pytest.raises(ValueError, match="training exists; nothing was changed"):
        convert_split(source, tmp_path, "training")
    assert (first.folder / "index.json").stat().st_mtime_ns == before


def test_a_damaged_store_is_named(source, tmp_path):
    folder = convert_split(source, tmp_path, "training").folder
    latents = folder / "latents.npy"
    whole = latents.read_bytes()
    latents.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"latents.npy with checksum .* run mfd-fast prepare"):
        OccupancyStore(folder).verify()
    latents.write_bytes(whole[:-100])
    with pytest.raises(
        ValueError, match=r"shape \[28, 4, 4, 4\] in .*latents.npy, got no complete"
    ):
        OccupancyStore(folder)
    np.save(latents, np.zeros((28, 4, 4, 5), np.float32))
    with pytest.raises(ValueError, match=r"got float32 of shape \[28, 4, 4, 5\]"):
        OccupancyStore(folder)
    latents.unlink()
    with pytest.raises(ValueError, match="got no complete one"):
        OccupancyStore(folder)
    index = folder / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"format": 0}))
    with pytest.raises(ValueError, match=r"expected format 1 in .*index.json, got 0"):
        OccupancyStore(folder)
    index.write_text("{")
    with pytest.raises(ValueError, match="expected JSON"):
        OccupancyStore(folder)


# Windows ------------------------------------------------------------------------------------


def test_windows_stay_inside_their_scene(store):
    assert store.starts(12).tolist() == [0, 1, 2, 14, 15, 16]
    assert store.starts(12, stride=3).tolist() == [0, 14]
    assert store.starts(1).tolist() == list(range(28))
    assert len(store.starts(15)) == 0
    assert len(OccupancyWindows(store)) == 6


def test_a_window_is_a_slice_with_its_absent_history_zeroed(store):
    batch = OccupancyWindows(store, history=4).windows([4, 1])
    assert batch.latents.shape == (2, 12, 4, 4, 4) and batch.trajectory.shape == (2, 12, 2)
    assert batch.latents.dtype == batch.trajectory.dtype == torch.float32
    for row, start in enumerate((15, 1)):
        assert not batch.latents[row, :2].any() and not batch.trajectory[row, :2].any()
        frames = slice(start + 2, start + 12)
        assert np.array_equal(batch.latents[row, 2:], store.array("latents")[frames])
        assert np.array_equal(batch.trajectory[row, 2:], store.array("trajectories")[frames])
    whole = OccupancyWindows(store).windows([4])
    assert np.array_equal(whole.latents[0], store.array("latents")[15:27])
    labels = OccupancyWindows(store).labels([4])
    assert np.array_equal(labels[0], store.array("labels")[15:27]) and labels.dtype == torch.uint8


def test_batches_are_a_function_of_the_update_alone(store):
    windows, again = OccupancyWindows(store), OccupancyWindows(store)
    for n in (7, 0, 3):
        for a, b in zip(windows.batch(n, 4, 5), again.batch(n, 4, 5), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(windows.batch(0, 4, 5).latents, windows.batch(0, 4, 6).latents)
    clips = OccupancyClips(store, length=6, stride=2)
    assert torch.equal(clips.batch(9, 2, 0), clips.batch(9, 2, 0))
    assert clips.batch(9, 2, 0).shape == (2, 6, 16, 16, 4)


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_every_window_comes_once_an_epoch(store, batch_size):
    windows = OccupancyWindows(store)
    first_latents = {store.array("latents")[start].tobytes(): start for start in store.starts(12)}
    assert len(first_latents) == 6
    drawn = [
        first_latents[latents[0].numpy().tobytes()]
        for n in range(12)
        for latents in windows.batch(n, batch_size, 0).latents
    ]
    for epoch in range(len(drawn) // 6):
        assert sorted(drawn[6 * epoch : 6 * epoch + 6]) == store.starts(12).tolist()


def test_impossible_windows_are_refused(store, tmp_path):
    with pytest.raises(ValueError, match="history must be between 1 and 6 frames, got 0"):
        OccupancyWindows(store, history=0)
    with pytest.raises(ValueError, match="scene of at least 15 key frames"):
        OccupancyClips(store, length=15)
    index = store.folder / "index.json"
    short = shutil.copytree(store.folder, tmp_path / "short")
    scenes = [[str(i), 4] for i in range(7)]
    (short / "index.json").write_text(
        json.dumps(json.loads(index.read_text()) | {"scenes": scenes})
    )
    with pytest.raises(ValueError, match=r"at least 12 key frames in .*short, the longest has 4"):
        OccupancyWindows(OccupancyStore(short))


def test_reading_takes_the_memory_of_a_batch_not_of_the_store(tmp_path):
    """The store is 1.1 GB (of holes); the reader's private memory may grow by 200 MiB."""
    folder = tmp_path / "training"
    folder.mkdir()
    frames, shape = 1200, (50, 50, 75)
    arrays = {}
    for name, dtype, row in (("labels", "uint8", shape), ("trajectories", "float32", (2,)),
                             ("latents", "float32", shape)):  # fmt: skip
        array = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (frames, *row))
        arrays[name] = {"dtype": dtype, "shape": list(array.shape), "sha256": ""}
    index = {"format": 1, "scenes": [["s", frames]], "arrays": arrays}
    (folder / "index.json").write_text(json.dumps(index))
    code = (
        "import resource, sys\n"
        "from mfd_fast.models.occfm.data.windows import OccupancyStore, OccupancyWindows\n"
        "rows = [int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmData')]\n"
        "limit = rows[0] * 1024 + 200 * 2**20\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))\n"
        "windows = OccupancyWindows(OccupancyStore(sys.argv[1]))\n"
        "for n in range(12):\n"
        "    batch = windows.batch(n, 2, 0)\n"
        "assert batch.latents.shape == (2, 12, 50, 50, 75)\n"
    )
    if not hasattr(resource, "RLIMIT_DATA") or not sys.platform.startswith("linux"):
        pytest.skip("RLIMIT_DATA bounds private memory on Linux only")
    assert sum(path.stat().st_size for path in folder.glob("*.npy")) > 900 * 2**20
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


# Command ------------------------------------------------------------------------------------


def test_the_command_makes_and_checks_a_store(tmp_path, capsys):
    arguments = ["prepare", "occfm", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "s")]
    synthetic = ["--synthetic", "1", "--grid", "8,8,4", "--voxel", "4", "--frames", "12"]
    assert main([*arguments, *synthetic]) == 0
    assert "1 scenes, 12 key frames, trajectories [2], labels [8, 8, 4]" in capsys.readouterr().out
    assert main(["prepare", "occfm", "--check", str(tmp_path / "s")]) == 0
    assert capsys.readouterr().out.count("every checksum is right") == 2


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["digits"], "unknown data 'digits'; there is occfm"),
        (["occfm"], "expected mfd-fast prepare occfm --data DIR --out STORE"),
        (["occfm", "--data", "d", "--out", "o", "--splits", "test"], "got 'test'"),
        (["occfm", "--data", "d", "--out", "o", "--synthetic", "1", "--grid", "8"], "got '8'"),
        (["occfm", "--data", "d", "--out", "o", "--lattents", "x4"], "did you mean '--latents'"),
        (["occfm", "--check", "nowhere"], "expected a folder with some of"),
    ],
)
def test_wrong_requests_are_one_sentence(tmp_path, monkeypatch, capsys, arguments, reason):
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", *arguments]) == 2
    assert reason in capsys.readouterr().err
