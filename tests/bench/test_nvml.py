"""bench/updates/nvml.py against a driver library that is made up."""

import sys
from types import SimpleNamespace

import pytest
import torch

from bench.updates.nvml import Nvml

UUIDS = ("11111111-2222-3333-4444-555555555555", "66666666-7777-8888-9999-000000000000")


class NVMLError(Exception):
    pass


class NVMLError_NotSupported(NVMLError):  # noqa: N801, N818
    pass


class Driver(SimpleNamespace):
    """The functions of ``pynvml`` that are called, for two GPUs; ``names`` are the driver's."""

    NVMLError = NVMLError
    NVMLError_NotSupported = NVMLError_NotSupported
    nvmlMemory_v2 = 2  # noqa: N815

    def nvmlInit(self):  # noqa: N802
        if self.is_broken:
            raise NVMLError("driver not loaded")

    def nvmlDeviceGetHandleByUUID(self, name):  # noqa: N802
        if name not in self.names:
            raise NVMLError(f"not found: {name}")
        return self.names.index(name)

    def nvmlDeviceGetMemoryInfo(self, handle, version=None):  # noqa: N802
        reserved = 0 if version == self.nvmlMemory_v2 else 500  # the first version counts it in
        return SimpleNamespace(used=1000 * (handle + 1) + reserved)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802
        if self.is_bare:
            raise NVMLError_NotSupported("not supported")
        return 7_250


@pytest.fixture
def driver(monkeypatch):
    made = Driver(is_broken=False, is_bare=False, names=[f"GPU-{uuid}" for uuid in UUIDS])
    monkeypatch.setitem(sys.modules, "pynvml", made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    # torch sees the driver's GPUs the other way round, as under CUDA_VISIBLE_DEVICES=1,0.
    properties = [SimpleNamespace(uuid=uuid) for uuid in reversed(UUIDS)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties[index])
    return made


def test_the_gpu_is_found_by_its_uuid(driver):
    assert Nvml.open().used_bytes() == 2000
    assert Nvml.open(1).used_bytes() == 1000


def test_a_slice_of_a_gpu_is_found_too(driver):
    driver.names = ["GPU-other", f"MIG-{UUIDS[1]}"]
    assert Nvml.open().used_bytes() == 2000


def test_units(driver):
    assert Nvml.open().joules() == 7.25


def test_what_a_gpu_does_not_tell_is_none(driver):
    driver.is_bare = True
    gpu = Nvml.open()
    assert gpu.joules() is None
    assert gpu.used_bytes() == 2000


@pytest.mark.parametrize("fault", ["no driver", "unknown GPU", "no package", "no GPU"])
def test_none_without_what_it_takes(driver, monkeypatch, fault):
    if fault == "no driver":
        driver.is_broken = True
    elif fault == "unknown GPU":
        driver.names = ["GPU-other"]
    elif fault == "no package":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    else:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Nvml.open() is None


@pytest.mark.gpu
def test_on_this_gpu():
    pytest.importorskip("pynvml")
    gpu = Nvml.open()
    block = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    # Other processes may take and free memory meanwhile: only what is held here is certain.
    assert block.nbytes <= gpu.used_bytes() <= torch.cuda.mem_get_info()[1]
