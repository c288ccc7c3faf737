"""``mfd-fast compat sana``: the flags of the official SANA script, taken under their own names.

    mfd-fast compat sana --pretrained_model_name_or_path=... --prompt_dataset=... --output_dir=...

starts the ``sana-1.6b-official`` preset, the settings of the official launch script, and applies
what is given.  A flag that would have no effect here is refused with the reason.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mfd_fast.models import preset
from mfd_fast.run.config import nearest, with_settings
from mfd_fast.run.folder import CHECKPOINTS

PRESET = "sana-1.6b-official"
NO_IMAGES = "MFD learns from prompts alone, no images are read"
NO_PRIOR = "there is no prior-preservation loss in MFD"
NO_PRODIGY = "AdamW is the optimizer here"
NO_HUB = "upload the run folder with huggingface-cli"
UNUSED_THERE = "the official script reads it nowhere"

# Flags that mean nothing here, with the reason.
REFUSED: dict[str, str] = {
    "dataset_name": NO_IMAGES + "; give --prompt_dataset",
    "dataset_config_name": NO_IMAGES,
    "cache_dir": "set HF_HOME in the environment",
    "image_column": NO_IMAGES,
    "repeats": "a prompt file is read epoch after epoch",
    "class_data_dir": NO_PRIOR,
    "class_prompt": NO_PRIOR,
    "with_prior_preservation": NO_PRIOR,
    "prior_loss_weight": NO_PRIOR,
    "num_class_images": NO_PRIOR,
    "complex_human_instruction": "the instruction that SanaPipeline itself uses is taken",
    "num_validation_images": "a sample grid has four images",
    "validation_epochs": "there are no epochs; give --validation_steps",
    "lora_dropout": "the adapters have no dropout: a captured step draws no masks",
    "center_crop": NO_IMAGES,
    "random_flip": NO_IMAGES,
    "sample_batch_size": NO_PRIOR,
    "num_train_epochs": "give --max_train_steps",
    "scale_lr": "give the learning rate that is meant",
    "lr_num_cycles": "the learning rate is constant after the warm-up",
    "lr_power": "the learning rate is constant after the warm-up",
    "dataloader_num_workers": "prompts are encoded ahead of the step on their own stream",
    "weighting_scheme": UNUSED_THERE,
    "mf": UNUSED_THERE,
    "logit_mean": UNUSED_THERE,
    "logit_std": UNUSED_THERE,
    "mode_scale": UNUSED_THERE,
    "prodigy_beta3": NO_PRODIGY,
    "prodigy_decouple": NO_PRODIGY,
    "prodigy_use_bias_correction": NO_PRODIGY,
    "prodigy_safeguard_warmup": NO_PRODIGY,
    "adam_weight_decay_text_encoder": "the text encoder is not trained",
    "adam_epsilon": "the optimizers' own 1e-8 is used, the script's default",
    "push_to_hub": NO_HUB,
    "hub_token": NO_HUB,
    "hub_model_id": NO_HUB,
    "logging_dir": "logs lie in the run folder, --output_dir",
    "allow_tf32": "all products are in the network's bfloat16",
    "cache_latents": NO_IMAGES,
    "upcast_before_saving": "the student is always written in float32",
    "offload": "text encoder and decoder are on the GPU only while they work",
    "local_rank": "torchrun sets it in the environment",
    "enable_vae_tiling": "images are decoded one at a time",
    "enable_npu_flash_attention": "only NVIDIA GPUs and CPUs are supported",
}


@dataclass
class Request:
    """What the flags say so far: settings by dotted key, and the options of ``distill``."""

    settings: dict[str, Any] = field(default_factory=dict)
    out: str = ""
    resume: str = ""
    steps: int | None = None

    def set(self, *keys: str) -> Callable[[Any], None]:
        """A taker that stores a value under each of the keys."""
        return lambda value: self.settings.update(dict.fromkeys(keys, value))


def compat(argv: list[str]) -> None:
    """Run the official SANA command line."""
    if argv[:1] != ["sana"]:
        raise ValueError(
            f"expected mfd-fast compat sana --pretrained_model_name_or_path=...; got {argv[:1]}"
        )
    request = read_flags(argv[1:])
    config = apply_settings(request)
    if not request.out:
        raise ValueError("--output_dir is missing: the run folder to make")
    out = Path(request.out)
    resume = checkpoint_to_resume(out, request.resume)
    from mfd_fast.run.session import run_distillation

    run_distillation(config, out, resume=resume)


def checkpoint_to_resume(out: Path, wanted: str) -> str | None:
    """What ``--resume_from_checkpoint`` means, as ``run_distillation`` takes it.

    As in the official script: ``latest``, or the name of a checkpoint of ``--output_dir`` with or
    without its folder; one of another folder is a ``ValueError``.
    """
    if not wanted:
        return None
    if wanted == "latest":
        return ""
    folder = out / CHECKPOINTS
    path = Path(wanted) if Path(wanted).is_dir() else folder / wanted
    if not (folder.is_dir() and path.is_dir() and path.parent.samefile(folder)):
        raise ValueError(
            f"--resume_from_checkpoint takes latest, or a checkpoint in {folder} (a run continues "
            f"in its own --output_dir); got {wanted}"
        )
    return str(path)


def apply_settings(request: Request) -> Any:
    """The official preset with the request's settings."""
    config = with_settings(preset(PRESET), request.settings)
    if request.steps is None:
        return config
    aux, student = config.distill.aux_updates, config.distill.student_updates
    updates = max(1, request.steps * student // (aux + student))
    return with_settings(config, {"train.updates": updates})


def read_flags(argv: list[str]) -> Request:
    """Understand ``--flag=value`` and ``--flag value``; ``ValueError`` names flag and reason."""
    request = Request()
    takers, switches = _takers(request), _switches(request)
    words = list(argv)
    while words:
        word = words.pop(0)
        name, has_value, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in {**takers, **switches, **REFUSED}:
            raise ValueError(
                f"{word!r} is no flag of the official script"
                f"{nearest(name, [*takers, *switches, *REFUSED])}"
            )
        if name in REFUSED:
            raise ValueError(f"--{name} has no effect: {REFUSED[name]}; leave it out")
        if name in switches:
            switches[name]()
            continue
        if not has_value:
            if not words:
                raise ValueError(f"--{name} needs a value")
            value = words.pop(0)
        try:
            takers[name](value)
        except ValueError as error:
            raise ValueError(f"--{name}: {error}") from None
    return request


def _switches(request: Request) -> dict[str, Callable[[], None]]:
    eight_bit = request.set("distill.student_optim.kind", "distill.aux_optim.kind")
    return {
        "use_8bit_adam": lambda: eight_bit("adamw8bit"),
        "gradient_checkpointing": lambda: request.set("train.activation")("block"),
    }


def _takers(request: Request) -> dict[str, Callable[[str], None]]:
    """flag -> what to do with its value."""

    def as_type(kind: type, *keys: str) -> Callable[[str], None]:
        return lambda value: request.set(*keys)(kind(value))

    def of_both(name: str) -> tuple[str, str]:
        return f"distill.student_optim.{name}", f"distill.aux_optim.{name}"

    def attribute(name: str, kind: type = str) -> Callable[[str], None]:
        return lambda value: setattr(request, name, kind(value))

    return {
        "pretrained_model_name_or_path": as_type(str, "teacher"),
        "revision": as_type(str, "sana.revision"),
        "variant": as_type(str, "sana.variant"),
        "prompt_dataset": as_type(str, "sana.prompts"),
        "caption_column": as_type(str, "sana.prompt_column"),
        "max_sequence_length": _only(("300",), "SANA's text encoder is used at its 300 tokens"),
        "validation_prompt": as_type(str, "sana.preview_prompt"),
        "validation_steps": as_type(int, "train.preview_every"),
        "rank": as_type(int, "sana.rank"),
        "lora_alpha": as_type(float, "sana.alpha"),
        "lora_layers": as_type(str, "sana.targets"),
        "output_dir": attribute("out"),
        "seed": as_type(int, "distill.seed"),
        "resolution": as_type(int, "sana.resolution"),
        "val_resolution": _same_resolution(request),
        "train_batch_size": as_type(int, "train.batch_size"),
        "gradient_accumulation_steps": _only(("1",), "give a larger --train_batch_size"),
        "max_train_steps": attribute("steps", int),
        "checkpointing_steps": as_type(int, "train.checkpoint_every"),
        "checkpoints_total_limit": as_type(int, "train.keep_last"),
        "resume_from_checkpoint": attribute("resume"),
        "learning_rate_stu": as_type(float, "distill.student_optim.lr"),
        "learning_rate_aux": as_type(float, "distill.aux_optim.lr"),
        "lr_scheduler": _only(
            ("constant", "constant_with_warmup"), "the learning rate is constant after its warm-up"
        ),
        "lr_warmup_steps": as_type(int, *of_both("warmup_updates")),
        "ode_step_size": as_type(float, "distill.step_size"),
        "aux_steps_per_cycle": as_type(int, "distill.aux_updates"),
        "student_steps_per_cycle": as_type(int, "distill.student_updates"),
        "r_not_equal_t_ratio": lambda value: request.set("distill.equal_fraction")(
            1.0 - float(value)
        ),
        "optimizer": _only(("AdamW", "adamW", "adamw"), NO_PRODIGY),
        "adam_beta1": as_type(float, *of_both("beta1")),
        "adam_beta2": as_type(float, *of_both("beta2")),
        "adam_weight_decay": as_type(float, *of_both("weight_decay")),
        "max_grad_norm": as_type(float, *of_both("clip_norm")),
        "report_to": as_type(str, "train.report_to"),
        "mixed_precision": _precision(request),
        "num_inference_steps": as_type(int, "distill.student_steps"),
    }


def _only(accepted: tuple[str, ...], reason: str) -> Callable[[str], None]:
    """A flag whose only useful values change nothing."""

    def take(value: str) -> None:
        if value not in accepted:
            raise ValueError(f"only {' or '.join(accepted)} is supported, got {value}; {reason}")

    return take


def _precision(request: Request) -> Callable[[str], None]:
    def take(value: str) -> None:
        dtypes = {"bf16": "bfloat16", "no": "float32"}
        if value not in dtypes:
            raise ValueError(
                f"only bf16 or no is supported, got {value}; SANA's activations leave fp16's range"
            )
        request.set("sana.dtype")(dtypes[value])

    return take


def _same_resolution(request: Request) -> Callable[[str], None]:
    def take(value: str) -> None:
        if int(value) != request.settings.get("sana.resolution", int(value)):
            raise ValueError("sample grids have the resolution of the training, --resolution")

    return take
