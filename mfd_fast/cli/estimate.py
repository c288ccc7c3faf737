"""``mfd-fast estimate``: what a run costs before it starts."""

import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from mfd_fast.cli.numbers import count, rate
from mfd_fast.cli.options import options, positional, preset_config
from mfd_fast.run.config import RunConfig

if TYPE_CHECKING:
    from mfd_fast.cost import Estimate
    from mfd_fast.cost.devices import Device, Efficiency

HELP = """mfd-fast estimate PRESET [options] [settings as for distill]

  --gpu NAME         of a data sheet (h100 if left out; capitals, spaces and dashes do not matter),
                     or this-machine: its rates are measured, and a few cycles run beside
  --gpus N           how many of them
  --batch B          samples an update on each
  --peak-tflops T --bandwidth GB/S --memory GB
                     another GPU: 16-bit dense products, its memory's rate and size; one of them
                     after --gpu NAME replaces the data sheet's

mfd-fast estimate PRESET --help lists the settings too."""
DEFAULT_GPU, OWN_GPU = "h100", "your GPU"
# What a board's name says beside its model.
BRANDS = {"nvidia", "geforce", "tesla", "gpu"}
SOCKETS = {"sxm", "sxm4", "sxm5", "hbm2e", "hbm3", "hbm3e"}
SERIES = {"blackwell", "workstation", "edition", "generation"}
DECORATION = BRANDS | SOCKETS | SERIES


def estimate(argv: list[str]) -> None:
    """Print time, memory, energy and communication of a preset on a device."""
    if {"-h", "--help"} & set(argv):
        print(HELP)
        if argv[0].startswith("-"):
            return
    name, rest = positional(_with_one_name(argv), "estimate", "PRESET")
    words = dict.fromkeys(("gpu", "gpus", "batch", "peak_tflops", "bandwidth", "memory"))
    own, rest = options(rest, **words)
    gpus = count("--gpus", own.gpus, "the number of GPUs", 8) or 1
    batch = count("--batch", own.batch, "train.batch_size", 4)
    numbers = _numbers(own)
    config = preset_config(name, rest, "estimate")
    if batch:
        config = replace(config, train=replace(config.train, batch_size=batch))
    from mfd_fast.cost import devices
    from mfd_fast.cost.estimate import estimate as predict
    from mfd_fast.cost.table import text

    device, efficiency = _device(own.gpu, numbers, config)
    run = predict(config, device, efficiency, gpus=gpus)
    print(text(run))
    if gpu_named(own.gpu or "", devices.DEVICES) == devices.THIS_MACHINE:
        print(f"\n{_measured(config, run)}")


def gpu_named(typed: str, known: Mapping[str, tuple[float, ...]]) -> str:
    """The known device that is meant by ``RTX 4090``, ``H100-SXM5-80GB`` or ``this machine``.

    known: name -> its numbers, memory in bytes as the fourth.  ``typed`` itself if none is.
    """
    from mfd_fast.cost.devices import GB, THIS_MACHINE

    words = re.findall(r"[a-z0-9]+", typed.lower())
    meant = "".join(word for word in words if word not in DECORATION)
    spellings = {THIS_MACHINE: {"thismachine"}}
    for name, numbers in known.items():
        model = name.replace("-", "")
        model = {model, model.removeprefix("rtx"), f"rtx{model}"}
        spellings[name] = model | {f"{word}{numbers[3] / GB:.0f}gb" for word in model}
    found = [name for name, words in spellings.items() if meant in words]
    return found[0] if len(found) == 1 else typed


def _with_one_name(argv: list[str]) -> list[str]:
    """``--gpu RTX 4090`` without quotes is one name."""
    if "--gpu" not in argv:
        return argv
    start = argv.index("--gpu") + 1
    words = [i for i in range(start, len(argv)) if argv[i].startswith("-")]
    end = words[0] if words else len(argv)
    return [*argv[:start], *filter(None, [" ".join(argv[start:end])]), *argv[end:]]


def _numbers(own: Namespace) -> dict[str, float]:
    """What was typed of a device, in the units of ``Device``; 0: not typed."""
    from mfd_fast.cost.devices import GB

    return {
        "bf16_tflops": rate("--peak-tflops", own.peak_tflops, "TFLOP/s", 165),
        "bandwidth": rate("--bandwidth", own.bandwidth, "GB/s", 1000) * GB,
        "memory": rate("--memory", own.memory, "GB", 24) * GB,
    }


def _device(
    gpu: str | None, numbers: dict[str, float], config: RunConfig
) -> tuple["Device", "Efficiency"]:
    """The device that was named or described, and what share of its rates a run reaches."""
    from mfd_fast.cost import devices
    from mfd_fast.cost.measured import calibrated, efficiency_here
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
            measured = calibrated(device, config.preset, is_captured=is_captured)
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
    from mfd_fast.cli.built import built
    from mfd_fast.cost.measured import measured_phases
    from mfd_fast.cost.table import side_by_side

    try:
        distiller, next_cond = built(config)
    except (ValueError, OSError, ImportError) as error:
        return f"Not measured here: {error}"
    return side_by_side(run, measured_phases(distiller, next_cond))
