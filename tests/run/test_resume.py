"""A continued run is the uninterrupted one, bit for bit; what does not belong to it is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import small_runs
import torch
from recorded_graph import RecordedGraph
from small_runs import (
    StopAfter,
    assert_same,
    largest_file,
    make_backbone,
    make_distiller,
    run,
    without_clock,
)

from mfd_fast import cli
from mfd_fast.backbones.lanes import CopiedBackbone
from mfd_fast.distill.captured import CapturedDistiller
from mfd_fast.distill.ranks import Ranks
from mfd_fast.models import preset
from mfd_fast.run import session as runner
from mfd_fast.run.checkpoint import checkpoints_in, read
from mfd_fast.run.config import to_dict
from mfd_fast.run.folder import RunFolder
from mfd_fast.run.resume import check_config, check_header, header
from mfd_fast.run.stop import StopSignal

UPDATES = 6  # of the student; 12 more of the auxiliary


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    distiller, rows = run(tmp_path_factory.mktemp("whole"), updates=UPDATES)
    return distiller.state_dict(), without_clock(rows)


@pytest.mark.parametrize("n", [0, 1, 2, 7, 16])
def test_a_run_stopped_anywhere_continues_bit_for_bit(tmp_path, uninterrupted, n):
    """Also in the middle of a cycle: the auxiliary's last loss is part of the next row."""
    first, before = run(tmp_path, updates=UPDATES, stop=StopAfter(n))
    assert sum(first.num_updates.values()) == n + 1
    second, after = run(tmp_path, updates=UPDATES, resumed=True)
    assert_same(second.state_dict(), uninterrupted[0])
    assert without_clock(before + after) == uninterrupted[1]


def test_a_captured_run_continues_bit_for_bit(tmp_path, uninterrupted):
    make = partial(CapturedDistiller, graph=RecordedGraph)
    run(tmp_path, updates=UPDATES, stop=StopAfter(9), make=make)
    second, _ = run(tmp_path, updates=UPDATES, resumed=True, make=make)
    assert_same(second.state_dict(), uninterrupted[0])


def test_a_run_continues_bit_for_bit_with_another_train_capture(tmp_path, uninterrupted):
    make = partial(CapturedDistiller, graph=RecordedGraph)
    parts = ({}, {"make": make}), ({"make": make}, {})
    for number, (first, second) in enumerate(parts):
        run(tmp_path / str(number), updates=UPDATES, stop=StopAfter(9), **first)
        end, _ = run(tmp_path / str(number), updates=UPDATES, resumed=True, **second)
        assert_same(end.state_dict(), uninterrupted[0])
    config = preset("digits")
    for capture in (False, True, "on", "off"):  # the first two from older versions
        saved = to_dict(config)
        saved["train"]["capture"] = capture
        assert check_config(saved, config) == []


class ChannelsLast(torch.nn.Module):
    """A convolution whose weight lies in memory as its products want it."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1).to(memory_format=torch.channels_last)

    def forward(self, x, t, cond):
        return torch.tanh(self.conv(x)) + t[:, None, None, None] * cond[..., None, None]


def test_moments_of_channels_last_weights_are_restored_in_their_layout(tmp_path):
    def make():
        torch.manual_seed(0)
        backbone = CopiedBackbone(
            ChannelsLast(), sample_shape=(3, 4, 4), null_cond=torch.zeros_like
        )
        return {"backbone": backbone}

    whole, _ = run(tmp_path / "whole", updates=UPDATES, **make())
    run(tmp_path / "cut", updates=UPDATES, stop=StopAfter(7), **make())
    resumed, _ = run(tmp_path / "cut", updates=UPDATES, resumed=True, **make())
    assert not whole.parameters_of("student")[0].is_contiguous()
    assert_same(resumed.state_dict(), whole.state_dict())


CHILD = """
import sys
from pathlib import Path
from small_runs import run

