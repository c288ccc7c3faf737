"""Going on after something changed: settings, places of files, a terminal, the data."""

import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import small_runs
import torch
from small_runs import assert_same, run

from mfd_fast import Checkpointer, Distiller, TrainConfig, cli, resume_from, train
from mfd_fast.distill.config import OptimConfig
from mfd_fast.distill.optim import OPTIMIZERS, set_lr
from mfd_fast.models import PRESETS, load_config, preset
from mfd_fast.run import checkpoint, monitors
from mfd_fast.run import session as runner
from mfd_fast.run.checkpoint import checkpoints_in, pack, read, unpack
from mfd_fast.run.config import leaves, to_dict, with_absolute_paths, with_settings
from mfd_fast.run.folder import RunFolder
from mfd_fast.run.resume import check_config, check_optimizers

ROOT = Path(__file__).parents[2]
CHANGEABLE = {
    key for c in PRESETS.values() for key in (*c.MAY_CHANGE, *c.LEARNS_ON, *c.PATHS)
}  # fmt: skip
SETTINGS = {key for c in PRESETS.values() for key, _ in leaves(to_dict(c))}


def own_loop(folder, updates, rate):
    """A loop with optimizers and a learning rate of its own, from its newest checkpoint."""
    backbone = small_runs.make_backbone()
    optimizers = {
        role: torch.optim.AdamW(backbone.parameters_of(role), lr=rate(0))
        for role in ("aux", "student")
    }
    make = partial(Distiller, optimizers=optimizers)
    distiller = small_runs.make_distiller(backbone=backbone, make=make)

    def schedule(row):
        for optimizer in optimizers.values():
            set_lr(optimizer, rate(row["update"]))

    config = TrainConfig(updates=updates, log_every=1)
    checkpointer = Checkpointer(folder, config)
    progress = resume_from(checkpointer, distiller)
    rows = train(distiller, small_runs.next_cond, config, [schedule], progress=progress,
                 checkpointer=checkpointer)  # fmt: skip
    return distiller.state_dict(), rows


def test_a_loop_of_ones_own_goes_on_with_its_schedule(tmp_path):
    def rate(update):
        return 1e-2 * (1 + math.cos(math.pi * update / 6)) / 2

    whole, rows = own_loop(tmp_path / "whole", 6, rate)
    assert len(rows) == 6 and len(own_loop(tmp_path / "parts", 3, rate)[1]) == 3
    parts, rows = own_loop(tmp_path / "parts", 6, rate)
    assert [row["update"] for row in rows] == [4, 5, 6]
    assert_same(whole, parts)
    constant, _ = own_loop(tmp_path / "constant", 6, lambda update: 1e-2)
    with pytest.raises(AssertionError):
        assert_same(whole, constant)
    assert own_loop(tmp_path / "whole", 6, rate)[1] == []  # it was done


# What may change.


def named_settings(text):
    """Settings in a sentence, as they are written in configs or typed."""
    words = re.findall(r"(?:--)?((?:distill|train|sana|occfm|cifar10)\.[a-z_.-]+)", text)
    return {word.rstrip(".").replace("-", "_") for word in words}


def test_what_may_change_are_settings():
    assert CHANGEABLE <= SETTINGS


def test_the_guide_lists_what_may_change():
    text = (ROOT / "docs/checkpoints.md").read_text()
    listed = text.split("Settings that may change\n", 1)[1].split("\n## ", 1)[0]
    words = set(re.findall(r"`([a-z0-9_.]+)`", listed))
    assert words & SETTINGS == CHANGEABLE


def advice():
    """Sentences to a user whose run goes on: monitors, and the guide's section."""
    row = dict.fromkeys(("saturation", "aux_lag", *monitors.USUAL), 1.0)
    sentences = monitors.complaints(row, dict.fromkeys(row, 0.0)).values()
    assert len(sentences) == len(row)
    with pytest.raises(monitors.TooManySkippedUpdates) as skipping:
        monitors.check_skips({"skipped_in_a_row": 9.0}, 3)
    guide = (ROOT / "docs/troubleshooting.md").read_text()
    section = guide.split("## The student diverges")[1].split("##")[0]
    return [*sentences, str(skipping.value), section]


