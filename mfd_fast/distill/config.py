"""The settings of the method and of its optimizers."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from mfd_fast.settings import (
    Count,
    CountOrOff,
    Decay,
    NotNegative,
    Number,
    Positive,
    PositiveOrOff,
    Seed,
    Settings,
    Share,
    require,
)

Distribution = Literal["logit_normal", "uniform"]
SolverName = Literal["euler", "heun", "ab2", "dpmpp_2m"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Settings):
    """AdamW of one role."""

    kind: Literal["adamw", "adamw8bit", "adamw8bit_torchao", "fused_adam"] = "adamw"
    """torch's fused AdamW, or 8-bit moments (bitsandbytes, torchao), or apex."""
    lr: Positive = 1e-4
    """Learning rate after the warm-up."""
    beta1: Decay = 0.9
    """Decay of the first moment."""
    beta2: Decay = 0.999
    """Decay of the second moment."""
    weight_decay: NotNegative = 1e-4
    """Decoupled weight decay."""
    clip_norm: PositiveOrOff = 1.0
    """The gradient is scaled down to this global norm; 0 turns clipping off."""
    warmup_updates: CountOrOff = 0
    """The learning rate rises linearly over this many updates of the role."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Settings):
    """Mean Flow Distillation itself.  Defaults: the paper's settings where it states them."""

    SECTION: ClassVar[str] = "distill."

    objective: Literal["mfd", "vsd"] = "mfd"
    """Gradient of the student: mean velocities over [r, t] (mfd), instantaneous ones at t (vsd)."""
    guidance: Number = 4.5
    """Classifier-free guidance scale of the teacher; the auxiliary is never guided."""
    step_size: Positive = 0.02
    """Largest solver step h when a mean velocity is integrated over [r, t]."""
    solver: SolverName = "euler"
    """Solver of the mean velocities; the paper's is Euler."""
    grid: CountOrOff = 0
    """Round t, r and every step's end to multiples of 1/grid (official SANA script: 1000); 0:
    off.
    """
    time_distribution: Distribution = "logit_normal"
    """Distribution of the two times whose larger one is t and smaller one r."""
    time_mean: Number = 0.0
    """Mean of the normal variable inside the logit-normal of (t, r)."""
    time_std: NotNegative = 1.0
    """Its standard deviation."""
    equal_fraction: Share = 0.0
    """Probability that a sample takes r = t, the instantaneous (VSD) limit."""
    min_interval: Decay = 0.0
    """Redraw a pair until t - r is at least this."""
    max_interval: Positive | None = None
    """Raise r so that t - r is at most this; None: no limit (the paper)."""
    aux_time_distribution: Distribution = "logit_normal"
    """Distribution of t in the auxiliary's flow matching."""
    aux_time_mean: Number = 0.0
    """Mean of the normal variable inside the auxiliary's logit-normal."""
    aux_time_std: NotNegative = 1.0
    """Its standard deviation."""
    score_weighting: bool = False
    """vsd only: multiply the gradient by (1 - t)/t, the score difference of the KL form."""
    aux_updates: Count = 10
    """Auxiliary updates in one cycle, before the student's."""
    student_updates: Count = 1
    """Student updates in one cycle."""
    student_steps: Count = 1
    """K: steps of the student's sampler, in training and at inference."""
    student_solver: SolverName = "euler"
    """Solver of the student's sampler."""
    student_backprop: Literal["all", "last", "random"] = "all"
    """Which of the K sampler steps the gradient enters: all, the last, or a random one."""
    aux_draws_per_sample: Count = 1
    """Pairs (t, eps) that the auxiliary learns from for every sample generated (the paper: 1)."""
    aux_samples: Literal["new", "cycle", "student"] = "new"
    """Whose samples the auxiliary learns from: every update generates its own (new, the paper);
    the first of a cycle does for all of them (cycle: the student stands still, but small batches
    learn less); those that the student's last updates made (student: stale, nothing is generated).
    """
    aux_kept: Count = 1
    """aux_samples student: of how many student updates the samples are kept and taken in turn."""
    micro_batches: Count = 1
    """The batch of an update is evaluated in this many equal parts; gradients are averaged."""
    loss_scale: PositiveOrOff = 0.0
    """Initial loss scale for fp16 networks, adapted on the device; 0: off."""
    ema_decay: Decay = 0.0
    """Decay of the exponential moving average of the student's weights; 0: no average."""
    sample_bound: Positive = 4.0
    """Values of a sample beyond this magnitude count as saturated; reported, never changed."""
    seed: Seed = 0
    """Seeds every random number of the distillation."""
    student_optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer of the student."""
    aux_optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer of the auxiliary."""

    def __post_init__(self):
        super().__post_init__()
        require(self.max_interval is None or self.max_interval > self.min_interval,
                "distill.max_interval", f"above min_interval {self.min_interval} or none",
                self.max_interval)  # fmt: skip

    @property
    def aux_generations(self) -> int:
        """Auxiliary updates of a cycle that generate samples of the student."""
        return {"new": self.aux_updates, "cycle": 1, "student": 0}[self.aux_samples]

    def optim_of(self, role: str) -> OptimConfig:
        """The optimizer's settings of ``"aux"`` or ``"student"``."""
        return self.aux_optim if role == "aux" else self.student_optim
