"""``mfd-fast pretrain``: the networks that a distillation starts from, trained from scratch."""

from collections.abc import Callable
from pathlib import Path

from mfd_fast.cli.options import options, parse_config, positional
from mfd_fast.run.config import nearest


def pretrain(argv: list[str]) -> None:
    """Train a teacher, or the VAE before it, from scratch."""
    name, rest = positional(argv, "pretrain", "|".join(NETWORKS))
    if name not in NETWORKS:
        raise ValueError(
            f"pretrain trains one of {list(NETWORKS)}, got {name!r}{nearest(name, NETWORKS)}"
        )
    own, rest = options(rest, out=f"runs/{name}-pretrained")
    NETWORKS[name](rest, Path(own.out))


def _digits(argv: list[str], out: Path) -> None:
    from mfd_fast.models.digits.evaluate import format_table
    from mfd_fast.models.digits.teacher import PretrainConfig
    from mfd_fast.models.digits.teacher import pretrain as pretrain_digits

    config = parse_config(PretrainConfig(), argv, "mfd-fast pretrain digits")
    print(format_table(pretrain_digits(config, out)["evaluation"]))


def _occfm_vae(argv: list[str], out: Path) -> None:
    from mfd_fast.models.occfm.pretrain import VAE, VaePretrain, pretrain_vae

    pretrain_vae(parse_config(VaePretrain(), argv, "mfd-fast pretrain occfm-vae"), out)
    print(out / VAE)


def _occfm(argv: list[str], out: Path) -> None:
    from mfd_fast.models.occfm.pretrain import TEACHER, TeacherPretrain, pretrain_teacher

    pretrain_teacher(parse_config(TeacherPretrain(), argv, "mfd-fast pretrain occfm"), out)
    print(out / TEACHER)


def _cifar10(argv: list[str], out: Path) -> None:
    from mfd_fast.models.cifar10.teacher import TEACHER, Cifar10Pretrain
    from mfd_fast.models.cifar10.teacher import pretrain as pretrain_cifar10

    pretrain_cifar10(parse_config(Cifar10Pretrain(), argv, "mfd-fast pretrain cifar10"), out)
    print(out / TEACHER)


NETWORKS: dict[str, Callable[[list[str], Path], None]] = {
    "digits": _digits,
    "occfm-vae": _occfm_vae,
    "occfm": _occfm,
    "cifar10": _cifar10,
}