def test_what_advice_tells_to_change_may_change():
    """But for what it says a new run is needed for."""
    for sentence in advice():
        on_resume = re.sub(r"start(?:s)? (?:again )?with [^;.]*distill\.[a-z_.]+", "", sentence)
        assert named_settings(on_resume) <= CHANGEABLE, sentence


def smaller(value):
    return value / 2 if isinstance(value, float) else value + 1


@pytest.mark.parametrize("key", [k for k in preset("digits").LEARNS_ON if "backprop" not in k])
def test_a_run_learns_on_by_the_changed_setting(key):
    config = preset("digits")
    saved = json.loads(json.dumps(to_dict(config)))
    value = smaller(dict(leaves(saved))[key])
    (remark,) = check_config(saved, with_settings(config, {key: value}))
    assert remark.startswith(key) and "from here on the run learns by it" in remark


@pytest.mark.parametrize("warmup", [0, 50])
def test_a_resumed_run_steps_with_the_new_rate(tmp_path, warmup):
    """Also after the warm-up, when the rate is not set any more, and within it."""
    before = OptimConfig(lr=1e-2, warmup_updates=warmup)
    run(tmp_path, updates=4, student_optim=before)
    state = read(checkpoints_in(tmp_path)[-1])["distiller"]
    after = replace(before, lr=1e-30)  # nothing in float32
    distiller, _ = run(tmp_path, updates=6, resumed=True, student_optim=after)
    for new, old in zip(distiller.parameters_of("student"), state["student"], strict=True):
        assert torch.equal(new, old)


# Places.


def test_relative_paths_are_kept_so_that_they_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("teacher", "prompts.txt", "lora.safetensors"):
        Path(name).touch()
    given = {"teacher": "teacher", "sana.prompts": "prompts.txt"}
    config = with_settings(preset("sana-1.6b"), given | {"sana.teacher_lora": "lora.safetensors"})
    found = dict(leaves(to_dict(with_absolute_paths(config))))
    assert found["teacher"] == str(tmp_path / "teacher")
    assert found["sana.prompts"] == str(tmp_path / "prompts.txt")
    assert found["sana.teacher_lora"] == str(tmp_path / "lora.safetensors")
    hub = with_absolute_paths(preset("sana-600m"))
    assert hub == preset("sana-600m")  # a model id of the hub stays one


@pytest.fixture
def sana(tmp_path, monkeypatch):
    """A finished run by relative paths; the folder is where it was typed."""
    pytest.importorskip("diffusers")
    pytest.importorskip("matplotlib")
    from mfd_fast.models.sana.tiny import make_tiny_checkpoint

    monkeypatch.chdir(tmp_path)
    make_tiny_checkpoint("old")
    Path("p.txt").write_text("a red cube\ntwo cats\na boat\n")
    argv = ["distill", "sana-tiny", "--teacher", "old", "--prompts", "p.txt", "--out", "r"]
    small = ["--train.updates", "1", "--distill.aux-updates", "1", "--train.batch-size", "1"]
    assert cli.main([*argv, *small, "--num-eval-samples", "2"]) == 0
    return tmp_path


def test_a_run_is_used_from_another_folder_and_with_moved_files(sana, monkeypatch, capsys):
    (sana / "elsewhere").mkdir()
    monkeypatch.chdir(sana / "elsewhere")
    assert cli.main(["sample", "../r", "--prompt", "x", "--out", "x.png"]) == 0
    (sana / "old").rename(sana / "new")
    (sana / "p.txt").rename(sana / "q.txt")
    assert cli.main(["sample", "../r", "--prompt", "x", "--out", "y.png"]) == 2
    moved = ["--teacher", "../new", "--sana.prompts", "../q.txt"]
    assert cli.main(["sample", "../r", "--prompt", "x", "--out", "y.png", *moved]) == 0
    assert Path("x.png").read_bytes() == Path("y.png").read_bytes()
    assert cli.main(["evaluate", "../r", "--num-samples", "1", *moved]) == 0
    assert cli.main(["export", "../r", "--out", "m", *moved]) == 0
    resumed = ["distill", "sana-tiny", "--resume", "../r", "--train.updates", "2", *moved]
    assert cli.main(resumed) == 0
    assert cli.main(["sample", "../r", "--prompt", "x", "--out", "z.png"]) == 0  # remembered
    assert load_config(Path("../r/config.yaml")).teacher == str(sana / "new")


