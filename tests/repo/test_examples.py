"""Every example runs as written from an installed package; several processes equal one."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from example_worker import load, tensors
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from mfd_fast import Distiller
from mfd_fast.testing.numerics import assert_as_accurate

TESTS = Path(__file__).parents[1] / "support"
ROOT = TESTS.parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {"diffusers_accelerate": ("diffusers", "accelerate"), "lightning_module": ("lightning",)}
UPDATES = 10  # two cycles of the examples
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def example(name):
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package)
    return ROOT / "examples" / f"{name}.py"


def run(arguments, folder, path):
    """Python in a folder of its own, with ``path`` in place of this checkout."""
    ours = {name for name in os.environ if name in ("RANK", "WORLD_SIZE")}
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    environment |= {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=environment,
        check=True,
        timeout=600,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_at_most_thirty_added_lines(path):
    added = [line for line in path.read_text().splitlines() if "# mfd" in line]
    assert 0 < len(added) <= (10 if path.stem == "diffusers_accelerate" else 30)


# As written, outside the checkout ------------------------------------------------------------


def python_blocks():
    """The Python blocks of README and of the guide to networks of one's own, by name."""
    for path in (ROOT / "README.md", ROOT / "docs" / "your-model.md"):
        found = re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
        assert found
        yield from ((f"{path.stem}-{n}", block) for n, block in enumerate(found))


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in EXAMPLES])
def test_an_example_runs_as_written(name, installed, tmp_path):
    shutil.copy(example(name), tmp_path)
    run([f"{name}.py"], tmp_path, installed)


@pytest.mark.slow
@pytest.mark.parametrize("block", [pytest.param(b, id=n) for n, b in python_blocks()])
def test_a_block_runs_as_written(block, installed, tmp_path):
    where = "\nimport mfd_fast\nprint(mfd_fast.__file__)\n"
    (tmp_path / "block.py").write_text(block + where)
    last = run(["block.py"], tmp_path, installed).splitlines()[-1]
    assert Path(last).is_relative_to(installed)
    if "save_model" in block:
        assert all(map(load_file, tmp_path.rglob("student.safetensors")))
        assert [*tmp_path.rglob("student.safetensors")]


# What they train -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain_pytorch", "several_processes", "lightning_module"])
def test_the_student_is_trained(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = load(example(name))
    student = module.main(updates=UPDATES)
    torch.manual_seed(0)
    start = tensors(module.VelocityNet())
    assert all(not torch.equal(value, start[key]) for key, value in tensors(student).items())


def test_the_adapter_is_trained_and_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = load(example("diffusers_accelerate")).main(updates=12)
    assert any(bool(tensor.any()) for key, tensor in state.items() if "lora_B" in key)
    saved = load_file("student/student.safetensors")
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[key], state[key]) for key in state)


