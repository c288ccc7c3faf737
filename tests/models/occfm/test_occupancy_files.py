"""Files of occupancy data: what is read, and what is refused by file and reason."""

import pickle
import sys
from collections import OrderedDict

import numpy as np
import pytest

from mfd_fast.files.pickles import load_plain_pickle
from mfd_fast.models.occfm.data.files import (
    info_path,
    labels_path,
    read_key_frames,
    read_labels,
    read_latents,
    write_key_frames,
    write_labels,
    write_latents,
)


def dump(path, value, protocol=4):
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


# Pickles ------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["f4", ">f4", "f8", "f2", "i8", "u1", "b1"])
def test_arrays_of_every_protocol_come_back(tmp_path, protocol, dtype):
    arrays = {
        "c": np.arange(24).reshape(2, 3, 4).astype(dtype),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3).astype(dtype)),
        "empty": np.zeros((0, 2), dtype=dtype),
        "scalar": np.ones(1, dtype=dtype)[0],
    }
    found = load_plain_pickle(dump(tmp_path / "a.pkl", arrays, protocol))
    for name, array in arrays.items():
        read = np.asarray(found[name])
        assert read.dtype == array.dtype and read.shape == array.shape
        assert np.array_equal(read, array)


def test_plain_containers_come_back(tmp_path):
    value = [{"a": (1, 2.5, None, True)}, OrderedDict(b=[b"x", "y"]), {3, 4}, bytearray(b"z")]
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert load_plain_pickle(dump(tmp_path / "a.pkl", value, protocol)) == value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", [np.str_, lambda text: np.array([text], dtype=">U9")[0]])
def test_texts_of_numpy_come_back(tmp_path, protocol, kind):
    """A token that an array of texts held is the token, as key and as value."""
    steps = np.ones((6, 2), np.float32)
    value = {kind("s\u00e9"): [{"token": kind("t\u4e2d0"), "gt_ego_fut_trajs": steps}]}
    path = dump(tmp_path / "a.pkl", {"infos": value}, protocol)
    assert [(f.scene, f.token) for f in read_key_frames(path)] == [("s\u00e9", "t\u4e2d0")]


def test_arrays_written_by_older_numpy_are_read(tmp_path):
    array = np.arange(3, dtype="f4")
    old = pickle.dumps(array, protocol=2).replace(b"numpy._core", b"numpy.core")
    (tmp_path / "old.pkl").write_bytes(old)
    assert np.array_equal(np.asarray(load_plain_pickle(tmp_path / "old.pkl")), array)


class Attack:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ((print, "run!"), "builtins.print"),
        ((eval, "print('run!')"), "builtins.eval"),
        ((getattr, "x", "upper"), "builtins.getattr"),
        ((np.load, "somewhere"), "numpy.load"),
        ((sys.exit, 3), "sys.exit"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, capsys, call, name, protocol):
    path = dump(tmp_path / "evil.pkl", [{"x_sampled": Attack(*call)}], protocol)
    last = name.split(".")[-1]
    with pytest.raises(ValueError, match=rf"evil.pkl, got the name \S*{last} \(under 'x_"):
        load_plain_pickle(path)
    assert capsys.readouterr().out == ""


def test_an_array_of_objects_is_never_built(tmp_path):
    found = load_plain_pickle(dump(tmp_path / "a.pkl", np.array([{}, None], dtype=object)))
    with pytest.raises(ValueError, match=r"values of type 'O8' instead of numbers"):
        np.asarray(found)


def test_a_forged_array_does_not_read_foreign_memory(tmp_path):
    honest = pickle.dumps(np.zeros(2, dtype="f8"), protocol=2)
    for forged, reason in (
        (honest.replace(b"K\x02\x85", b"K\xff\x85"), "needs 2040 bytes, found 16"),
        (honest.replace(b"X\x02\x00\x00\x00f8", b"X\x02\x00\x00\x00O8"), "instead of numbers"),
    ):
        assert forged != honest
        (tmp_path / "a.pkl").write_bytes(forged)
        found = load_plain_pickle(tmp_path / "a.pkl")
        with pytest.raises(ValueError, match=reason):
            np.asarray(found)


