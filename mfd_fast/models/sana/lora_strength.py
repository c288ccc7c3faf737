"""What a LoRA file and the files around it say about its strength, alpha / r or alpha / sqrt(r).

    lora_adapter_metadata in the file   a LoraConfig of PEFT as JSON, by diffusers since 0.34
    STEM.alpha in the file              sd-scripts, OneTrainer, ComfyUI
    adapter_config.json beside it       a LoraConfig, by PEFT

A file that holds neither of the first two is of strength 1 for its own readers if diffusers or
ComfyUI wrote it; one of PEFT has no strength of its own.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mfd_fast.files.plain import parse_json
from mfd_fast.models.sana.lora_layers import DIFFUSERS

METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps a LoraConfig, as JSON
CONFIG = "adapter_config.json"
# Entries of a LoraConfig that change nothing of what a trained linear layer computes.
INERT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out"),
    *("layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "loftq_config"),
    *("eva_config", "corda_config", "lora_ga_config", "runtime_config", "qalora_group_size"),
    "ensure_weight_tying",
}
STRENGTH = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
# Values that mean "as usual"; the other ways to initialise change the base weights too.
USUAL = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True)
class LoraConfig:
    """The strength of every layer by a LoraConfig of PEFT; ``source`` is the file, for errors."""

    source: str
    rank: int
    alpha: float
    rank_pattern: Mapping[re.Pattern, float]
    alpha_pattern: Mapping[re.Pattern, float]
    use_rslora: bool

    @classmethod
    def read(cls, text: str | bytes, source: str) -> "LoraConfig":
        """From JSON, of the layers of the transformer if it speaks of several networks.

        ``ValueError`` names the source and what is broken or not computed here.
        """
        try:
            entries = parse_json(text)
        except ValueError as error:
            raise ValueError(f"{source} is not JSON ({error}); copy it again") from error
        if not isinstance(entries, dict):
            raise ValueError(f"{source} must be a JSON object, got a {type(entries).__name__}")
        if any(key.startswith(DIFFUSERS) for key in entries):
            entries = {
                key.removeprefix(DIFFUSERS): value
                for key, value in entries.items()
                if key.startswith(DIFFUSERS)
            }
        for key, value in entries.items():
            is_usual = not value or key in INERT | STRENGTH or value in USUAL.get(key, ())
            if not is_usual:
                raise ValueError(
                    f"{source} has {key}={value!r}: that is more than B A on linear layers, its "
                    "strength is unknown here; merge it into the checkpoint with PEFT"
                )
        return cls(
            source,
            int(_positive(entries, "r", source)),
            _positive(entries, "lora_alpha", source),
            _pattern(entries, "rank_pattern", source),
            _pattern(entries, "alpha_pattern", source),
            bool(entries.get("use_rslora")),
        )

    def scale(self, module: str, rank: int) -> float:
        """Of a layer whose factors have this rank; ``ValueError`` if the config says another."""
        ranks = _matching(module, self.rank_pattern) or {self.rank}
        if rank not in ranks:
            raise ValueError(
                f"{self.source} gives {module} rank {min(ranks):g}, its factors have {rank}: "
                "strength unknown, the two belong to different files; copy both again"
            )
        alphas = _matching(module, self.alpha_pattern) or {self.alpha}
        if len(alphas) > 1:
            raise ValueError(
                f"{self.source} gives {module} alpha {' and '.join(map(str, sorted(alphas)))} by "
                "different entries of alpha_pattern: strength unknown, PEFT sorts them as it saves "
                "and takes the first; name every layer once"
            )
        return alphas.pop() / (math.sqrt(rank) if self.use_rslora else rank)


def _matching(module: str, patterns: Mapping[re.Pattern, float]) -> set[float]:
    return {value for pattern, value in patterns.items() if pattern.match(module)}


def _positive(entries: Mapping[str, Any], key: str, source: str) -> float:
    value = entries.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ValueError(
            f"{source}: {key} must be a number > 0, got {value!r}: strength unknown; copy it again"
        )
    return float(value)


def _pattern(entries: Mapping[str, Any], key: str, source: str) -> dict[re.Pattern, float]:
    """By PEFT's rule: an expression for the whole name, or for its end from a dot on."""
    patterns = entries.get(key) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{source}: {key} must map names to numbers, got {patterns!r}")
    found = {}
    for pattern in patterns:
        try:
            rule = re.compile(rf"(.*\.)?({pattern})$")
        except re.error as error:
            raise ValueError(
                f"{source}: {pattern!r} in {key} is no regular expression ({error})"
            ) from error
        found[rule] = _positive(patterns, pattern, f"{source}: {key}")
    return found


@dataclass(frozen=True)
class Strengths:
    """What is known about the strength of the layers of one file.

    Args:
        path: the file, for errors.
        alphas: by key without ``.alpha``.
        config: of the file's metadata, or beside a file that says nothing of it.
        default: what its readers take where nothing is said; None: they take nothing for granted.
    """

    path: Path
    alphas: Mapping[str, float]
    config: LoraConfig | None
    default: float | None

    @classmethod
    def of(
        cls,
        path: Path,
        metadata: Mapping[str, str],
        alphas: Mapping[str, float],
        ranks: Mapping[str, int],
        *,
        names_alpha: bool,
    ) -> "Strengths":
        """What a file says, and what lies beside it if the file itself says nothing.

        Args:
            path: of the file.
            metadata: of its header.
            alphas: its ``.alpha`` entries, by stem.
            ranks: of its layers, by stem.
            names_alpha: its format has ``.alpha`` entries (lora_down, or ComfyUI's keys).
        """
        if METADATA_KEY in metadata:
            source = f"{path}: its {METADATA_KEY}"
            return cls(path, alphas, LoraConfig.read(metadata[METADATA_KEY], source), None)
        if alphas:
            return cls(path, alphas, None, None)
        beside = path.with_name(CONFIG)
        config = LoraConfig.read(beside.read_bytes(), str(beside)) if beside.is_file() else None
        is_uniform = len(set(ranks.values())) == 1  # else releases of diffusers differ
        is_diffusers = all(stem.startswith(DIFFUSERS) for stem in ranks) and is_uniform
        return cls(path, {}, config, 1.0 if names_alpha or is_diffusers else None)

    def scale(self, stem: str, module: str, rank: int) -> float:
        """Of one layer; ``ValueError`` where nothing says it, or two say different things."""
        said = {}
        if self.config is not None:
            said[self.config.source] = self.config.scale(module, rank)
        if stem in self.alphas:
            said[f"{stem}.alpha"] = self.alphas[stem] / rank
        if self.default is not None:
            said["a file without alpha"] = self.default
        if len(set(said.values())) == 1:
            return next(iter(said.values()))
        listed = ", ".join(f"{scale:g} by {source}" for source, scale in said.items())
        raise ValueError(
            f"{self.path}: the strength of {module} is unknown ({listed or 'nothing says it'}); "
            f"put the {CONFIG} it was trained with beside it, or write it with diffusers' "
            "save_lora_weights and transformer_lora_adapter_metadata"
        )
