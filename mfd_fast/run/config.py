"""Every setting of a run, as frozen dataclasses: the fields are the YAML keys and the CLI
overrides.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_type_hints

from mfd_fast.baselines.config import ComparisonConfig
from mfd_fast.files.plain import read_yaml
from mfd_fast.settings import (
    Count,
    CountOrOff,
    Settings,
    check_type,
    require,
)

if TYPE_CHECKING:
    from mfd_fast.backbones.quantized import Stored
    from mfd_fast.run.task import Shapes, Task

Capture = Literal["auto", "on", "off"]
# --memory-profile GB: for a card of that memory.  A larger batch is not the paper's setting (1 a
# GPU); it is there because it is faster a sample.
MEMORY_PROFILES: dict[int, dict[str, Any]] = {
    16: {"activation": "block", "batch_size": 1},
    24: {"activation": "none", "batch_size": 1},
    40: {"activation": "none", "batch_size": 2},
    80: {"activation": "none", "batch_size": 4},
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """The loop around the updates."""

    SECTION: ClassVar[str] = "train."

    updates: Count = 3000
    """Student updates in the whole run."""
    batch_size: Count = 1
    """Samples per update, of all ranks together: what a run learns does not depend on them."""
    log_every: Count = 10
    """Metrics are read from the device and written every this many student updates."""
    preview_every: CountOrOff = 0
    """Draw samples of the student every this many student updates; 0: only at the end."""
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """Send the metrics there too; metrics.jsonl is always written."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes cuda if there is one."""
    capture: Capture = "auto"
    """Run updates as CUDA graphs: auto wherever that is possible (an NVIDIA GPU, an objective over
    intervals, no fsdp), on: or stop, off: never.
    """
    float8: bool = False
    """Evaluate lanes without gradient in e4m3; needs adapters and, on a GPU, compute capability
    8.9.
    """
    activation: Literal["none", "cheap", "block", "chunk"] = "none"
    """What the student's forward recomputes in its backward: nothing, pointwise operators,
    blocks, or blocks with the MLPs of long sequences in pieces.
    """
    checkpoint_every: CountOrOff = 100
    """Write a checkpoint every this many student updates; 0: only at the end or when stopped."""
    keep_last: Count = 2
    """Newest checkpoints to keep."""
    keep_every: CountOrOff = 0
    """Also keep, for good, the checkpoints at multiples of this many student updates; 0: none."""
    max_skipped_in_a_row: Count = 20
    """Stop when this many updates of a role in a row had a gradient that is not finite."""
    shard: Literal["none", "fsdp"] = "none"
    """Under torchrun: a whole model on every rank, or networks spread over the ranks: full copies,
    or the frozen one that adapters share.
    """

    def __post_init__(self):
        super().__post_init__()
        require(self.capture != "on" or self.shard != "fsdp", "train.capture",
                 "auto or off with train.shard fsdp", self.capture)  # fmt: skip
        require(not (self.preview_every and self.shard == "fsdp"), "train.preview_every",
                 "0 with train.shard fsdp", self.preview_every)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """One distillation run.  A family has a subclass, with its settings, that knows its task."""

    gives_samples: ClassVar[bool] = False
    """Whether it has samples of the data, and a student that takes a second time: what some of the
    compared objectives need.
    """
    SHORT: ClassVar[dict[str, str]] = {}
    """Options with a short name on the command line, and the setting each stands for."""
    MAY_CHANGE: ClassVar[tuple[str, ...]] = (
        "num_eval_samples",
        "distill.sample_bound",
        "train.updates",
        "train.log_every",
        "train.preview_every",
        "train.report_to",
        "train.device",
        "train.capture",
        "train.float8",
        "train.activation",
        "train.checkpoint_every",
        "train.keep_last",
        "train.keep_every",
        "train.max_skipped_in_a_row",
        "train.shard",
    )
    """Settings that a resumed run may have otherwise than the run it continues, and that do not
    change what it learns.
    """
    LEARNS_ON: ClassVar[tuple[str, ...]] = (
        "distill.aux_updates",
        "distill.micro_batches",
        "distill.student_backprop",
        "distill.student_optim.lr",
        "distill.student_optim.clip_norm",
        "distill.aux_optim.lr",
        "distill.aux_optim.clip_norm",
    )
    """Settings that it may have otherwise, too: from there on it learns by the new ones."""
    PATHS: ClassVar[tuple[str, ...]] = ("teacher",)
    """Settings that say where files lie.  They may move: their contents are compared."""
    preset: str
    """The task: what is distilled, from which teacher, on which conditions."""
    teacher: str = ""
    """The pretrained teacher, a file, folder or hub id; empty: the preset's own."""
    num_eval_samples: Count = 2000
    """Samples behind every row of the result table."""
    distill: ComparisonConfig = field(default_factory=ComparisonConfig)
    """The method."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop."""

    def task(self) -> "Task":
        """What runs this config; the import stands inside, so that a config needs no model."""
        raise NotImplementedError(f"{type(self).__name__}.task")

    def resolved(self) -> "RunConfig":
        """The config of the task, where that knows more: a guidance that a pipeline decides."""
        return self

    def terms(self) -> "list[tuple[int, Shapes]]":
        """Weights and shapes whose costs sum to those of :meth:`shapes`, for a family of networks
        so deep that an estimate takes their blocks once and counts them.
        """
        return [(1, self.shapes())]

    def bases(self) -> "dict[str, RunConfig]":
        """The same run on every format of its frozen base that an estimate compares, by name."""
        return {}

    def stored(self) -> "Stored | None":
        """Bytes of the frozen base, where it has several formats."""
        return None

    def check_base(self) -> str:
        """What the format of the frozen base changes in the teacher, in words."""
        raise ValueError(
            f"--check-base is for pipelines of diffusers; {self.preset} has its base in one format"
        )

    def beside_the_updates(self) -> dict[str, float]:
        """Bytes, by name, of what is on the device only between updates, as far as known."""
        return {}

    def shapes(self, device: str = "meta") -> "Shapes":
        """What is trained and on what, without the weights: for ``mfd-fast estimate``.

        On another device than ``meta`` the weights are random.  A family whose teacher is small
        need not write this: its task is built.
        """
        from mfd_fast.run.task import shapes_of_task

        return shapes_of_task(self.task(), device)


