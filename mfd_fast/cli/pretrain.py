"""``mfd-fast pretrain``: the networks that a distillation starts from, trained from scratch."""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

from mfd_fast.cli.parse import Config, Fixed, Optional, command
from mfd_fast.settings import Settings

# network -> what it is, its module, settings, function and the file it leaves
NETWORKS: dict[str, tuple[str, str, str, str, str]] = {
    "digits": ("Teacher of the 8x8 digits and their classifier.",
               "digits.teacher", "PretrainConfig", "pretrain", "teacher.safetensors"),
    "occfm-vae": ("VAE of OccFM's occupancy grids.",
                  "occfm.pretrain", "VaePretrain", "pretrain_vae", "vae.safetensors"),
    "occfm": ("Teacher of occupancy forecasts, on the latents of a VAE.",
              "occfm.pretrain", "TeacherPretrain", "pretrain_teacher", "teacher.safetensors"),
    "cifar10": ("Unconditional teacher of CIFAR-10.",
                "cifar10.teacher", "Cifar10Pretrain", "pretrain", "teacher.safetensors"),
}  # fmt: skip


def _module(name: str) -> Any:
    return import_module(f"mfd_fast.models.{NETWORKS[name][1]}")


@command(
    noun="NETWORK",
    names={name: about[0] for name, about in NETWORKS.items()},
    base=lambda name, **_: getattr(_module(name), NETWORKS[name][2])(),
)
def pretrain(
    config: Annotated[Settings, Config],
    *,
    name: Fixed,
    out: Optional[Path | None] = None,
) -> None:
    """Train a teacher, or the VAE before it, from scratch.

    Example: mfd-fast pretrain digits --out runs/digits_teacher

    Args:
        out: Folder to make; runs/NETWORK-pretrained if left out.
    """
    _, _, _, function, file = NETWORKS[name]
    out = out or Path(f"runs/{name}-pretrained")
    metrics = getattr(_module(name), function)(config, out)
    if name == "digits":
        from mfd_fast.models.digits.evaluate import format_table

        print(format_table(metrics["evaluation"]))
    print(out / file)