def test_other_contents_are_refused_wherever_they_lie(sana, capsys):
    from mfd_fast.models.sana.tiny import make_tiny_checkpoint

    other = make_tiny_checkpoint("other", seed=5)
    resumed = ["distill", "sana-tiny", "--resume", "r", "--train.updates", "2"]
    assert cli.main([*resumed, "--teacher", str(other)]) == 2
    assert "give the teacher that the run was started with" in capsys.readouterr().err
    for command in (["sample", "r", "--out", "x.png"], ["export", "r", "--out", "m"]):
        assert cli.main([*command, "--teacher", str(other)]) == 2
        assert "the teacher is another one than that of the run" in capsys.readouterr().err
    Path("q.txt").write_text("other words\n")
    assert cli.main([*resumed, "--prompts", "q.txt"]) == 2
    assert "learned from other data" in capsys.readouterr().err
    assert not Path("x.png").exists() and not Path("m").exists()


@pytest.mark.parametrize("wanted", ["latest", "student-000001-aux-000001", "{}"])
def test_the_official_flag_resumes(wanted, tmp_path, monkeypatch):
    made = tmp_path / "checkpoints" / "student-000001-aux-000001"
    made.mkdir(parents=True)
    calls = []
    monkeypatch.setattr(runner, "run_distillation", lambda *a, **k: calls.append((a, k)))
    argv = ["compat", "sana", f"--output_dir={tmp_path}"]
    assert cli.main([*argv, f"--resume_from_checkpoint={wanted.format(made)}"]) == 0
    assert calls[0][1]["resume"] == ("" if wanted == "latest" else str(made))


@pytest.mark.parametrize("wanted", ["/nowhere/checkpoint-500", "checkpoint-500", "elsewhere"])
def test_a_foreign_checkpoint_is_refused_by_the_official_flag(
    wanted, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("elsewhere").mkdir()
    argv = ["compat", "sana", "--output_dir=out", f"--resume_from_checkpoint={wanted}"]
    assert cli.main(argv) == 2
    assert "--resume_from_checkpoint takes latest, or a checkpoint in" in capsys.readouterr().err
    assert not Path("out").exists()


# Stops.


def test_any_failure_of_the_data_saves_first(tmp_path, monkeypatch):
    whole, _ = run(tmp_path / "whole", updates=4)
    for error in (ValueError("a prompt has 310 tokens"), RuntimeError("out of memory")):

        def failing(n, cond=small_runs.next_cond, error=error):
            if n == 7:
                raise error
            return cond(n)

        folder = tmp_path / type(error).__name__
        with monkeypatch.context() as patch:
            patch.setattr(small_runs, "next_cond", failing)
            with pytest.raises(type(error), match=str(error)):
                run(folder, updates=4)
        resumed, _ = run(folder, updates=4, resumed=True)
        assert_same(resumed.state_dict(), whole.state_dict())


HANGUP = """
import os, sys
from pathlib import Path
os.setsid()
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
import small_runs
from mfd_fast.run.stop import StopSignal
def said(n, cond=small_runs.next_cond):
    print("update", n, flush=True)
    return cond(n)
small_runs.next_cond = said
with StopSignal() as stop:
    small_runs.run(Path(sys.argv[1]), updates=10**6, stop=stop)
os._exit(128 + stop.signum)
"""


def test_a_closed_terminal_leaves_a_checkpoint(tmp_path):
    """The last prints go nowhere; they must not end the run before its checkpoint."""
    tests = Path(__file__).parents[1] / "support"
    env = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", HANGUP, str(tmp_path)]
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    seen = b""
    while b"update 9" not in seen:
        seen += os.read(ours, 1000)
    os.close(ours)
    assert child.wait(timeout=60) == 128 + signal.SIGHUP
    assert len(checkpoints_in(tmp_path)) == 1


def test_nohup_is_left_alone():
    code = (
        "import os, signal; from mfd_fast.run.stop import StopSignal\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with StopSignal() as stop: os.kill(os.getpid(), signal.SIGHUP); assert not stop.signum"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Optimizers.


class Moments(torch.Tensor):
    """A state that no checkpoint can hold."""


class Strange(torch.optim.SGD):
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["moments"] = torch.zeros(3).as_subclass(Moments)


def test_a_state_that_cannot_be_saved_is_refused_before_anything_is_learned(
    tmp_path, monkeypatch, capsys
):
    pytest.importorskip("sklearn")
    monkeypatch.setitem(OPTIMIZERS, "fused_adam", lambda parameters, config: Strange(parameters))
    argv = ["distill", "digits", "--out", str(tmp_path / "r"), "--train.updates", "1"]
    kind = ["--distill.aux-optim.kind", "fused_adam"]
    for extra in (["--dry-run"], []):
        assert cli.main([*argv, *kind, *extra]) == 2
        error = capsys.readouterr().err
        assert "distill.aux_optim.kind fused_adam: a checkpoint holds plain tensors" in error
    assert not (tmp_path / "r").exists()


def test_the_trial_leaves_weights_and_optimizers_alone():
    distiller = small_runs.make_distiller()
    before = distiller.state_dict()
    largest = {role: distiller.parameters_of(role)[0] for role in distiller.roles}
    check_optimizers(distiller.config, largest)
    assert_same(distiller.state_dict(), before)


class Wrapped(torch.Tensor):
    """A tensor made of others, by the protocol that torchao's moments of 8 bits follow."""

    @staticmethod
    def __new__(cls, codes, scale, dtype):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype)

    def __init__(self, codes, scale, dtype):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], [self.dtype]

    @classmethod
    def __tensor_unflatten__(cls, parts, context, size, stride):
        return cls(parts["codes"], parts["scale"], *context)

    __torch_dispatch__ = None


