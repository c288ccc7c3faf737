"""What is written at the end of something appears whole, or not at all."""

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_runs import largest_file

from mfd_fast.files.weights import save_weights
from mfd_fast.files.whole import clean, staged, write_text, written
from mfd_fast.models import preset
from mfd_fast.run.folder import RunFolder

LARGE = 50_000


def figure(path):
    pictures = pytest.importorskip("mfd_fast.pictures.grids")
    noise = torch.rand(4, 1, 64, 64)
    pictures.sample_grid({"noise": noise}, path, title="noise")


def tree(path):
    with written(path) as partial:
        shutil.copytree(Path(__file__).parents[1] / "data", partial)


def tensors(path):
    with written(path) as partial:
        save_file({"w": torch.zeros(LARGE)}, partial)


def network(path):
    save_weights(torch.nn.Linear(200, 200), path, kind="test", config={}, metadata={})


WRITERS = {
    "text": lambda path: write_text(path, "x" * LARGE),
    "json": lambda path: RunFolder(path.parent).write_json(path.name, "x" * LARGE),
    "figure": figure,
    "tree": tree,
    "tensors": tensors,
    "network": network,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_a_sentence_and_leaves_nothing(name, tmp_path):
    path = tmp_path / "new" / "result.png"
    with (
        largest_file(2000),
        pytest.raises(OSError, match=r"result\.png could not be written: File too large; nothing"),
    ):
        WRITERS[name](path)
    assert not path.parent.exists()
    WRITERS[name](path)  # with room it works at once
    assert path.exists()
    assert [p.name for p in path.parent.iterdir()] == ["result.png"]


def test_a_full_disk_keeps_what_was_there(tmp_path):
    write_text(tmp_path / "results.json", "before")
    with largest_file(2000), pytest.raises(OSError, match="results"):
        write_text(tmp_path / "results.json", "x" * LARGE)
    assert (tmp_path / "results.json").read_text() == "before"


def test_several_files_appear_together(tmp_path):
    def half(folder):
        (folder / "first").write_text("1")
        raise ValueError("the second cannot be made")

    with pytest.raises(ValueError, match="second"), staged(tmp_path) as folder:
        half(folder)
    assert not list(tmp_path.iterdir())
    with staged(tmp_path) as folder:
        (folder / "first").write_text("1")
        (folder / "second").write_text("2")
        assert {p.name for p in tmp_path.iterdir()} == {folder.name}
    assert {p.name for p in tmp_path.iterdir()} == {"first", "second"}


def test_what_cannot_be_read_is_told_as_it_is(tmp_path):
    """A missing source is no full disk."""
    with pytest.raises(FileNotFoundError, match="no teacher here"), written(tmp_path / "m"):
        raise FileNotFoundError("no teacher here")
    with pytest.raises(FileNotFoundError) as missing, written(tmp_path / "m"):
        (tmp_path / "nowhere").read_bytes()
    assert missing.value.errno == errno.ENOENT


def test_a_killed_writer_leaves_a_hidden_folder_that_the_next_run_removes(tmp_path):
    code = (
        "import os, sys; from mfd_fast.files.whole import written\n"
        "with written(sys.argv[1]) as path: path.write_text('half'); os._exit(9)"
    )
    target = tmp_path / "student.safetensors"
    assert subprocess.run([sys.executable, "-c", code, str(target)], check=False).returncode == 9
    assert not target.exists()
    assert len(list(tmp_path.iterdir())) == 1
    RunFolder.resume(tmp_path).release()  # not taken for a stranger's file
    clean(tmp_path)
    assert not list(tmp_path.iterdir())
    RunFolder.create(tmp_path, preset("digits")).release()
