"""On disk: complete or absent, verified or refused by name; a full disk costs one checkpoint."""

import json
import random
import re
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import assert_same, largest_file, make_checkpointer, make_distiller, next_cond

from mfd_fast.files import whole as files
from mfd_fast.run import checkpoint
from mfd_fast.run import checkpoint_writer as checkpointer
from mfd_fast.run.checkpoint import (
    Counts,
    DamagedCheckpointError,
    checkpoints_in,
    latest_good,
    read,
)
from mfd_fast.run.config import TrainConfig

ROOT = Path(__file__).parents[2]
TREE = {
    "numbers": {0: 1, "one": 2.5, "none": None, "yes": True, "pair": (1, [0.1, "x"])},
    "empty": {"dict": {}, "list": [], "tuple": ()},
    "tensors": [
        torch.arange(6.0).view(2, 3),
        torch.tensor(3, dtype=torch.int32),
        torch.zeros(0, 4),
    ],
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "strided": torch.arange(12).view(3, 4).t(),
    "flags": torch.tensor([True, False]),
}


def write(folder, counts=None, tree=TREE, **settings):
    saver = make_checkpointer(folder, TrainConfig(**settings))
    counts = counts or Counts(3, 6)
    saver.save(counts, tree)
    saver.wait()
    return folder / str(counts)


def test_a_state_comes_back_exactly(tmp_path):
    state = read(write(tmp_path))
    assert state.pop("header") == {"made_by": "a test"}
    assert torch.equal(state.pop("rng")["cpu"][0], torch.get_rng_state())
    assert_same(state, TREE)


def test_the_tensor_file_is_plain_safetensors(tmp_path):
    tensors = load_file(write(tmp_path) / "tensors-00000-of-00001.safetensors")
    assert torch.equal(tensors["tensors/0"], TREE["tensors"][0])
    assert tensors["half"].dtype == torch.bfloat16


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"state/3 is a object"):
        checkpoint.pack({"state": {3: object()}})


def test_a_copy_is_taken_when_save_returns(tmp_path):
    """The update after a checkpoint must not reach into it."""
    saver, value = make_checkpointer(tmp_path, TrainConfig()), torch.ones(1000)
    saver.save(Counts(1, 1), {"value": value})
    value.fill_(7.0)
    saver.wait()
    assert torch.equal(read(tmp_path / str(Counts(1, 1)))["value"], torch.ones(1000))


def test_one_checkpoint_is_written_at_a_time_and_training_goes_on(tmp_path, monkeypatch):
    first, second = gates = threading.Event(), threading.Event()
    commit, writes = checkpointer.commit, iter(gates)

    def slow(*args):
        assert next(writes).wait(30)
        commit(*args)

    monkeypatch.setattr(checkpointer, "commit", slow)
    saver = make_checkpointer(tmp_path, TrainConfig())
    saver.save(Counts(1, 1), TREE)  # returns although nothing can be finished yet
    assert checkpoints_in(tmp_path) == []
    threading.Timer(0.2, first.set).start()
    saver.save(Counts(2, 2), TREE)  # waits for the one before
    assert [path.name for path in checkpoints_in(tmp_path)] == [str(Counts(1, 1))]
    second.set()
    saver.wait()
    assert [path.name for path in checkpoints_in(tmp_path)] == [str(Counts(n, n)) for n in (1, 2)]


def test_an_error_of_the_writer_is_raised_at_the_next_checkpoint(tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("a bug in the writer")

    monkeypatch.setattr(checkpointer, "commit", broken)
    saver = make_checkpointer(tmp_path, TrainConfig())
    saver.save(Counts(1, 1), TREE)
    with pytest.raises(RuntimeError, match="a bug in the writer"):
        saver.save(Counts(2, 2), TREE)


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ({"keep_last": 2}, [4, 5]),
        ({"keep_last": 1, "keep_every": 2}, [2, 4, 5]),
        ({"keep_last": 9}, [1, 2, 3, 4, 5]),
    ],
)
def test_what_is_kept(tmp_path, keep, left):
    saver = make_checkpointer(tmp_path, TrainConfig(**keep))
    for n in range(1, 6):
        saver.save(Counts(n, 10 * n), {"n": n})
    saver.wait()
    assert [Counts.of(path).student for path in checkpoints_in(tmp_path)] == left
    assert not list(tmp_path.glob(".*"))


def test_counts_order_checkpoints():
    paths = [Path(str(Counts(*pair))) for pair in [(30, 150), (29, 149), (30, 153), (1_000_000, 2)]]
    assert sorted(map(Counts.of, paths)) == [Counts(29, 149), Counts(30, 150), Counts(30, 153),
                                             Counts(1_000_000, 2)]  # fmt: skip
    assert Counts.of(Path("student-1")) is None and Counts.of(Path(".writing-x")) is None


