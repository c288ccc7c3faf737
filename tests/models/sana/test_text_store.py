"""The store of embeddings: what comes out is what went in, whatever happens while it is written."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from text_encoders import FakeEncoder, make_prompts

from mfd_fast.models.sana.text.store import HEADER, NULL, TextStore, write_text_store

COUNT, BATCH, SHARD = 23, 3, 8


@pytest.fixture
def prompts(tmp_path):
    return make_prompts(tmp_path / "prompts.txt", COUNT)


@pytest.fixture
def write(prompts, tmp_path):
    def write(path=tmp_path / "store", encoder=None, prompts=prompts, **options):
        options = {"batch": BATCH, "shard_size": SHARD} | options
        return write_text_store(path, prompts, encoder or FakeEncoder(), **options)

    return write


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def expected_tokens(prompts, index):
    """The batch of a prompt ends with its shard."""
    first = index // SHARD * SHARD
    start = first + (index - first) // BATCH * BATCH
    size = min(start + BATCH, first + SHARD, COUNT) - start
    return FakeEncoder().tokens(prompts[index], size).bfloat16()


def test_round_trip(write, prompts):
    done = []
    store = write(progress=done.append)
    assert len(store) == COUNT and sum(done) == COUNT and max(done) == BATCH
    lengths = [1 + len(prompt) % FakeEncoder.max_length for prompt in prompts]
    assert store.lengths.tolist() == lengths and store.longest == max(lengths)
    assert torch.equal(store.null, FakeEncoder().null().bfloat16())
    for indices in ([22, 0, 7, 8, 7], [5]):
        cond = store.batch(indices)
        assert cond["text"].shape == (len(indices), max(lengths[i] for i in indices), 6)
        assert cond["mask"].sum(1).tolist() == [lengths[i] for i in indices]
        for text, mask, index in zip(cond["text"], cond["mask"], indices, strict=True):
            assert torch.equal(text[mask], expected_tokens(prompts, index))
            assert not text[~mask].any()
        padded = store.batch(indices, length=store.longest)
        assert padded["text"].shape[1] == padded["mask"].shape[1] == store.longest
        width = cond["text"].shape[1]
        assert torch.equal(padded["text"][:, :width], cond["text"])
    with pytest.raises(ValueError, match=f"length is 2, but a prompt has {max(lengths)} tokens"):
        store.batch([lengths.index(max(lengths))], length=2)


def test_only_real_tokens_are_kept(write):
    store = write()
    data = 2 * 6 * int(store.lengths.sum()) + 4 * COUNT
    files = content(store.path)
    assert sum(len(files[name]) for name in files if name.startswith("shard")) == data + 3 * 32
    assert set(files) == {HEADER, NULL, *(f"shard-0000{n}.bin" for n in range(3))}


class Stops(FakeEncoder):
    """Is interrupted at its n-th call."""

    def __init__(self, stop):
        super().__init__()
        self.stop = stop

    def encode(self, prompts):
        if len(self.calls) == self.stop:
            raise KeyboardInterrupt
        return super().encode(prompts)


@pytest.mark.parametrize("stop", range(9))
def test_an_interrupted_store_goes_on_to_the_same_bytes(write, tmp_path, stop):
    whole = content(write(tmp_path / "whole").path)
    with pytest.raises(KeyboardInterrupt):
        write(encoder=Stops(stop))
    with pytest.raises(ValueError, match=r"is not complete: . of 4 shards are missing"):
        TextStore(tmp_path / "store")
    encoder, done = FakeEncoder(), []
    write(encoder=encoder, progress=done.append)
    assert content(tmp_path / "store") == whole
    assert len(encoder.calls) == 9 - stop // 3 * 3  # three calls a shard: nothing twice
    assert sum(done) == COUNT
    write(encoder=(again := FakeEncoder()))
    assert not again.calls and content(tmp_path / "store") == whole


KILLED = """
import itertools, os, signal, sys
from pathlib import Path
from text_encoders import FakeEncoder
from mfd_fast.models.sana.text.prompts import open_prompts
from mfd_fast.models.sana.text.store import write_text_store