run(Path(sys.argv[1]), updates=10**6, checkpoint_every=1)
"""
TESTS = Path(__file__).parents[1] / "support"
CHILD_ENV = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parents[1]}"}


def test_a_killed_run_continues_bit_for_bit(tmp_path):
    """kill -9 while checkpoints are being written; the rest is counted from what is left."""
    command = [sys.executable, "-c", CHILD, str(tmp_path / "run")]
    child = subprocess.Popen(command, env=CHILD_ENV)
    while len(checkpoints_in(tmp_path / "run")) < 2 and child.poll() is None:
        time.sleep(0.01)
    child.kill()
    child.wait()
    left = checkpoints_in(tmp_path / "run")[-1]
    done = read(left)["distiller"]["num_updates"]["student"]
    continued, _ = run(tmp_path / "run", updates=done + 2, resumed=True)
    whole, _ = run(tmp_path / "whole", updates=done + 2)
    assert_same(continued.state_dict(), whole.state_dict())


def test_a_signal_is_noted_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert stop.signum == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.signum == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGTERM)  # the next one does not tear the checkpoint
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)  # the impatient user's second Ctrl-C
    assert signal.getsignal(signal.SIGTERM) is before


# What may change, and what not.


def changed(**sections):
    config = preset("digits")
    for section, values in sections.items():
        config = replace(config, **{section: replace(getattr(config, section), **values)})
    return config


def saved():
    return json.loads(json.dumps(to_dict(preset("digits"))))


def test_the_length_and_the_logging_of_a_run_may_change():
    assert (
        check_config(saved(), changed(train={"updates": 9, "log_every": 3, "keep_last": 5})) == []
    )
    (remark,) = check_config(saved(), changed(train={"activation": "block"}))
    assert remark == "train.activation was 'none' and is 'block': from here on equal to rounding"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(distill={"guidance": 3.0}), "distill.guidance 2.0, this run has 3.0; give the"),
        (changed(train={"batch_size": 32}), "train.batch_size 64, this run has 32"),
        (changed(distill={"seed": 1}), "distill.seed 0, this run has 1"),
    ],
)
def test_an_incompatible_setting_is_refused_by_key_and_value(config, message):
    with pytest.raises(ValueError, match=f"the checkpoint was made with {message}"):
        check_config(saved(), config)


def test_another_model_is_refused_by_name():
    config, mine = preset("digits"), make_backbone(seed=1)
    before = header(config, mine, Ranks())
    assert check_header(before, header(config, make_backbone(seed=1), Ranks())) == []
    with torch.no_grad():
        mine.teacher.blocks[1].bias[3] += 1e-6  # one number of the frozen teacher
    with pytest.raises(ValueError, match=r"another model: .* frozen .*blocks.1.bias \[16\]"):
        check_header(before, header(config, mine, Ranks()))
    with pytest.raises(ValueError, match=r"cuda, this run is on cpu; set train.device cuda"):
        check_header({**before, "device": "cuda"}, header(config, make_backbone(seed=1), Ranks()))
    remarks = check_header({**before, "world": 4}, before)
    assert remarks == ["world was 4, is 1: from here equal to rounding"]


def test_weights_of_another_shape_are_refused():
    state = make_distiller().state_dict()
    state["student"][0] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="belongs to another network"):
        make_distiller().load_state_dict(state)


# The command line.

SHORT = ["--train.updates", "4", "--train.batch-size", "4", "--train.log-every", "1",
         "--train.checkpoint-every", "1", "--distill.aux-updates", "2",
         "--distill.step-size", "0.5"]  # fmt: skip


@pytest.fixture
def training_only(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(runner._Session, "evaluate", lambda self: self.run.flush())


def distil(*argv):
    return cli.main(["distill", "digits", *map(str, argv)])


def rows_of(folder):
    return without_clock(RunFolder(folder).history())


def final_state(folder):
    state = read(checkpoints_in(folder / "checkpoints")[-1])
    state["progress"].pop("seconds")
    return {key: state[key] for key in ("distiller", "progress", "rng")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner._Session, "evaluate", lambda self: self.run.flush())
        torch.manual_seed(0)
        assert distil("--out", folder, *SHORT) == 0
    return folder


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(
    signum, code, finished, training_only, tmp_path, capsys, monkeypatch
):
    show = runner._show

    def signalled(bar, row):
        show(bar, row)
        if row["update"] == 2:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(runner, "_show", signalled)
    folder = tmp_path / "run"
    assert distil("--out", folder, *SHORT) == code
    error = capsys.readouterr().err
    assert re.search(r"stopped after update 2 of 4; checkpoint .*student-000002-aux-000004", error)
    assert f"mfd-fast distill digits --out {folder} --resume" in error
    assert not (folder / ".lock").exists()
    monkeypatch.setattr(runner, "_show", show)
    assert distil("--out", folder, "--resume") == 0  # the settings are those of the folder
    assert rows_of(folder) == rows_of(finished)
    assert_same(final_state(folder), final_state(finished))


def test_rows_after_the_checkpoint_are_cut_off(finished, training_only, tmp_path):
    """A run killed between two checkpoints has logged more than it can continue from."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    newest = checkpoints_in(folder / "checkpoints")[-1]
    shutil.rmtree(newest)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"update": 4, "half a li')  # what a kill leaves
    assert distil("--resume", folder) == 0
    assert rows_of(folder) == rows_of(finished)
    assert_same(final_state(folder), final_state(finished))


