"""What a cycle of every objective costs on real networks, by phase: predicted, nothing measured.

SANA 1.6B and three families of diffusers at 1024px without weights, as diffusers computes them: a
network for each role, the same factors on the attention of auxiliary and student, and the preset's
settings (10 auxiliary updates a student's, 4 student steps, batch 1; imm needs a set of 4) for all.
Frozen weights count once, as adapters of one network have them.  Rows "here" are mfd and vsd as
this project runs them: the presets, whose roles share one network.  A forward is one evaluation of
one sample.  Seconds are max(host, device) with the assumed shares and the launches that others
published; captured only what can be.  As the estimate does, networks are traced with two and three
blocks of a kind and counted.
"""

import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from bench.running import Options
from bench.updates.sana_sizes import SIZES
from mfd_fast.backbones.lanes import CopiedBackbone
from mfd_fast.baselines.config import (
    DERIVATIVE_SPAN,
    AyfSettings,
    ComparisonConfig,
    MeanFlowSettings,
)
from mfd_fast.baselines.objectives import COMPARED, needs_of
from mfd_fast.cost import CycleCost, device_named, trace_cycle
from mfd_fast.cost.cycle import weighted_cycles
from mfd_fast.cost.devices import assumed
from mfd_fast.cost.phases import phase_of, total
from mfd_fast.cost.plans import cycle_of, memory_of
from mfd_fast.cost.trace import OUTSIDE, Trace
from mfd_fast.models import preset
from mfd_fast.models.diffusers.family import Family, family_of
from mfd_fast.models.diffusers.network import FamilyNetwork
from mfd_fast.models.diffusers.presets import PipelineRun
from mfd_fast.models.diffusers.published import PUBLISHED, Published
from mfd_fast.models.diffusers.shapes import family_terms, options_of, published_pipeline
from mfd_fast.run.task import Shapes

SANA = Published(
    "", "SanaPipeline", SIZES["1.6b"].transformer, 0.0, ("AutoencoderDC", {"latent_channels": 32})
)
NETWORKS = ("sana-1.6b", "sd3.5-medium", "flux1-dev", "qwen-image")
GPUS = ("h100", "rtx4090")
WAYS = ("eager", "captured")
SETS = {"imm": 4}
OURS = ("vsd", "mfd")
SMOOTH = {
    "ayf": AyfSettings(derivative_span=DERIVATIVE_SPAN),
    "meanflow": MeanFlowSettings(derivative_span=DERIVATIVE_SPAN),
}


