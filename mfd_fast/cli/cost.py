"""``mfd-fast estimate | profile | info``: what a run costs, and what it runs on."""

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mfd_fast.cli.parse import Config, Optional, words
from mfd_fast.cli.run import File, Start, check_writable, of_preset
from mfd_fast.run.config import RunConfig
from mfd_fast.settings import Count, Positive

if TYPE_CHECKING:
    from mfd_fast.cost import Estimate
    from mfd_fast.cost.devices import Device, Efficiency
    from mfd_fast.distill.distiller import Distiller
    from mfd_fast.run.task import Task

TRACE = "trace.json"
ABOUT = ("base", "attention", "compile")  # what of a run's start belongs to its profile
DEFAULT_GPU, OWN_GPU = "h100", "your GPU"
# What a board's name says beside its model: its brand, socket and series.
DECORATION = re.compile(
    r"nvidia|geforce|tesla|gpu|sxm[45]?|hbm[23]e?|blackwell|workstation|edition|generation"
)
Batch = Optional[Count | None]
Rate = Optional[Positive | None]
NOT_COMPILED = (
    "none, the PyTorch references run in their place; install a C++ compiler (apt-get install g++) "
    "and repeat pip install --no-build-isolation --force-reinstall --no-deps ."
)


@of_preset
def estimate(
    config: Annotated[RunConfig, Config],
    *,
    start: Annotated[Start, Config] = Start(),  # noqa: B008
    gpu: Annotated[str | None, words("NAME", "*")] = None,
    gpus: Count = 1,
    batch: Batch = None,
    peak_tflops: Rate = None,
    bandwidth: Rate = None,
    memory: Rate = None,
    scaling: bool = False,
    check_base: bool = False,
) -> None:
    """Print predicted time, memory and energy of a preset on a device, before it starts.

    Example: mfd-fast estimate sana-1.6b --gpu rtx4090

    Args:
        gpu: Name of a data sheet, h100 if left out (capitals, spaces and dashes do not matter), or
            this-machine: its throughput is measured, and a few cycles run beside.
        gpus: How many of them.
        batch: Samples an update on each; train.batch_size if left out.
        peak_tflops: Of 16-bit dense matmuls: another GPU, or in place of the data sheet's.
        bandwidth: Of its memory, GB/s.
        memory: Its size, GB.
        scaling: Also the work by kind of operator, and what up to 512 of the GPUs would bring.
        check_base: Measure what --base changes in the teacher on the prompts, and nothing else.
    """
    if check_base:
        print(config.check_base())
        return
    from mfd_fast.cost import devices
    from mfd_fast.cost.devices import GB
    from mfd_fast.cost.estimate import estimate as predict
    from mfd_fast.cost.table import text

    config = _with_batch(config, batch).resolved()
    typed = {
        "bf16_tflops": peak_tflops or 0.0,
        "bandwidth": (bandwidth or 0.0) * GB,
        "memory": (memory or 0.0) * GB,
    }
    device, efficiency = _device(gpu, typed, config)
    run = predict(config, device, efficiency, gpus=gpus)
    print(text(run, scaling=scaling))
    if gpu_named(gpu or "", devices.DEVICES) == devices.THIS_MACHINE:
        print(f"\n{_measured(config, run)}")


def gpu_named(typed: str, known: Mapping[str, tuple[float, ...]]) -> str:
    """The known device that is meant by ``RTX 4090``, ``H100-SXM5-80GB`` or ``this machine``.

    known: name -> its numbers, memory in bytes as the fourth.  ``typed`` itself if none is.
    """
    from mfd_fast.cost.devices import GB, THIS_MACHINE

    parts = re.findall(r"[a-z0-9]+", typed.lower())
    meant = "".join(part for part in parts if not DECORATION.fullmatch(part))
    spellings = {THIS_MACHINE: {"thismachine"}}
    for name, numbers in known.items():
        model = name.replace("-", "")
        model = {model, model.removeprefix("rtx"), f"rtx{model}"}
        spellings[name] = model | {f"{word}{numbers[3] / GB:.0f}gb" for word in model}
    found = [name for name, spelt in spellings.items() if meant in spelt]
    return found[0] if len(found) == 1 else typed


def _with_batch(config: RunConfig, batch: int | None) -> RunConfig:
    return replace(config, train=replace(config.train, batch_size=batch)) if batch else config