def test_a_damaged_checkpoint_is_refused_and_the_one_before_offered(
    finished, training_only, tmp_path, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before, newest = checkpoints_in(folder / "checkpoints")
    with (newest / "state.json").open("r+") as file:
        file.write("X")
    assert distil("--resume", newest) == 2
    error = capsys.readouterr().err
    assert f"{newest} is damaged: state.json was changed" in error
    assert f"type --resume {before}" in error
    assert distil("--resume", folder) == 0  # without a choice the one before is taken, and said
    assert "an earlier one is taken" in capsys.readouterr().err
    assert_same(final_state(folder), final_state(finished))
    for path in checkpoints_in(folder / "checkpoints"):
        (path / "manifest.json").unlink()
    assert distil("--resume", folder) == 2  # never silently from the start
    assert "no other checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--distill.guidance", "3"], "made with distill.guidance 2.0, this run has 3.0"),
        (["--out", "elsewhere"], "a run continues in its own folder"),
        (["--train.batch-size", "8"], "made with train.batch_size 4, this run has 8"),
    ],
)
def test_a_wrong_continuation_changes_nothing(finished, argv, message, capsys):
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    assert distil("--resume", finished, *argv) == 2
    assert message in capsys.readouterr().err
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


def test_resume_needs_a_place(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert distil("--resume") == 2
    assert "name it: --out FOLDER" in capsys.readouterr().err
    assert distil("--resume", "nowhere") == 2
    assert "nowhere is none" in capsys.readouterr().err
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("")
    assert distil("--resume", "--out", "photos") == 2
    assert "photos is not a run folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.png"]


# The folder.


def test_two_runs_do_not_write_one_folder(tmp_path):
    first = RunFolder.create(tmp_path / "run", preset("digits"))
    with pytest.raises(ValueError, match="already holds files"):
        RunFolder.create(tmp_path / "run", preset("digits"))
    with pytest.raises(ValueError, match=rf"in use by process {os.getpid()} on \S+ since"):
        RunFolder.resume(tmp_path / "run")
    first.release()
    RunFolder.resume(tmp_path / "run").release()


def test_the_lock_of_a_killed_run_is_no_obstacle(tmp_path):
    code = (
        "import os, sys; from mfd_fast.run.folder import RunFolder; "
        "from mfd_fast.models import preset; "
        "RunFolder.create(sys.argv[1], preset('digits')); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    assert subprocess.run(command, env=CHILD_ENV, check=False).returncode == -signal.SIGKILL
    assert "process" in (tmp_path / "run" / ".lock").read_text()
    RunFolder.resume(tmp_path / "run").release()


def test_a_vanished_data_file_loses_nothing(tmp_path, uninterrupted, monkeypatch):
    def vanished(n, cond=small_runs.next_cond):
        if n == 5:
            raise FileNotFoundError("prompts.txt is gone")
        return cond(n)

    with monkeypatch.context() as patch:
        patch.setattr(small_runs, "next_cond", vanished)
        with pytest.raises(FileNotFoundError, match=r"prompts\.txt is gone"):
            run(tmp_path, updates=UPDATES)
    distiller, _ = run(tmp_path, updates=UPDATES, resumed=True)
    assert_same(distiller.state_dict(), uninterrupted[0])


def test_a_full_disk_keeps_the_rows_for_later(tmp_path):
    run = RunFolder.create(tmp_path / "run", preset("digits"))
    assert run.log({"update": 1}) == ""
    with largest_file(20):
        assert "metrics.jsonl could not be written" in run.log({"update": 2, "text": "x" * 30})
    assert [row["update"] for row in run.history()] == [1]  # no half line
    assert run.log({"update": 3}) == ""
    assert [row["update"] for row in run.history()] == [1, 2, 3]
    run.release()


def test_the_reliability_page_is_what_the_results_say():
    from scripts.reliability import PAGE, render

    text = PAGE.read_text()
    assert render(text) == text, "run: python -m scripts.reliability --render"