def write(folder, moment):
    events = iter(range(moment))
    def maybe_die(event, args):
        if event in ("open", "os.rename", "os.mkdir") and str(folder) in str(args[0]):
            if next(events, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(maybe_die)
    write_text_store(folder, open_prompts(sys.argv[2]), FakeEncoder(), batch=3, shard_size=8)

for moment in itertools.count():
    child = os.fork()
    if child == 0:
        write(Path(sys.argv[1]) / str(moment), moment)
        os._exit(0)
    if os.waitpid(child, 0)[1] != signal.SIGKILL:
        break
"""


def test_a_process_killed_at_any_file_operation_leaves_a_store_that_can_go_on(write, tmp_path):
    """SIGKILL before the first, the second, ... time that something is opened or renamed."""
    whole = content(write(tmp_path / "whole").path)
    (folders := tmp_path / "killed").mkdir()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, "tests"])}
    command = [sys.executable, "-c", KILLED, folders, tmp_path / "prompts.txt"]
    subprocess.run(command, env=environment, cwd=Path(__file__).parents[3], check=True)
    *killed, finished = sorted(folders.iterdir(), key=lambda folder: int(folder.name))
    assert content(finished) == whole and len(killed) > 10
    for folder in killed:
        write(folder)
        assert content(folder) == whole


def test_every_flipped_bit_is_found(write):
    """One flipped bit anywhere: refused with --verify, and wherever it would be misread without."""
    store = write()
    for path in sorted(store.path.iterdir()):
        original = path.read_bytes()
        for place in range(0, len(original), 7):
            broken = bytearray(original)
            broken[place] ^= 1 << place % 8
            path.write_bytes(broken)
            with pytest.raises(ValueError, match=path.name):
                TextStore(store.path, verify=True)
        path.write_bytes(original)
    TextStore(store.path, verify=True)


@pytest.mark.parametrize("cut", [1, 32, 100])
def test_files_of_another_size_are_refused_at_once(write, cut):
    store = write()
    shard = store.path / "shard-00001.bin"
    whole = shard.read_bytes()
    for data in (whole[:-cut], whole + bytes(cut), b""):
        shard.write_bytes(data)
        with pytest.raises(ValueError, match=r"shard-00001.bin (is broken|belongs to another)"):
            TextStore(store.path)
        with pytest.raises(ValueError, match=r"shard-00001.bin (is broken|belongs to another)"):
            write()


def test_a_shard_of_another_store_is_refused(write, tmp_path):
    store, other = write(), write(tmp_path / "other", batch=4)
    (store.path / NULL).write_bytes((other.path / NULL).read_bytes())
    with pytest.raises(ValueError, match=r"null.bin belongs to another store"):
        TextStore(store.path)


def test_what_does_not_continue_a_store_is_refused(write, prompts, tmp_path):
    store = write()
    before = content(store.path)
    for options, what in (
        ({"batch": 4}, "batch"),
        ({"shard_size": 4}, "shard_size"),
        ({"prompts": make_prompts(tmp_path / "few.txt", 9)}, "prompts.count"),
    ):
        with pytest.raises(ValueError, match=f"holds a store with other .*{what}"):
            write(**options)
    with pytest.raises(ValueError, match="other embeddings for the empty prompt"):
        write(encoder=FakeEncoder(seed=1))
    assert content(store.path) == before
    with pytest.raises(ValueError, match="holds other files"):
        write(tmp_path)
    with pytest.raises(ValueError, match=r"is no text store: it has no header\.json"):
        TextStore(tmp_path)
    header = json.loads(before[HEADER]) | {"batch": 5}
    (store.path / HEADER).write_text(json.dumps(header))
    with pytest.raises(ValueError, match=r"header.json is broken"):
        TextStore(store.path)


@pytest.mark.parametrize("fault", ["gap", "dim", "infinite"])
def test_an_encoder_that_is_wrong_is_refused(write, tmp_path, fault):
    class Wrong(FakeEncoder):
        def encode(self, prompts):
            text, mask = super().encode(prompts)
            if fault == "gap":
                mask[0] = torch.arange(mask.shape[1]) == 1
            elif fault == "infinite":
                text[0, 0, 0] = torch.inf
            return (text[..., 1:] if fault == "dim" else text), mask

    with pytest.raises(ValueError, match="not finite" if fault == "infinite" else "tokens first"):
        write(encoder=Wrong())
    assert set(content(tmp_path / "store")) == {HEADER, NULL}


def test_two_writers_at_once_are_refused(write):
    class Nested(FakeEncoder):
        def encode(self, prompts):
            with pytest.raises(ValueError, match="is being written by another process"):
                write()
            return super().encode(prompts)

    write(encoder=Nested())


def test_reading_does_not_load_the_files(write):
    class Wide(FakeEncoder):
        dim = 4096

    path = write(encoder=Wide()).path
    tracemalloc.start()
    batch = TextStore(path).batch([3])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert batch["text"].shape[2] == 4096
    assert peak < sum(file.stat().st_size for file in path.iterdir()) / 4
