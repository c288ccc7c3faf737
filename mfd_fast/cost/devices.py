"""What a device can do: data sheets, and the same measured on the machine at hand.

A data sheet is a ceiling.  What share of it a run reaches is an :class:`Efficiency`, which says
where it comes from.
"""

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch.utils.benchmark import Timer

GB = 1e9
DATA_SHEET = "vendor data sheet, dense, without sparsity"


@dataclass(frozen=True)
class Device:
    """Rates of one device.

    bf16_tflops: matmuls of 16-bit factors with fp32 sums; fp32_tflops: of float32 (no TF32).
    bandwidth: bytes a second of memory; memory: bytes; watts: power limit.
    link: bytes a second to a neighbouring GPU of the same machine, one way; 0: unknown.
    is_gpu: whether a process holds a context on it beside its tensors.
    source: where the numbers come from.
    """

    name: str
    bf16_tflops: float
    fp32_tflops: float
    bandwidth: float
    memory: float
    watts: float
    link: float
    source: str = DATA_SHEET
    is_gpu: bool = True

    @property
    def pcie(self) -> float:
        """Bytes a second from the host's memory: assumed, not measured on a GPU."""
        lanes = 64 * GB if self.name in PCIE_5 else 32 * GB  # 16 lanes of generation 5 or 4
        return ASSUMED_PCIE * lanes if self.is_gpu else self.bandwidth

    def flops(self, dtype: torch.dtype) -> float:
        """Operations a second of matmuls in ``dtype``; 8 bits twice as many as 16."""
        if dtype.itemsize == 1:
            return 2e12 * self.bf16_tflops
        is_16_bit = dtype in (torch.bfloat16, torch.float16)
        return 1e12 * (self.bf16_tflops if is_16_bit else self.fp32_tflops)


class Fit(NamedTuple):
    """Seconds of a phase = seconds at the device's rates / share + operators x host_seconds."""

    share: float
    host_seconds: float


class Host(NamedTuple):
    """Seconds in which the host launches an operator, at least and at most, and how it does."""

    low: float
    high: float
    how: str


# Launches in traces that others published (docs/cost.md, "What a launch costs"): eager, 31 us
# between launches (vllm-omni PR 6516) to 850 ms for 20,000 (unsloth issue 10806).  Regions under
# torch.compile, of the operators before: 243 and 157 ms a step of FLUX and Z-Image (unsloth PR
# 6839), with blocks computed once or twice, which it does not say.  Replayed: 7.7 us with the
# kernel (AiDotNet.Tensors PR 548); the least is assumed.
EAGER = Host(31e-6, 42e-6, "launched from Python")
COMPILED = Host(14e-6, 22e-6, "launched by regions under torch.compile")
REPLAYED = Host(1.5e-6, 7.7e-6, "replayed as CUDA graphs")


@dataclass(frozen=True)
class Efficiency:
    """The share of a device's rates that the operators of a run reach.

    shares: family -> share of the rate of matmuls; bandwidth: share of the memory's.
    host: what launching one operator costs; a phase is never faster than its launches.
    phases: phase, or the role of one -> what was measured of it; takes the place of the others.
    hosts: every way to launch, ``host`` among them.
    """

    shares: dict[str, float]
    bandwidth: float
    host: Host
    source: str
    phases: dict[str, Fit] = field(default_factory=dict)
    hosts: tuple[Host, ...] = (EAGER, COMPILED, REPLAYED)

    def fit_of(self, phase: str) -> Fit | None:
        """What was measured of a phase, else of its role, else None."""
        return self.phases.get(phase, self.phases.get(phase.split("/")[0]))


# Shares for a GPU.  Nothing was measured on one: large matmuls usually reach 60 % of a data sheet,
# small and fused ones half of that, and a copy at least 75 % of the memory's rate.
ASSUMED_SHARES = {"product": 0.6, "convolution": 0.3, "attention": 0.3, "adapter": 0.3}
ASSUMED_BANDWIDTH = 0.75
ASSUMED_PCIE = 0.8
PCIE_5 = frozenset({"b200", "h200", "h100", "h100-pcie", "rtx-pro-6000", "rtx5090"})


def assumed(*, is_captured: bool) -> Efficiency:
    """What is assumed of a GPU; ``is_captured``: launches are replayed, not made from Python."""
    host = REPLAYED if is_captured else EAGER
    return Efficiency(ASSUMED_SHARES, ASSUMED_BANDWIDTH, host, "assumed, not measured on a GPU")