def test_truncated_and_foreign_files_are_named(tmp_path):
    whole = pickle.dumps([np.arange(100.0)] * 3)
    for cut in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pkl").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=rf"complete pickle at .*cut.pkl, got {cut} bytes"):
            load_plain_pickle(tmp_path / "cut.pkl")
    (tmp_path / "text.pkl").write_text("not a pickle at all")
    with pytest.raises(ValueError, match=r"complete pickle at .*text.pkl"):
        load_plain_pickle(tmp_path / "text.pkl")
    with pytest.raises(FileNotFoundError, match=r"pickle at .*none.pkl, found none"):
        load_plain_pickle(tmp_path / "none.pkl")


# Labels -------------------------------------------------------------------------------------


def test_labels_come_back(tmp_path):
    grid = np.random.default_rng(0).integers(0, 18, (5, 6, 4)).astype(np.uint8)
    write_labels(tmp_path / "new" / "labels.npz", grid)
    assert np.array_equal(read_labels(tmp_path / "new" / "labels.npz"), grid)
    np.savez(tmp_path / "wide.npz", semantics=grid.astype(np.int64))
    assert read_labels(tmp_path / "wide.npz").dtype == np.uint8


def test_bad_labels_are_named(tmp_path):
    path = tmp_path / "labels.npz"
    write_labels(path, np.full((8, 8, 4), 17, dtype=np.uint8))
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=rf"'semantics' in .*labels.npz, got {cut} bytes"):
            read_labels(path)
    for arrays, reason in (
        ({"other": np.zeros(3)}, "expected an array 'semantics'"),
        ({"semantics": np.zeros((2, 2), np.uint8)}, r"got uint8 of shape \[2, 2\]"),
        ({"semantics": np.zeros((2, 2, 2))}, "got float64"),
        ({"semantics": np.full((2, 2, 2), 18)}, "class ids 0 to 17 .* got 18 to 18"),
        ({"semantics": np.full((2, 2, 2), -1)}, "got -1 to -1"),
        ({"semantics": np.full((2, 2, 2), None)}, "expected an array 'semantics'"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=reason):
            read_labels(path)
    with pytest.raises(FileNotFoundError, match=r"labels of a key frame at .*gone.npz"):
        read_labels(tmp_path / "gone.npz")


# Scene lists and latents --------------------------------------------------------------------


def test_key_frames_keep_their_order(tmp_path):
    steps = np.arange(12, dtype=np.float64).reshape(6, 2)
    scenes = {
        "b": [{"token": "b0", "gt_ego_fut_trajs": steps}],
        "a": [{"token": f"a{i}", "gt_ego_fut_trajs": steps + i} for i in (1, 0)],
    }
    write_key_frames(tmp_path / "info.pkl", scenes)
    frames = read_key_frames(tmp_path / "info.pkl")
    assert [(frame.scene, frame.token) for frame in frames] == [
        ("b", "b0"),
        ("a", "a1"),
        ("a", "a0"),
    ]
    assert frames[1].displacement.tolist() == [1.0, 2.0]
    assert frames[1].displacement.dtype == np.float32


@pytest.mark.parametrize(
    ("infos", "reason"),
    [
        ([], "scenes under 'infos' in .* got a list of 0"),
        ({"infos": [1]}, r"got a dict with \['infos'\]"),
        ({"infos": {"s": 3}}, "list of key frames for s in .* got a int"),
        ({"infos": {"s": [{"token": "t"}]}}, r"key frame 0 of s in .* got a dict with \['token'\]"),
        ({"infos": {"s": [{"token": "t", "gt_ego_fut_trajs": np.zeros(2)}]}}, r"got \[2\]"),
        ({"infos": {"s": [{"token": "t", "gt_ego_fut_trajs": ["x"]}]}}, "expected numbers as"),
        ({"infos": {"s": [{"token": "t", "gt_ego_fut_trajs": np.ones((6, 2))}] * 2}}, "twice"),
    ],
)  # fmt: skip
def test_bad_scene_lists_are_named(tmp_path, infos, reason):
    with pytest.raises(ValueError, match=reason):
        read_key_frames(dump(tmp_path / "info.pkl", infos))


def entry(token="t", latent=None, **changes):
    latent = np.zeros((1, 4, 8, 8), np.float32) if latent is None else latent
    path = f"data/nuscenes/gts/scene/{token}/labels.npz"
    return {"x_sampled": latent, "gt_path": [[path]], "gt_trajs": np.zeros((1, 2))} | changes


@pytest.mark.parametrize("nesting", [lambda p: p, lambda p: [p], lambda p: [[p]], lambda p: ([p],)])
def test_latents_are_found_by_token(tmp_path, nesting):
    latent = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    path = nesting("data/nuscenes/gts/scene-1/abc/labels.npz")
    found = read_latents(
        dump(tmp_path / "l.pkl", [entry("xyz"), entry(latent=latent, gt_path=path)])
    )
    assert list(found) == ["xyz", "abc"]
    assert np.array_equal(found["abc"], latent[0])


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({}, "list of cached frames in .* got a dict"),
        ([], "got a list of 0"),
        ([entry(), {"mu": 1}], r"entry 1 of .*l.pkl, got a dict with \['mu'\]"),
        ([entry(latent=np.zeros((4, 8, 8)))], r"shape \[1, C, h, w\] in entry 0 .* \[4, 8, 8\]"),
        ([entry(latent=np.full((1, 4, 8, 8), np.nan))], "finite latents in entry 0"),
        ([entry(latent="x")], "expected numbers as x_sampled of entry 0"),
        ([entry(gt_path=[["a", "b"]])], r"gt_path ending in .* got \['a', 'b'\]"),
        ([entry(), entry()], "got t twice"),
        ([entry("a"), entry("b", np.zeros((1, 4, 9, 8)))], r"one shape in .*\(4, 9, 8\)"),
    ],
)  # fmt: skip
def test_bad_latents_are_named(tmp_path, entries, reason):
    with pytest.raises(ValueError, match=reason):
        read_latents(dump(tmp_path / "l.pkl", entries))