def test_a_tensor_made_of_others_comes_back(monkeypatch):
    codes, scale = torch.arange(6, dtype=torch.uint8), torch.rand(2)
    wrapped = Wrapped(codes, scale, torch.bfloat16)
    with pytest.raises(ValueError, match="moments is a Wrapped"):  # not every package's
        pack({"moments": wrapped})
    monkeypatch.setattr(checkpoint, "WRAPPERS", (__name__,))
    packed = pack({"moments": wrapped})
    tree = json.loads(json.dumps(packed.tree))
    (back,) = unpack(tree, [packed.whole]).values()
    assert type(back) is Wrapped and back.dtype == torch.bfloat16
    assert torch.equal(back.codes, codes) and torch.equal(back.scale, scale)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="holds no objects of"):
        unpack(tree, [packed.whole])


def test_moments_of_torchao_are_continued(tmp_path):
    pytest.importorskip("torchao")
    kind = OptimConfig(lr=1e-3, kind="adamw8bit_torchao")

    def make():
        torch.manual_seed(0)
        networks = [Wide() for _ in range(3)]
        return small_runs.CopiedBackbone(*networks, sample_shape=(64,), null_cond=torch.zeros_like)

    options = {"student_optim": kind, "aux_optim": kind}
    whole, _ = run(tmp_path / "whole", updates=2, backbone=make(), **options)
    run(tmp_path / "cut", updates=1, backbone=make(), **options)
    resumed, _ = run(tmp_path / "cut", updates=2, resumed=True, backbone=make(), **options)
    for ours, theirs in zip(
        resumed.parameters_of("student"), whole.parameters_of("student"), strict=True
    ):
        assert torch.equal(ours, theirs)


class Wide(torch.nn.Module):
    """Large enough that its moments are kept in 8 bits."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 64)

    def forward(self, x, t, cond):
        return self.linear(x) + t[:, None] * cond


def test_a_run_killed_before_any_checkpoint_says_that_it_starts_again(tmp_path):
    """The sentence of a stopped run names a command that works, with or without a checkpoint."""
    session = object.__new__(runner._Session)
    session.config, session.run = preset("digits"), RunFolder(tmp_path)
    session.checkpointer = small_runs.make_checkpointer(tmp_path, preset("digits").train)
    assert session._next_command().startswith("no checkpoint was written; start with: mfd-fast")