# Dense matmuls with float32 sums: half the data sheet's rate with sparsity, and on GeForce cards
# and the A10G half the rate with 16-bit sums.  Link: NVLink where a machine joins all its GPUs by
# it, else PCIe, for a bridge joins two cards only.  Memory in 10^9 bytes; cards have a little more.
# fmt: off
DEVICES = {
    #                 bf16   fp32  bandwidth      memory   watts  link
    "b200":     (2250.0,  75.0, 7700 * GB, 180 * GB, 1000.0, 900 * GB),
    "h200":      (989.4,  66.9, 4800 * GB, 141 * GB,  700.0, 450 * GB),
    "h100":      (989.4,  66.9, 3350 * GB,  80 * GB,  700.0, 450 * GB),
    "h100-pcie": (756.5,  51.2, 2000 * GB,  80 * GB,  350.0,  64 * GB),
    "a100":      (312.0,  19.5, 2039 * GB,  80 * GB,  400.0, 300 * GB),
    "a100-40gb": (312.0,  19.5, 1555 * GB,  40 * GB,  400.0, 300 * GB),
    "l40s":      (362.1,  91.6,  864 * GB,  48 * GB,  350.0,  32 * GB),
    "l4":        (121.0,  30.3,  300 * GB,  24 * GB,   72.0,  32 * GB),
    "a40":       (149.7,  37.4,  696 * GB,  48 * GB,  300.0,  32 * GB),
    "a10":       (125.0,  31.2,  600 * GB,  24 * GB,  150.0,  32 * GB),
    "a10g":       (70.0,  35.0,  600 * GB,  24 * GB,  300.0,  32 * GB),
    "rtx-pro-6000": (503.8, 126.0, 1792 * GB, 96 * GB, 600.0, 64 * GB),
    "rtx6000-ada": (364.2, 91.1, 960 * GB,  48 * GB,  300.0,  32 * GB),
    "a6000":     (154.8,  38.7,  768 * GB,  48 * GB,  300.0,  32 * GB),
    "rtx5090":   (209.5, 104.8, 1792 * GB,  32 * GB,  575.0,  64 * GB),
    "rtx4090":   (165.2,  82.6, 1008 * GB,  24 * GB,  450.0,  32 * GB),
    "rtx3090":    (71.0,  35.6,  936 * GB,  24 * GB,  350.0,  32 * GB),
}
# fmt: on
THIS_MACHINE = "this-machine"
# What describes a device that is not in the table, and the option that gives it.
NUMBERS = {
    "bf16_tflops": "--peak-tflops (16-bit)",
    "bandwidth": "--bandwidth (GB/s)",
    "memory": "--memory (GB)",
}


def device_named(name: str, **given: float) -> Device:
    """A known device, or one made of ``bf16_tflops``, ``bandwidth`` and ``memory``.

    Numbers that are given (not 0) take the place of the data sheet's.  ``ValueError`` lists the
    known devices and says which numbers describe another one.
    """
    given = {key: value for key, value in given.items() if value}
    if any(value < 0 for value in given.values()):
        raise ValueError(f"the rates of a device must be > 0, got {given}")
    if name in DEVICES:
        device = Device(name, *DEVICES[name])
        return replace(device, **given, source=_source(given)) if given else device
    if NUMBERS.keys() <= given.keys():
        fp32 = given["bf16_tflops"] / 8
        source = "given by you, float32 taken as an eighth of 16-bit"
        return Device(name, fp32_tflops=fp32, watts=0.0, link=0.0, source=source, **given)
    close = difflib.get_close_matches(name.lower(), [*DEVICES, THIS_MACHINE], n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    missing = ", ".join(how for number, how in NUMBERS.items() if number not in given)
    raise ValueError(
        f"unknown GPU {name!r}{hint}; there is {', '.join([*DEVICES, THIS_MACHINE])}; "
        f"for another one add {missing}"
    )


def _source(given: dict[str, float]) -> str:
    return f"given by you: {', '.join(sorted(given))}; the rest {DATA_SHEET}"


# Sizes and seconds of the measurement of a machine.
MATMUL_SIDE = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}
MEASURE_SECONDS = 0.3
LAUNCHES = 1000


def this_machine(kind: str = "") -> Device:
    """The rates of the device at hand by a large matmul and a large copy: about a second.

    kind: "cuda" or "cpu"; the GPU if there is one.
    """
    kind = kind or here()
    fp32, bf16 = (matmul_flops(kind, dtype) / 1e12 for dtype in (torch.float32, torch.bfloat16))
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        name, memory = properties.name, float(properties.total_memory)
    else:
        from mfd_fast.run.environment import cpu_name

        name = f"{cpu_name()}, {torch.get_num_threads()} threads"
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    side, copied = MATMUL_SIDE[kind], COPY_BYTES[kind] >> 20
    source = f"measured here: a matmul of {side}^3 and a copy of {copied} MiB"
    rates = bf16, fp32, copy_bandwidth(kind)
    return Device(name, *rates, memory, 0.0, 0.0, source, is_gpu=kind == "cuda")


def here() -> str:
    """ "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def calibrate(device: Device, kind: str = "") -> Efficiency:
    """The measured rates of ``device`` themselves, and the cost of launching a small operator."""
    kind = kind or here()
    x = torch.zeros(8, device=kind)
    launch = seconds_of(lambda: [x.add_(1.0) for _ in range(LAUNCHES)]) / LAUNCHES
    shares = dict.fromkeys(ASSUMED_SHARES, 1.0)
    source = f"all of what {device.name} reaches in large operators; launches measured here"
    return Efficiency(shares, 1.0, Host(launch, launch, "measured"), source)


def matmul_flops(device: str, dtype: torch.dtype, side: int = 0) -> float:
    """Operations a second of one square matmul."""
    side = side or MATMUL_SIDE[torch.device(device).type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in "ab")
    return 2 * side**3 / seconds_of(lambda: a @ b)


def copy_bandwidth(device: str, num_bytes: int = 0) -> float:
    """Bytes a second of a copy, reads and writes counted."""
    num_bytes = num_bytes or COPY_BYTES[torch.device(device).type]
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * num_bytes / seconds_of(lambda: target.copy_(source))


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds of the fastest call: what the device can do, beside whatever else runs on it."""
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=MEASURE_SECONDS).times)
