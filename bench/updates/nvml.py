"""What only the driver knows of a GPU: memory in use, and energy.

Through the module ``pynvml`` of nvidia-ml-py, if it is installed (``pip install nvidia-ml-py``).
All numbers are of the whole GPU, whatever process uses it.
"""

from types import ModuleType
from typing import Any

import torch

PREFIXES = ("GPU-", "MIG-")  # of the driver's name for a whole GPU, and for a slice of one


class Nvml:
    """One GPU as its driver sees it; made by :meth:`open`."""

    def __init__(self, nvml: ModuleType, handle: Any):
        self._nvml = nvml
        self._handle = handle

    @classmethod
    def open(cls, device_index: int | None = None) -> "Nvml | None":
        """The GPU that torch calls ``cuda:device_index``; torch's current one if None.

        It is found by its UUID, so CUDA_VISIBLE_DEVICES may hide or reorder GPUs.  None without a
        GPU, without nvidia-ml-py, or where the driver's library does not know the GPU.
        """
        if not torch.cuda.is_available():
            return None
        try:
            import pynvml
        except ImportError:
            return None
        index = torch.cuda.current_device() if device_index is None else device_index
        uuid = torch.cuda.get_device_properties(index).uuid
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return None
        for prefix in PREFIXES:
            try:
                return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"{prefix}{uuid}"))
            except pynvml.NVMLError:
                continue
        return None

    def used_bytes(self) -> int:
        """Device memory in use, contexts included, as nvidia-smi shows it."""
        nvml = self._nvml
        return nvml.nvmlDeviceGetMemoryInfo(self._handle, version=nvml.nvmlMemory_v2).used

    def joules(self) -> float | None:
        """Energy since the driver was loaded; None where the GPU does not count it.

        The driver adds to it every 20-100 ms: take the difference over a second or more.
        """
        try:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3
        except self._nvml.NVMLError_NotSupported:
            return None
