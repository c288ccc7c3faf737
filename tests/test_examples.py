"""Every example runs, adds at most 30 lines to a stock script, and trains what it should."""

import importlib.util
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_at_most_thirty_added_lines(path):
    added = [line for line in path.read_text().splitlines() if "# mfd" in line]
    assert 0 < len(added) <= 30


def is_changed(student, teacher):
    pairs = zip(student.parameters(), teacher.parameters(), strict=True)
    return any(not torch.equal(a, b) for a, b in pairs)


def test_plain_pytorch(capsys):
    example = load("plain_pytorch")
    student = example.main(updates=10)
    torch.manual_seed(0)
    assert is_changed(student, example.VelocityNet())


def test_diffusers_accelerate():
    pytest.importorskip("diffusers")
    pytest.importorskip("accelerate")
    state = load("diffusers_accelerate").main(updates=8)
    assert any(bool(tensor.any()) for key, tensor in state.items() if "lora_B" in key)
    assert all(key.startswith("transformer.") for key in state)


def test_lightning_module():
    pytest.importorskip("lightning")
    example = load("lightning_module")
    student = example.main(updates=10)
    torch.manual_seed(0)
    assert is_changed(student, example.VelocityNet())


def test_under_autocast():
    """The step works inside torch.autocast: bf16 products, float32 states and loss."""
    example = load("plain_pytorch")
    from mfd_fast import CopiedBackbone, DistillConfig, Distiller

    backbone = CopiedBackbone(example.VelocityNet(), sample_shape=(2,), null_cond=torch.zeros_like)
    distiller = Distiller(backbone, DistillConfig(guidance=2.0, step_size=0.2, aux_updates=1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(4):
            metrics = distiller.step(torch.randn(8, 4))
    assert all(bool(torch.isfinite(value)) for value in metrics.values())
    assert distiller.skipped.item() == 0