def test_written_latents_are_those_of_the_encoder(tmp_path):
    grids = np.random.default_rng(0).integers(0, 18, (3, 8, 8, 2)).astype(np.uint8)
    steps = np.ones((6, 2), np.float32)
    infos = [{"token": f"t{i}", "gt_ego_fut_trajs": steps * i} for i in range(3)]
    write_key_frames(info_path(tmp_path, "validation"), {"s": infos})
    for i, grid in enumerate(grids):
        write_labels(labels_path(tmp_path, "s", f"t{i}"), grid)
    path = write_latents(tmp_path, "validation", lambda g: g.transpose(2, 0, 1) * 0.5, size="x2")
    assert path == tmp_path / "nusc_latent_vae" / "x2" / "nus_sem_occ_validation.pkl"
    found = read_latents(path)
    for i, grid in enumerate(grids):
        assert np.array_equal(found[f"t{i}"], grid.transpose(2, 0, 1).astype(np.float32) * 0.5)
    # numpy's own unpickler sees the keys and shapes of the official cache
    official = pickle.loads(path.read_bytes())[2]
    assert official["x_sampled"].shape == (1, 2, 8, 8)
    assert official["gt_path"] == [["data/nuscenes/gts/s/t2/labels.npz"]]
    assert official["gt_trajs"].tolist() == [[2.0, 2.0]]