def damage(path, draw):
    """Change one byte of one file, or cut it; what was done."""
    file = draw.choice(sorted(path.iterdir()))
    data = bytearray(file.read_bytes())
    where = draw.randrange(len(data))
    if draw.random() < 0.5:
        data[where] ^= 1 << draw.randrange(8)
    else:
        del data[where:]
    file.write_bytes(data)
    return file.name


def test_no_corruption_is_loaded(tmp_path):
    """Fifty of them here; ``scripts/reliability.py`` makes 200."""
    draw = random.Random(0)
    good = write(tmp_path / "good")
    contents = {file.name: file.read_bytes() for file in good.iterdir()}
    for _ in range(50):
        broken = tmp_path / good.name
        broken.mkdir(exist_ok=True)
        for name, data in contents.items():
            (broken / name).write_bytes(data)
        name = damage(broken, draw)
        with pytest.raises(DamagedCheckpointError, match=rf"{good.name} is damaged: {name}"):
            read(broken)


@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_a_missing_file_is_named(tmp_path, name):
    path = write(tmp_path)
    (path / name).unlink()
    with pytest.raises(DamagedCheckpointError, match=rf"{name} cannot be read: No such file"):
        read(path)


def test_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    path = write(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has checkpoint format 99; this version reads 1"):
        read(path)


def test_the_newest_good_one_is_found(tmp_path):
    paths = [write(tmp_path, Counts(n, n), keep_last=9) for n in (1, 2, 3)]
    (paths[2] / "state.json").write_text("{}")
    found, wrong = latest_good(tmp_path)
    assert found == paths[1]
    assert len(wrong) == 1 and "state.json has 2 bytes" in str(wrong[0])
    assert latest_good(tmp_path / "nowhere") == (None, [])


def test_a_full_disk_costs_one_checkpoint_and_nothing_else(tmp_path):
    told = []
    saver = make_checkpointer(tmp_path, TrainConfig(), warn=told.append)
    state = {"value": torch.randn(5000)}
    saver.save(Counts(1, 1), state)
    saver.wait()
    with largest_file(10_000):
        saver.save(Counts(2, 2), state)
        saver.wait()
    assert len(told) == 1 and "File too large. It is tried again at the next" in told[0]
    assert [path.name for path in tmp_path.iterdir()] == [str(Counts(1, 1))]  # nothing half
    assert torch.equal(read(tmp_path / str(Counts(1, 1)))["value"], state["value"])
    saver.save(Counts(3, 3), state)
    saver.wait()
    assert saver.last_written == tmp_path / str(Counts(3, 3))


def test_what_killed_runs_left_is_removed(tmp_path):
    path = write(tmp_path)
    for name in (".writing-student-000009-aux-000009-ab", ".removing-student-000001-aux-000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{")
    files.clean(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_of_the_same_updates_is_replaced(tmp_path):
    """A run resumed from an older one comes by the place of a damaged one again."""
    path = write(tmp_path, tree={"n": 1})
    (path / "state.json").write_text("")
    assert read(write(tmp_path, tree={"n": 2}))["n"] == 2


def test_the_state_of_a_distiller_is_complete(tmp_path):
    """Everything a Distiller's state holds survives the files; its next update is the same."""
    one, two = make_distiller(loss_scale=1024.0), make_distiller(loss_scale=1024.0, seed=5)
    for n in range(4):
        one.step(next_cond(n))
    state = one.state_dict()
    path = write(tmp_path, tree={"distiller": one.live_state()})
    assert_same(read(path)["distiller"], state)
    two.load_state_dict(read(path)["distiller"])
    for n in range(4, 8):
        a, b = one.step(next_cond(n)), two.step(next_cond(n))
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert_same(one.state_dict(), two.state_dict())


UNSAFE = re.compile(
    r"torch\.load\((?!.*weights_only=True)|\bpickle\.loads?\(|\byaml\.(load|unsafe_load)\(|"
    r"weights_only=False|allow_pickle=True|\bpickle\.Unpickler\("
)


def test_nothing_in_the_tree_loads_code_from_a_file():
    found = []
    for folder in ("mfd_fast", "bench", "scripts", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if UNSAFE.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found


@pytest.mark.parametrize(
    "line",
    ["torch.load(path)", "pickle.load(file)", "pickle.loads(b)", "yaml.load(text)",
     "np.load(p, allow_pickle=True)", "pickle.Unpickler(file).load()"],
)  # fmt: skip
def test_that_search_finds_what_it_is_for(line):
    assert UNSAFE.search(line)
    assert not UNSAFE.search("torch.load(path, weights_only=True)")


def test_state_json_is_json_that_others_can_read(tmp_path):
    tree = json.loads((write(tmp_path) / "state.json").read_text())
    assert {key for key, _ in tree["dict"]} == {"header", *TREE, "rng"}
