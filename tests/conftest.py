"""Where the tests run: on the CPU with Triton's interpreter, or on a GPU if there is one."""

import importlib.util
import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = (
        "1"  # before the first import of triton: kernels run on CPU tensors
    )
    if importlib.util.find_spec("triton") is not None:
        from quick_interpreter import patch_once

        patch_once()

NEEDS_GPU = pytest.mark.skip(reason="needs an NVIDIA GPU: torch.cuda.is_available() is false")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    for item in items:
        if HAS_GPU and "triton_device" in item.fixturenames:
            item.add_marker("gpu")  # real Triton kernels, not the interpreter
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(NEEDS_GPU)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """Every device on which the public operators run."""
    return request.param


@pytest.fixture
def triton_device() -> str:
    """Where a Triton launcher runs: the GPU, or CPU tensors in the interpreter."""
    return "cuda" if HAS_GPU else "cpu"
