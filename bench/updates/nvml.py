"""What only the driver knows of a GPU: memory in use, energy, clocks, power limit.

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
        return self._scaled("nvmlDeviceGetTotalEnergyConsumption")

    def power_limit_watts(self) -> float | None:
        """The limit in force; None where the GPU has none."""
        return self._scaled("nvmlDeviceGetEnforcedPowerLimit")

    def clocks(self) -> dict[str, int] | None:
        """Megahertz now: ``sm`` and ``memory``; None where the GPU does not tell."""
        nvml = self._nvml
        kinds = {"sm": nvml.NVML_CLOCK_SM, "memory": nvml.NVML_CLOCK_MEM}
        try:
            return {
                name: nvml.nvmlDeviceGetClockInfo(self._handle, kind)
                for name, kind in kinds.items()
            }
        except nvml.NVMLError_NotSupported:
            return None

    def _scaled(self, function: str) -> float | None:
        """A number that the driver gives in thousandths."""
        try:
            return getattr(self._nvml, function)(self._handle) / 1e3
        except self._nvml.NVMLError_NotSupported:
            return None