class Role(FamilyNetwork):
    """The network of a role: with factors if it is trained, ``middle`` for a discriminator, and a
    second time that costs nothing.
    """

    def __init__(self, family: Family, *, rank: int = 0):
        super().__init__(family, prepares=False)
        self.transformer = deepcopy(self.transformer)
        if rank:
            self.transformer.add_adapter(LoraConfig(r=rank, target_modules=list(family.targets)))
            self.transformer.to("meta", torch.bfloat16)  # PEFT leaves its factors on the CPU
        family.set_modes(self.transformer)
        family.without_values(self.transformer)
        config = self.transformer.config
        self.middle_width = config.num_attention_heads * config.attention_head_dim
        self.middle = nn.Identity()
        blocks = [x for name, x in self.named_modules() if re.fullmatch(family.blocks, name)]
        blocks[len(blocks) // 2].register_forward_hook(self._tell)

    def _tell(self, _block: nn.Module, _inputs: Any, out: Any) -> None:
        self.middle(out if isinstance(out, Tensor) else out[-1])

    def forward(self, x: Tensor, t: Tensor, cond: Any, *end: Tensor) -> Tensor:
        return super().forward(x.to(torch.bfloat16), t, cond)


class Model:
    """A published network, as it is and with few blocks."""

    def __init__(self, name: str):
        self.name = name
        run = preset(name if name in PUBLISHED else "pipeline")
        assert isinstance(run, PipelineRun)
        self.family = family_of(
            published_pipeline(PUBLISHED.get(name, SANA)), **options_of(run.pipeline)
        )
        transformer = self.family.pipe.transformer
        transformer.requires_grad_(False).eval().to(torch.bfloat16)
        self.rank = run.pipeline.rank
        self.distill = replace(run.distill, guidance=self.family.guidance)
        self.terms = family_terms(run, self.family)
        self.forward = sum(n * forward_of(family) for n, family in self.terms)

    def config(self, objective: str) -> ComparisonConfig:
        """The settings of an objective."""
        own = {objective: SMOOTH[objective]} if objective in SMOOTH else {}
        return replace(self.distill, objective=objective, **own)

    def cycle(self, objective: str) -> CycleCost:
        """One cycle, with the frozen weights once."""
        config, batch = self.config(objective), SETS.get(objective, 1)
        cycle = weighted_cycles(
            [
                (n, trace_cycle(self.shapes(family, config), config, batch))
                for n, family in self.terms
            ]
        )
        cycle.persistent["weights"] /= 3 if "aux" in cycle.gradients else 2
        return cycle

    def shapes(self, family: Family, config: ComparisonConfig) -> Shapes:
        """Three networks, and what an update gets."""
        if family.has_null:
            family.null_row = family.blank(1)
        backbone = CopiedBackbone(
            *(Role(family, rank=rank) for rank in (0, self.rank, self.rank)),
            sample_shape=family.sample_shape,
            null_cond=family.null if family.has_null else None,
        )
        needs = needs_of(config)
        if "aux" not in needs.roles:
            backbone.aux = nn.Identity()

        def with_samples(batch: int) -> Any:
            return torch.empty(batch, *family.sample_shape, device="meta"), family.blank(batch)

        return Shapes(backbone, with_samples if needs.uses_data else family.blank)

    def here(self, objective: str) -> CycleCost:
        """One cycle of the preset."""
        run = preset(self.name).resolved()
        return cycle_of(replace(run, distill=replace(run.distill, objective=objective)), 1)


def forward_of(family: Family) -> float:
    """Operations of one evaluation of one sample."""
    x = torch.empty(1, *family.sample_shape, device="meta")
    network = Role(family)
    with torch.no_grad(), Trace() as trace:
        network(x, torch.empty(1, device="meta"), family.blank(1))
    return trace.work[OUTSIDE].flops


def row(model: Model, objective: str, where: str, cycle: CycleCost) -> dict[str, Any]:
    """A cycle by phase, and its predicted seconds."""
    made: dict[str, Any] = {
        "network": model.name,
        "objective": objective,
        "where": where,
        "batch": cycle.batch,
        "forwards": round(cycle.total.flops / model.forward, 1),
        "tflop": round(cycle.total.flops / 1e12, 2),
        "launches": round(cycle.total.num_ops),
        "phases": {
            name: {
                "forwards": round(work.flops / model.forward, 1),
                "tflop": round(work.flops / 1e12, 2),
                "launches": round(work.num_ops),
                "gb": round((sum(cycle.persistent.values()) + cycle.memory.peak[name]) / 1e9, 2),
            }
            for name, work in cycle.phases.items()
        },
    }
    for way in WAYS if objective in OURS else WAYS[:1]:
        size = memory_of(cycle, is_captured=way == "captured", has_context=True)
        made[f"gb_{way}"] = round(sum(size.values()) / 1e9, 2)
        for gpu in GPUS:
            used = assumed(is_captured=way == "captured")
            phases = {
                name: phase_of(work, device_named(gpu), used, name)
                for name, work in cycle.phases.items()
            }
            key = f"{gpu}_{way}_s"
            made[key] = [round(end, 4) for end in total(phases.values())]
            for name, phase in phases.items():
                made["phases"][name][key] = [round(end, 4) for end in phase.seconds]
    return made


def rows_of(name: str, options: Options) -> Iterator[list[dict]]:
    """Every objective on a network."""
    wanted = [one for one in (*OURS, *COMPARED) if options.wants(f"{name} {one}")]
    if not wanted:
        return
    model = Model(name)
    for objective in wanted:
        yield [row(model, objective, "diffusers", model.cycle(objective))]
    for objective in OURS:
        if objective in wanted:
            yield [row(model, objective, "here", model.here(objective))]


def benchmark(options: Options) -> tuple[str, dict, Iterator[list[dict]]]:
    config = {
        "gpus": {gpu: device_named(gpu).source for gpu in GPUS},
        "memory_gb": {gpu: round(device_named(gpu).memory / 1e9, 1) for gpu in GPUS},
        "efficiency": assumed(is_captured=False).source,
    }
    return "objectives_cost", config, (rows for name in NETWORKS for rows in rows_of(name, options))