def _device(
    gpu: str | None, numbers: dict[str, float], config: RunConfig
) -> tuple["Device", "Efficiency"]:
    """The device that was named or described, and what share of its rates a run reaches."""
    from mfd_fast.cost import devices
    from mfd_fast.cost.measured import best_known, efficiency_here
    from mfd_fast.run.maker import run_is_captured

    if gpu is None:
        gpu = OWN_GPU if all(numbers.values()) else DEFAULT_GPU
    if not gpu:
        known = ", ".join([*devices.DEVICES, devices.THIS_MACHINE])
        raise ValueError(f"--gpu expects a name; there is {known}")
    name = gpu_named(gpu, devices.DEVICES)
    if name != devices.THIS_MACHINE:
        device, is_captured = devices.device_named(name, **numbers), run_is_captured(config, "cuda")
        measured = None
        if not any(numbers.values()):
            measured = best_known(device, config.preset, is_captured=is_captured)
        return measured or (device, devices.assumed(is_captured=is_captured))
    if any(numbers.values()):
        raise ValueError(
            "this machine is measured: drop --peak-tflops, --bandwidth and --memory, or name a GPU "
            "by --gpu"
        )
    device = devices.this_machine()
    is_captured = run_is_captured(config, "cuda" if device.is_gpu else "cpu")
    return efficiency_here(device, config.preset, is_captured=is_captured)


def _measured(config: RunConfig, run: "Estimate") -> str:
    """The same cycle run here, beside the prediction; or why it cannot be."""
    from mfd_fast.cost.measured import measured_phases
    from mfd_fast.cost.table import side_by_side

    try:
        distiller, next_cond = built(config)
    except (ValueError, OSError, ImportError) as error:
        return f"Not measured here: {error}"
    return side_by_side(run, measured_phases(distiller, next_cond))


def built(config: RunConfig) -> "tuple[Distiller, Callable[[int], Any]]":
    """The distiller of a preset and ``next_cond(n)``, the condition of its update number n."""
    return _of_task(config.task())


def _of_task(task: "Task") -> "tuple[Distiller, Callable[[int], Any]]":
    from mfd_fast.distill.ranks import Ranks
    from mfd_fast.run.session import distiller_of

    return distiller_of(task, task.config, Ranks()), task.conditions()


def calibrate() -> None:
    """Measure this machine once, for every later estimate of it: rates of a large matmul and copy,
    and what the host needs to launch an operator; at most two minutes.

    Example: mfd-fast calibrate
    """
    from mfd_fast.cost import own
    from mfd_fast.cost.devices import here

    path = own.measure(partial(_small, here()))
    device, launches = own.read(path)
    print(
        f"{device.name}: {device.bf16_tflops:.4g} TFLOP/s 16-bit, {device.fp32_tflops:.4g} "
        f"float32, {device.bandwidth / 1e9:.4g} GB/s"
    )
    for how, seconds in launches.items():
        print(f"{seconds * 1e6:.3g} us an operator, {how}")
    print(path)


def _small(device: str, capture: str) -> "tuple[Distiller, Any]":
    """A SANA of two narrow blocks with random weights, and a condition."""
    from mfd_fast.models import preset
    from mfd_fast.run.maker import make_distiller

    model = preset("sana-tiny").shapes(device)
    distiller = make_distiller(model.backbone, preset("sana-tiny").distill, capture=capture)
    return distiller, model.cond(1)


@of_preset
def profile(
    config: Annotated[RunConfig, Config],
    *,
    start: Annotated[Start, Config] = Start(),  # noqa: B008
    out: File = None,
    cycles: Count = 3,
    batch: Batch = None,
) -> None:
    """Profile a few cycles on this machine; leaves a Chrome trace.

    Example: mfd-fast profile digits --cycles 1 --batch 16 --out runs/where

    Args:
        out: Folder to make; runs/profile-PRESET if left out.
        cycles: Timed cycles.
        batch: Samples an update; train.batch_size if left out.
    """
    folder = out or Path(f"runs/profile-{config.preset}")
    if (folder / TRACE).exists():
        raise ValueError(f"{folder} holds a profile already; choose another folder with --out")
    check_writable(folder)
    from mfd_fast.cost.profile import profile_cycles, summary

    task = _with_batch(config, batch).task()
    distiller, next_cond = _of_task(task)
    _make_folder(folder)
    result = profile_cycles(distiller, next_cond, folder / TRACE, cycles=cycles)
    print(summary(result))
    found = task.check() | task.used
    for name in [name for name in ABOUT if name in found]:
        print(f"{name}: {found[name]}")
    print(folder / TRACE)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be made ({error.strerror}); choose another folder with --out"
        ) from None


def info() -> None:
    """Print versions, devices, and how the compiled operators were built.

    Example: mfd-fast info
    """
    import torch

    from mfd_fast import __version__
    from mfd_fast.ops.extension import backend, build_info

    built = build_info()
    print(f"mfd-fast {__version__}, torch {torch.__version__}, python {sys.version.split()[0]}")
    print(f"operators: MFD_FAST_BACKEND={backend()}")
    print(f"compiled operators: {built or NOT_COMPILED}")
    if torch.cuda.is_available():
        print(f"device: {torch.cuda.get_device_name()}")
    else:
        print(f"device: CPU, {torch.get_num_threads()} threads; no NVIDIA GPU is visible")
