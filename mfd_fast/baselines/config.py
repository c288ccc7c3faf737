"""The settings of all methods: those of MFD, and what one other method alone reads
(``distill.NAME.KEY`` in a config).
"""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from mfd_fast.distill.config import DistillConfig
from mfd_fast.settings import (
    MAX_INT,
    CountOrOff,
    NotNegative,
    Positive,
    PositiveOrOff,
    Range,
    Settings,
    Share,
)

Span = Annotated[float, Range("in [0, 1) (0: off)", 0, 1, has_high=False)]
# For a network that sees t through sinusoids of 1000 t: docs/studies.md, derivative.
DERIVATIVE_SPAN = 0.04


@dataclass(frozen=True, kw_only=True)
class Dmd2Settings(Settings):
    """The adversarial part of dmd2, which senseflow shares."""

    SECTION: ClassVar[str] = "distill.dmd2."

    gan_weight: PositiveOrOff = 1e-3
    """Weight of the generator's adversarial loss beside the normalised gradient."""
    critic_weight: PositiveOrOff = 1e-2
    """Weight of the discriminator's loss beside the auxiliary's flow matching."""


@dataclass(frozen=True, kw_only=True)
class SenseFlowSettings(Settings):
    """What senseflow adds to dmd2."""

    SECTION: ClassVar[str] = "distill.senseflow."

    ida_decay: Share = 0.98
    """lambda of implicit distribution alignment: aux <- lambda aux + (1 - lambda) student."""
    isg_weight: PositiveOrOff = 0.5
    """Weight of the intra-segment guidance loss."""


@dataclass(frozen=True, kw_only=True)
class CdSettings(Settings):
    """Consistency distillation."""

    SECTION: ClassVar[str] = "distill.cd."

    distance: Literal["huber", "l2"] = "huber"
    """Pseudo-Huber (c = 0.00054 sqrt(dim)) or squared L2."""


@dataclass(frozen=True, kw_only=True)
class AyfSettings(Settings):
    """Align Your Flow."""

    SECTION: ClassVar[str] = "distill.ayf."

    tangent_constant: Positive = 0.1
    """c of the tangent's normalisation g / (|g| + c)."""
    warmup_updates: CountOrOff = 50
    """Updates over which the (s - t) term of the tangent rises from 0 to 0.99."""
    derivative_span: Span = 0.0
    """The student is differentiated in time by differences over this; 0: exactly (forward mode)."""


@dataclass(frozen=True, kw_only=True)
class MeanFlowSettings(Settings):
    """MeanFlow."""

    SECTION: ClassVar[str] = "distill.meanflow."

    equal_fraction: Share = 0.75
    """Share of samples with r = t, where the target is the conditional velocity."""
    power: NotNegative = 1.0
    """p of the adaptive weight 1 / (|error|^2 + c)^p."""
    constant: Positive = 1e-3
    """c of the adaptive weight."""
    derivative_span: Span = 0.0
    """The student is differentiated in time by differences over this; 0: exactly (forward mode)."""


@dataclass(frozen=True, kw_only=True)
class ImmSettings(Settings):
    """Inductive moment matching."""

    SECTION: ClassVar[str] = "distill.imm."

    particles: Annotated[int, Range(">= 2", 2, MAX_INT)] = 4
    """M: samples of a batch that share (s, t) and are compared as sets."""
    decrement_power: Annotated[int, Range(">= 1", 1, 60)] = 12
    """r lies below t by 1/2^k of the range of t / (1 - t)."""


ObjectiveName = Literal["mfd", "vsd", "dmd2", "senseflow", "cd", "ayf", "meanflow", "imm", "reflow"]


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig(DistillConfig):
    """Mean Flow Distillation, or one of the methods that it is compared with."""

    objective: ObjectiveName = "mfd"
    """Gradient of the student: mean velocities over [r, t] (mfd), instantaneous ones at t (vsd),
    or one of the methods that MFD is compared with.
    """
    dmd2: Dmd2Settings = field(default_factory=Dmd2Settings)
    """dmd2 and senseflow only: the adversarial part."""
    senseflow: SenseFlowSettings = field(default_factory=SenseFlowSettings)
    """senseflow only."""
    cd: CdSettings = field(default_factory=CdSettings)
    """cd only."""
    ayf: AyfSettings = field(default_factory=AyfSettings)
    """ayf only."""
    meanflow: MeanFlowSettings = field(default_factory=MeanFlowSettings)
    """meanflow only."""
    imm: ImmSettings = field(default_factory=ImmSettings)
    """imm only."""
