"""The checks of the operator tests fail for a wrong sign, a missing mask and a wrong stride.

Each bug is planted in the text of a Triton kernel, the faulty module is loaded, and the very check
that its test file makes has to raise.  An unchanged copy, loaded in the same way, has to pass.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import test_interpolate
import test_mfd_loss
import test_ode_step
import torch

KERNELS = Path(__file__).resolve().parents[2] / "kernels"

BUGS = {
    "interpolate": {
        "wrong sign": ("x_t = (1 - t) * x0", "x_t = (1 + t) * x0"),
        "wrong stride": ("offset = row * n + column", "offset = row * (n - 1) + column"),
        "wrong sample": ("t = tl.load(t_ptr + row)", "t = tl.load(t_ptr)"),
    },
    "ode_step": {
        "wrong sign": ("uncond + guidance * (v", "uncond - guidance * (v"),
        "missing mask": ("mask = column < n", "mask = column < n + BLOCK_N"),
        "wrong stride": ("(sample * (S + 1) + s", "(sample * S + s"),
        "unguided lane of the second trajectory": ("+ (s > 0).to(tl.int64)", ""),
    },
    "mfd_loss": {
        "wrong sign": ("diff = aux - teacher", "diff = teacher - aux"),
        "missing mask": ("mask=mask, other=0.0", "mask=None"),
        "wrong stride": ("row * stride_teacher", "row * n"),
        "no second half of the sum": ("range(0, blocks, BLOCK_P)", "range(0, 1, BLOCK_P)"),
    },
}


def load(name: str, folder: Path, bug: tuple[str, str] | None) -> ModuleType:
    """kernels/<name>.py with the bug in its text; a file, because Triton reads the source."""
    text = (KERNELS / f"{name}.py").read_text()
    if bug is not None:
        assert bug[0] in text, f"the text to break is gone from kernels/{name}.py: {bug[0]}"
        text = text.replace(*bug)
    path = folder / f"faulty_{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_room(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the middle of a larger buffer, so that a kernel without a mask harms nothing."""
    room = 1 << 14
    buffer = torch.zeros(tensor.numel() + 2 * room, dtype=tensor.dtype, device=tensor.device)
    copy = buffer[room : room + tensor.numel()].view(tensor.shape)
    return copy.copy_(tensor)


def check_interpolate(kernel, device):
    args = test_interpolate.make_inputs((2, 99), torch.float32, device)
    test_interpolate.assert_accurate(lambda *a: kernel.interpolate(*a, True), args)


def check_ode_step(kernel, device):
    def run(*args):
        kernel.ode_step_(*args[:4], test_ode_step.GUIDANCE, args[4])

    args = test_ode_step.make_inputs((2, 3), (99,), torch.float32, device)
    test_ode_step.assert_accurate(run, *map(with_room, args))


def check_mfd_loss(kernel, device):
    x, *ends, span, weight = test_mfd_loss.make_inputs((3, 70001), torch.float32, device)
    states = with_room(torch.stack(ends, dim=1))
    args = [with_room(x), states[:, 0], states[:, 1], span, weight]
    test_mfd_loss.assert_accurate(kernel.mfd_loss, args)


CHECKS = {
    "interpolate": check_interpolate,
    "ode_step": check_ode_step,
    "mfd_loss": check_mfd_loss,
}


@pytest.mark.parametrize("name", BUGS)
def test_unchanged_copy_passes(name, tmp_path, triton_device):
    CHECKS[name](load(name, tmp_path, None), triton_device)


@pytest.mark.parametrize(("name", "bug"), [(name, bug) for name in BUGS for bug in BUGS[name]])
def test_bug_is_caught(name, bug, tmp_path, triton_device):
    faulty = load(name, tmp_path, BUGS[name][bug])
    with pytest.raises(AssertionError, match=r"relative error|non-finite"):
        CHECKS[name](faulty, triton_device)
