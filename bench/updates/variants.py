"""The loops that ``bench.updates.step`` measures: every model at every variant, ready to update.

All have random weights (digits: the packaged ones), one condition and the same interval (t, r).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Generator, Tensor, nn

from bench.updates import networks
from bench.updates.networks import ReferenceOccfm, occfm_config, occfm_inputs
from mfd_fast.backbones.activation import apply_activation_policy
from mfd_fast.backbones.lanes import Backbone, CopiedBackbone, Lane, Prepared
from mfd_fast.cost.cycle import INTEGRATE, adapter_share
from mfd_fast.distill.captured import CapturedDistiller
from mfd_fast.distill.config import DistillConfig
from mfd_fast.distill.distiller import Distiller
from mfd_fast.distill.objectives import MeanFlowDistillation
from mfd_fast.flow.solvers import SolverTable, plan

INTERVAL = (0.6, 0.4)  # ten steps of .02; the SANA preset's own draws ask for 8.6 on average
STEP = 0.02
SANA_SIZES = {"sana-tiny": "tiny", "sana-mini": "mini", "sana-1.6b": "1.6b"}
# What every variant changes against the loop; the first eight each keep what is above them.
VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "literal": {},
    "literal compiled": {},
    "literal regional": {},
    "sequential": {},
    "lane-packed": {},
    "prepared": {},
    "fused": {},
    "captured": {},
    "cheap": {"activation": "cheap"},
    "block": {"activation": "block"},
    "batch 2": {"batch": 2},
    "batch 4": {"batch": 4},
    "batch 8": {"batch": 8},
    "ab2": {"solver": "ab2", "step": 2 * STEP},
    "fp8": {"float8": True},
}
LITERAL = ("published", "literal", "literal compiled", "literal regional")
GENERIC = ("sequential", "lane-packed")  # on the network as its authors wrote it
DIFFUSERS = (*LITERAL, *GENERIC)  # of a SANA: the variants that need diffusers and peft
GPU_ONLY = ("captured", "batch 8", "fp8")
DIGITS_BATCH = 64  # samples of the digits' "batch 1"
STUDENT_STEPS = {"digits": 1, "sana": 4, "occfm": 1}
PRESETS = {"digits": "digits", "sana": "sana-1.6b", "occfm": "occfm"}


@dataclass
class Loop:
    """Two updates, and who tells about their phases.

    updates: role -> one update; listened: has ``phase``, which is entered around every phase.
    shares: phase -> rows with an adapter among the rows of its calls (``cost.Trace``).
    finish: what is done to the loop once its operators are counted; torch.compile.
    """

    updates: dict[str, Callable[[], Any]]
    listened: Any
    shares: dict[str, float]
    finish: Callable[[], Any] = lambda: None


class FixedInterval(MeanFlowDistillation):
    """Mean Flow Distillation over one interval, so that all variants do the same work."""

    def __init__(self, config: DistillConfig, interval: tuple[float, float]):
        super().__init__(config)
        self.interval = interval

    def draw(self, batch: int, generator: Generator) -> SolverTable:
        t, r = (torch.full((batch,), end) for end in self.interval)
        config, grid = self.config, self.config.grid or None
        return plan(t, r, step_size=config.step_size, solver=config.solver, grid=grid)


class Sequential:
    """A backbone that evaluates one lane a call, whatever it is asked for."""

    def __init__(self, backbone: Backbone):
        self.backbone = backbone

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backbone, name)

    def forward(self, x: Tensor, t: Tensor, prepared: Prepared, lanes: tuple[Lane, ...]) -> Tensor:
        times = t if t.ndim == 2 else t[:, None].expand(len(t), len(lanes))
        parts = [
            self.backbone.forward(x[:, i : i + 1], times[:, i : i + 1], prepared, (lane,))
            for i, lane in enumerate(lanes)
        ]
        return torch.cat(parts, dim=1)


def family_of(model: str) -> str:
    """``digits``, ``sana`` or ``occfm``."""
    return model.split("-")[0]


def settings(model: str, variant: str = "fused") -> DistillConfig:
    """Guided, with the student's own number of steps."""
    options = VARIANTS[variant]
    return DistillConfig(
        step_size=options.get("step", STEP),
        solver=options.get("solver", "euler"),
        student_steps=STUDENT_STEPS[family_of(model)],
        min_interval=0.0,
    )


def cycle_of(model: str) -> tuple[int, int]:
    """Auxiliary and student updates of a cycle of the family's preset."""
    from mfd_fast.models import preset

    config = preset(PRESETS[family_of(model)]).distill
    return config.aux_updates, config.student_updates


def samples_of(model: str, variant: str) -> int:
    """Samples an update."""
    return VARIANTS[variant].get("batch", 1) * (DIGITS_BATCH if model == "digits" else 1)


