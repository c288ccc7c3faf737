"""Settings that one objective alone reads; ``distill.NAME.KEY`` in a config."""

from dataclasses import dataclass
from typing import Literal


def _check(ok: bool, key: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"distill.{key} must be {expected}, got {got}")


@dataclass(frozen=True, kw_only=True)
class Dmd2Settings:
    """The adversarial part of dmd2, which senseflow shares."""

    gan_weight: float = 1e-3
    """Weight of the generator's adversarial loss beside the normalised gradient."""
    critic_weight: float = 1e-2
    """Weight of the discriminator's loss beside the auxiliary's flow matching."""

    def __post_init__(self):
        _check(self.gan_weight >= 0, "dmd2.gan_weight", ">= 0 (0: off)", self.gan_weight)
        _check(self.critic_weight >= 0, "dmd2.critic_weight", ">= 0 (0: off)", self.critic_weight)


@dataclass(frozen=True, kw_only=True)
class SenseFlowSettings:
    """What senseflow adds to dmd2."""

    ida_decay: float = 0.97
    """lambda of implicit distribution alignment: aux <- lambda aux + (1 - lambda) student."""
    isg_weight: float = 1.0
    """Weight of the intra-segment guidance loss."""

    def __post_init__(self):
        _check(0 <= self.ida_decay <= 1, "senseflow.ida_decay", "in [0, 1]", self.ida_decay)
        _check(self.isg_weight >= 0, "senseflow.isg_weight", ">= 0 (0: off)", self.isg_weight)


@dataclass(frozen=True, kw_only=True)
class CdSettings:
    """Consistency distillation."""

    distance: Literal["huber", "l2"] = "huber"
    """Pseudo-Huber (c = 0.00054 sqrt(dim)) or squared L2."""


@dataclass(frozen=True, kw_only=True)
class AyfSettings:
    """Align Your Flow."""

    tangent_constant: float = 0.1
    """c of the tangent's normalisation g / (|g| + c)."""
    warmup_updates: int = 50
    """Updates over which the (s - t) term of the tangent rises from 0 to 1."""

    def __post_init__(self):
        _check(self.tangent_constant > 0, "ayf.tangent_constant", "> 0", self.tangent_constant)
        _check(self.warmup_updates >= 0, "ayf.warmup_updates", ">= 0", self.warmup_updates)


@dataclass(frozen=True, kw_only=True)
class MeanFlowSettings:
    """MeanFlow."""

    equal_fraction: float = 0.75
    """Share of samples with r = t, where the target is the conditional velocity."""
    power: float = 1.0
    """p of the adaptive weight 1 / (|error|^2 + c)^p."""
    constant: float = 1e-3
    """c of the adaptive weight."""

    def __post_init__(self):
        _check(0 <= self.equal_fraction <= 1, "meanflow.equal_fraction", "in [0, 1]",
               self.equal_fraction)  # fmt: skip
        _check(self.power >= 0, "meanflow.power", ">= 0", self.power)
        _check(self.constant > 0, "meanflow.constant", "> 0", self.constant)


@dataclass(frozen=True, kw_only=True)
class ImmSettings:
    """Inductive moment matching."""

    particles: int = 4
    """M: samples of a batch that share (s, t) and are compared as sets."""
    decrement_power: int = 12
    """r lies below t by 1/2^k of the range of t / (1 - t)."""

    def __post_init__(self):
        _check(self.particles >= 2, "imm.particles", ">= 2", self.particles)
        _check(self.decrement_power >= 1, "imm.decrement_power", ">= 1", self.decrement_power)
