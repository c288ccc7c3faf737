"""``mfd-fast estimate``: what a run costs before it starts."""

from dataclasses import replace
from typing import TYPE_CHECKING

from mfd_fast.cli.options import options, positional, preset_config
from mfd_fast.config import RunConfig

if TYPE_CHECKING:
    from mfd_fast.cost import Estimate


def estimate(argv: list[str]) -> None:
    """Print time, memory, energy and communication of a preset on a device."""
    name, rest = positional(argv, "estimate", "PRESET")
    own, rest = options(
        rest, gpu="h100", gpus=1, batch=0, peak_tflops=0.0, bandwidth=0.0, memory=0.0
    )
    config = preset_config(name, rest, "estimate")
    if own.batch:
        config = replace(config, train=replace(config.train, batch_size=own.batch))
    from mfd_fast.cost import devices
    from mfd_fast.cost.estimate import estimate as predict
    from mfd_fast.cost.measured import efficiency_here
    from mfd_fast.cost.table import text
    from mfd_fast.tasks.meta import meta_model

    if own.gpu == devices.THIS_MACHINE:
        device = devices.this_machine()
        efficiency = efficiency_here(device, config.preset)
    else:
        device = devices.device_named(
            own.gpu,
            bf16_tflops=own.peak_tflops,
            bandwidth=own.bandwidth * devices.GB,
            memory=own.memory * devices.GB,
        )
        efficiency = devices.assumed(is_captured=config.train.capture)
    run = predict(meta_model, config, device, efficiency, gpus=own.gpus)
    print(text(run))
    if own.gpu == devices.THIS_MACHINE:
        print(f"\n{_measured(config, run)}")


def _measured(config: RunConfig, run: "Estimate") -> str:
    """The same cycle run here, beside the prediction; or why it cannot be."""
    from mfd_fast.cli.built import make_distiller
    from mfd_fast.cost.measured import measured_phases
    from mfd_fast.cost.table import side_by_side

    try:
        distiller, next_cond = make_distiller(config)
    except (ValueError, OSError, ImportError) as error:
        return f"Not measured here: {error}"
    return side_by_side(run, measured_phases(distiller, next_cond))