def with_settings(config: Any, settings: Mapping[str, Any]) -> Any:
    """The config with values by dotted key."""
    tree = to_dict(config)
    for key, value in settings.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[name] = value
    return from_dict(type(config), tree)


def with_memory(config: RunConfig, gigabytes: int) -> RunConfig:
    """The config with the profile of a card; ``ValueError`` lists the profiles."""
    if gigabytes not in MEMORY_PROFILES:
        raise ValueError(
            f"--memory-profile must be one of {', '.join(map(str, MEMORY_PROFILES))} (GB of the "
            f"card), got {gigabytes}; take the next smaller one"
        )
    train = dataclasses.replace(config.train, **MEMORY_PROFILES[gigabytes])
    return dataclasses.replace(config, train=train)


def with_fast(config: RunConfig) -> RunConfig:
    """The config with fewer evaluations where it holds (docs/evaluations.md): AB2 at four times
    Euler's step.
    """
    distill = config.distill
    longer = 4 if distill.solver == "euler" else 1  # once: what is fast already stays as it is
    distill = dataclasses.replace(distill, solver="ab2", step_size=longer * distill.step_size)
    return dataclasses.replace(config, distill=distill)


def with_file(config: RunConfig, path: Path) -> RunConfig:
    """The config with the keys of a YAML file, which need not be all."""
    tree = read_settings(path)
    if tree.get("preset", config.preset) != config.preset:
        raise ValueError(f"{path} is of preset {tree['preset']!r}, not of {config.preset!r}")
    return from_dict(type(config), _merged(to_dict(config), tree))


def read_settings(path: Path) -> dict[str, Any]:
    """A YAML file of settings, which may be any of them; ``ValueError`` if it is none."""
    try:
        tree = read_yaml(path)
    except FileNotFoundError:
        raise ValueError(f"there is no {path}; give --config a YAML file of settings") from None
    except ValueError as error:
        raise ValueError(f"{path} is not YAML of settings: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold a mapping of config keys; got {type(tree).__name__}")
    return tree


def _merged(tree: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = dict(tree)
    for name, value in over.items():
        is_section = isinstance(value, dict) and isinstance(tree.get(name), dict)
        both[name] = _merged(tree[name], value) if is_section else value
    return both


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of nested mappings, by dotted key."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The config with relative paths of what exists made absolute: the run can then be opened from
    any folder.
    """
    values = {key: value for key, value in leaves(to_dict(config)) if key in config.PATHS}
    places = {key: Path(value) for key, value in values.items() if value and Path(value).exists()}
    # Not the file's own links: its name says what it holds.
    found = {key: str(path.parent.resolve() / path.name) for key, path in places.items()}
    return with_settings(config, found)


def to_dict(config: Any) -> dict:
    """The config as plain containers, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved config as YAML."""
    import yaml  # here, so that the library itself needs no YAML

    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))


def from_dict(cls: type, tree: dict, path: str = "") -> Any:
    """Build a config dataclass from plain containers, checking keys and types by name."""
    known = {f.name for f in fields(cls)}
    for name in tree:
        if name not in known:
            section = path.rstrip(".") or "top level"
            raise ValueError(
                f"unknown config key {path + str(name)!r}; {section} has {sorted(known)}"
                f"{nearest(str(name), known)}"
            )
    hints = get_type_hints(cls)
    values = {}
    for name, value in tree.items():
        if hints[name] == Capture and type(value) is bool:  # older configs, and YAML's own on, off
            value = "on" if value else "off"
        if is_dataclass(hints[name]):
            require(isinstance(value, dict), path + name, "a mapping", repr(value))
            values[name] = from_dict(hints[name], value, f"{path}{name}.")
        else:
            values[name] = check_type(hints[name], value, path + name)
    return cls(**values)


def nearest(name: str, known) -> str:
    """`"; did you mean ..."` if one of the known words is close to ``name``, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