def test_under_autocast():
    """The step works inside torch.autocast: bf16 products, float32 states and loss."""
    module = load(example("plain_pytorch"))
    from mfd_fast import CopiedBackbone, DistillConfig

    backbone = CopiedBackbone(module.VelocityNet(), sample_shape=(2,), null_cond=torch.zeros_like)
    distiller = Distiller(backbone, DistillConfig(guidance=2.0, step_size=0.2, aux_updates=1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(4):
            metrics = distiller.step(torch.randn(8, 4))
    assert all(bool(torch.isfinite(value)) for value in metrics.values())
    assert distiller.skipped.item() == 0


# Two processes -------------------------------------------------------------------------------


def on_two(name, folder, **options):
    """What both processes of an example, or of a file like one, ended with."""
    path = name if isinstance(name, Path) else example(name)
    worker = [TESTS / "example_worker.py", path, folder, json.dumps(options)]
    run([*TWO, *worker], folder, ROOT)
    first, second = (load_file(folder / f"{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    return first


def in_float64(module, patch):
    """The same numbers, wider: the exact run that the others are measured against."""
    network, noise = module.VelocityNet, Distiller._noise
    patch.setattr(module, "VelocityNet", lambda: network().double())
    patch.setattr(Distiller, "_noise", lambda *args: noise(*args).double())


def dealt_loader(data, **options):
    """A loader in the order in which Lightning deals rows out to several processes."""
    return DataLoader(data, sampler=DistributedSampler(data, num_replicas=1, rank=0), **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("several_processes", {}),
        ("lightning_module",
         {"batch": 32, "accelerator": "cpu", "devices": 2, "strategy": "ddp"}),
    ],
)  # fmt: skip
def test_two_processes_equal_one(name, options, tmp_path, monkeypatch):
    """``main`` returns the student; both processes have it bit for bit, one to rounding."""
    monkeypatch.chdir(tmp_path)
    module = load(example(name))
    if options:
        monkeypatch.setattr(module, "DataLoader", dealt_loader)
    eager = tensors(module.main(updates=UPDATES))
    with monkeypatch.context() as patch:
        in_float64(module, patch)
        exact = tensors(module.main(updates=UPDATES))
    shared = on_two(name, tmp_path, updates=UPDATES, **options)
    assert all(value.dtype == torch.float64 for value in exact.values())
    for key, value in shared.items():
        assert_as_accurate(value, eager[key], exact[key])


@pytest.mark.slow
def test_two_processes_of_accelerate_have_one_adapter(tmp_path):
    state = on_two("diffusers_accelerate", tmp_path, updates=12)
    assert any(bool(tensor.any()) for key, tensor in state.items() if "lora_B" in key)


@pytest.mark.slow
def test_two_processes_of_the_library_form_are_one_with_the_doubled_batch(tmp_path):
    pytest.importorskip("peft")
    path = TESTS / "library_student.py"
    shared = on_two(path, tmp_path, updates=6)
    whole, half = (load(path).main(updates=6, world=world) for world in (1, 2))
    whole, half, shared = (
        torch.cat([s[key].flatten() for key in sorted(s)]) for s in (whole, half, shared)
    )
    moved = (whole - half).norm()
    assert moved > 0
    assert (shared - whole).norm() < 1e-3 * moved


# Lightning -----------------------------------------------------------------------------------


@pytest.fixture
def lightning_main(tmp_path, monkeypatch):
    """``main`` of the example with 8 batches an epoch, which end inside a cycle of 5."""
    monkeypatch.chdir(tmp_path)
    main = load(example("lightning_module")).main
    return lambda **options: main(limit_train_batches=8, enable_progress_bar=False, **options)


def test_lightning_counts_steps_writes_checkpoints_and_logs(lightning_main, tmp_path):
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            self.seen = trainer.global_step, sum(module.distiller.num_updates.values())

    watch = Watch()
    every = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    logger = CSVLogger(tmp_path / "logs")
    lightning_main(
        updates=11,
        callbacks=[every, watch],
        enable_checkpointing=True,
        logger=logger,
        log_every_n_steps=1,
    )
    assert watch.seen == (11, 11)
    assert {path.stem for path in tmp_path.glob("*.ckpt")} == {f"step={n}" for n in (3, 6, 9)}
    logged = (tmp_path / "logs/lightning_logs/version_0/metrics.csv").read_text()
    assert {"aux_loss", "student_loss"} <= set(logged.splitlines()[0].split(","))


def test_lightning_resumes_bit_for_bit(lightning_main, tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    whole = tensors(lightning_main(updates=-1, max_epochs=2))
    keep = {"callbacks": [ModelCheckpoint(tmp_path, save_last=True)], "enable_checkpointing": True}
    half = tensors(lightning_main(updates=-1, max_epochs=1, **keep))
    last = str(tmp_path / "last.ckpt")
    resumed = tensors(lightning_main(updates=-1, max_epochs=2, ckpt_path=last))
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    assert not any(torch.equal(half[key], whole[key]) for key in whole)


def test_accelerate_saves_and_restores_the_distillation(tmp_path, monkeypatch):
    """``register_for_checkpointing``: the next updates after load_state are those after save."""
    accelerate = pytest.importorskip("accelerate")
    from mfd_fast import CopiedBackbone, DistillConfig

    def distiller():
        torch.manual_seed(0)
        network = load(example("plain_pytorch")).VelocityNet()
        backbone = CopiedBackbone(network, sample_shape=(2,), null_cond=torch.zeros_like)
        return Distiller(
            backbone, DistillConfig(guidance=2.0, step_size=0.2, aux_updates=2, ema_decay=0.9)
        )

    first, second = distiller(), distiller()
    conds = [torch.randn(4, 4) for _ in range(8)]
    for saved, role in ((first, "save_state"), (second, "load_state")):
        accelerator = accelerate.Accelerator()
        accelerator.register_for_checkpointing(saved)
        if saved is first:
            for cond in conds[:4]:
                first.step(cond)
        getattr(accelerator, role)(str(tmp_path / "state"))
    for cond in conds[4:]:
        a, b = first.step(cond), second.step(cond)
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert isinstance(second.student_network(), nn.Module)