def working_dtype(device: str) -> torch.dtype:
    """Of the networks: float32 on a CPU, bfloat16 on a GPU."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def variants_of(model: str, device: str) -> list[str]:
    """The variants that a model, a device and this install have, in the order of the waterfall."""
    family = family_of(model)
    left_out = set(LITERAL if family != "sana" else ())
    if family == "digits":  # its network has nothing to prepare and no operators of its own
        left_out |= {"prepared", "fused"}
    if family != "sana":
        left_out |= {"fp8"}
    if torch.device(device).type == "cpu":
        left_out |= set(GPU_ONLY)
    missing = [name for name in ("diffusers", "peft", "transformers") if find_spec(name) is None]
    if missing and family == "sana":
        print(f"skipped: {', '.join(DIFFUSERS)} ({' and '.join(missing)} not installed)")
        left_out |= set(DIFFUSERS)
    return [name for name in VARIANTS if name not in left_out]


def make_loop(model: str, variant: str, device: str) -> Loop:
    """A variant of a model on a device; ``KeyError`` for one that does not exist."""
    if variant in LITERAL:
        return _literal(model, variant, device)
    options = VARIANTS[variant]
    config = settings(model, variant)
    make = {"digits": _digits, "sana": _sana, "occfm": _occfm}[family_of(model)]
    backbone, cond = make(model, variant, device, samples_of(model, variant))
    if options.get("float8"):
        from mfd_fast.backbones.float8 import use_float8

        use_float8(backbone)
    kind = CapturedDistiller if variant in _captured_variants(device) else Distiller
    distiller = kind(Sequential(backbone) if variant == "sequential" else backbone, config)
    distiller.objective = FixedInterval(config, INTERVAL)
    share = adapter_share(backbone, distiller.objective.lanes)
    updates = {
        "aux": lambda: distiller.aux_step(cond),
        "student": lambda: distiller.student_step(cond),
    }
    return Loop(updates, distiller, {INTEGRATE: share})


def _captured_variants(device: str) -> set[str]:
    """On a GPU everything from ``captured`` on is captured."""
    names = list(VARIANTS)
    on_gpu = torch.device(device).type == "cuda"
    return set(names[names.index("captured") :] if on_gpu else ())


def _literal(model: str, variant: str, device: str) -> Loop:
    from bench.updates.literal import GRID, PublishedLoop, make_loop
    from bench.updates.sana_sizes import SIZES, Published

    size, dtype = SIZES[SANA_SIZES[model]], working_dtype(device)
    loop, prompt, null = make_loop(size, device=device, dtype=dtype)
    noise = torch.randn(1, *size.sample_shape, device=device).to(dtype)
    interval = tuple(round(end * GRID) for end in INTERVAL)
    updates = {
        "aux": partial(loop.aux_update, noise, prompt, GRID // 2),
        "student": partial(loop.student_update, noise, prompt, null, interval),
    }
    if variant == "published":
        published = PublishedLoop(loop, Published(size, device=device, dtype=dtype))
        updates = {
            "aux": partial(published.aux_update, noise, GRID // 2),
            "student": partial(published.student_update, noise, interval),
        }
    finish = {
        "literal compiled": loop.transformer.compile,
        "literal regional": partial(compile_blocks, loop.transformer),
    }
    return Loop(updates, loop, {}, finish.get(variant, lambda: None))


def compile_blocks(transformer: nn.Module) -> int:
    """Regional compilation: every block by itself, one graph for all; returns how many."""
    from diffusers.models.transformers.sana_transformer import SanaTransformerBlock

    blocks = [one for one in transformer.modules() if isinstance(one, SanaTransformerBlock)]
    for block in blocks:
        block.compile()
    return len(blocks)


def _digits(model: str, variant: str, device: str, batch: int) -> tuple[Backbone, Tensor]:
    from mfd_fast.models import preset
    from mfd_fast.models.digits.task import DigitsTask

    config = preset("digits")
    policy = VARIANTS[variant].get("activation", "none")
    train = replace(config.train, device=device, batch_size=batch, activation=policy)
    task = DigitsTask(replace(config, train=train))
    return task.backbone(), task.conditions()(0)


def _sana(model: str, variant: str, device: str, batch: int) -> tuple[Backbone, dict[str, Tensor]]:
    if variant in GENERIC:
        return _diffusers(model, device, batch)
    policy, dtype = VARIANTS[variant].get("activation", "none"), working_dtype(device)
    ours = networks.make_sana(SANA_SIZES[model], device, dtype, activation=policy)
    return ours.backbone, ours.cond(batch)


def _diffusers(model: str, device: str, batch: int) -> tuple[Backbone, dict[str, Tensor]]:
    """Text padded to its full length."""
    from bench.updates.sana_sizes import SIZES, make_prompts, make_transformer
    from mfd_fast.backbones.adapters import AdapterBank
    from mfd_fast.backbones.shared import SharedBackbone

    size, dtype = SIZES[SANA_SIZES[model]], working_dtype(device)
    (text, mask), _ = make_prompts(size, device=device, dtype=dtype)
    network = Diffusers(make_transformer(size, device=device, dtype=dtype))
    backbone = SharedBackbone(
        network,
        adapters=AdapterBank(network),
        sample_shape=size.sample_shape,
        null_cond=lambda cond: cond,
    )
    return backbone, {"text": text.repeat(batch, 1, 1), "mask": mask.repeat(batch, 1)}


class Diffusers(nn.Module):
    """diffusers' transformer as ``network(x, t, cond)``."""

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.transformer(
            x,
            encoder_hidden_states=cond["text"],
            encoder_attention_mask=cond["mask"],
            timestep=1000 * t,
            return_dict=False,
        )[0]


def _occfm(model: str, variant: str, device: str, batch: int) -> tuple[Backbone, dict[str, Tensor]]:
    from mfd_fast.models.occfm import BLOCKS, OccfmNetwork, null_condition

    config = occfm_config(model)
    with torch.device(device):
        network: nn.Module = OccfmNetwork(config).to(working_dtype(device))
    if variant in GENERIC:
        network = ReferenceOccfm(network)
    backbone = CopiedBackbone(network, sample_shape=config.sample_shape, null_cond=null_condition)
    policy = VARIANTS[variant].get("activation", "none")
    apply_activation_policy(backbone.student, policy, BLOCKS)
    cond = {name: value.to(device) for name, value in occfm_inputs(batch, config)[2].items()}
    return backbone, cond
