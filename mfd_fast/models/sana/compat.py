"""The flags of the official SANA script: the setting that each stands for, or why it has no effect.

``mfd-fast compat sana`` takes them under their own names and starts the ``sana-1.6b-official``
preset, the settings of the official launch script.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mfd_fast.models import preset
from mfd_fast.run.config import RunConfig, with_settings
from mfd_fast.run.folder import CHECKPOINTS

PRESET = "sana-1.6b-official"
NO_IMAGES = "MFD learns from prompts alone, no images are read"
NO_PRIOR = "there is no prior-preservation loss in MFD"
NO_HUB = "upload the run folder with huggingface-cli"
NO_CYCLES = "the learning rate is constant after the warm-up"
UNUSED_THERE = "the official script reads it nowhere"
NO_PRODIGY = "AdamW is the optimizer here"


def _of_both(name: str) -> tuple[str, ...]:
    return tuple(f"distill.{role}.{name}" for role in ("student_optim", "aux_optim"))


# flag -> the settings that take its value
TAKEN: dict[str, tuple[str, ...]] = {
    "pretrained_model_name_or_path": ("teacher",),
    "revision": ("sana.revision",),
    "variant": ("sana.variant",),
    "prompt_dataset": ("sana.prompts",),
    "caption_column": ("sana.prompt_column",),
    "validation_prompt": ("sana.preview_prompt",),
    "validation_steps": ("train.preview_every",),
    "rank": ("sana.rank",),
    "lora_alpha": ("sana.alpha",),
    "lora_layers": ("sana.targets",),
    "seed": ("distill.seed",),
    "resolution": ("sana.resolution",),
    "train_batch_size": ("train.batch_size",),
    "checkpointing_steps": ("train.checkpoint_every",),
    "checkpoints_total_limit": ("train.keep_last",),
    "learning_rate_stu": ("distill.student_optim.lr",),
    "learning_rate_aux": ("distill.aux_optim.lr",),
    "lr_warmup_steps": _of_both("warmup_updates"),
    "ode_step_size": ("distill.step_size",),
    "aux_steps_per_cycle": ("distill.aux_updates",),
    "student_steps_per_cycle": ("distill.student_updates",),
    "adam_beta1": _of_both("beta1"),
    "adam_beta2": _of_both("beta2"),
    "adam_weight_decay": _of_both("weight_decay"),
    "max_grad_norm": _of_both("clip_norm"),
    "report_to": ("train.report_to",),
    "num_inference_steps": ("distill.student_steps",),
}
# flag -> the settings that it sets, what its words mean, and why no other word is taken
WORDS: dict[str, tuple[tuple[str, ...], dict[str, str], str]] = {
    "use_8bit_adam": (_of_both("kind"), {"": "adamw8bit"}, "leave its value out"),
    "gradient_checkpointing": (("train.activation",), {"": "block"}, "leave its value out"),
    "mixed_precision": (
        ("sana.dtype",),
        {"bf16": "bfloat16", "no": "float32"},
        "SANA's activations leave fp16's range",
    ),
    "max_sequence_length": ((), {"300": ""}, "SANA's text encoder is used at its 300 tokens"),
    "gradient_accumulation_steps": ((), {"1": ""}, "give a larger --train_batch_size"),
    "lr_scheduler": (
        (),
        {"constant": "", "constant_with_warmup": ""},
        "the learning rate is constant after its warm-up",
    ),
    "optimizer": (
        (),
        {"AdamW": "", "adamW": "", "adamw": ""},
        NO_PRODIGY,
    ),
}
# flag -> what it means, for those that are more than a setting
SPECIAL: dict[str, tuple[type, str]] = {
    "output_dir": (str, "the run folder"),
    "resume_from_checkpoint": (str, "latest, or a checkpoint of --output_dir"),
    "max_train_steps": (int, "train.updates: updates of both roles, as the script counts them"),
    "r_not_equal_t_ratio": (float, "1 - distill.equal_fraction"),
    "val_resolution": (int, "that of the training, --resolution"),
}
# flag -> why it would have no effect
REFUSED: dict[str, str] = {
    "dataset_name": NO_IMAGES + "; give --prompt_dataset",
    "cache_dir": "set HF_HOME in the environment",
    "repeats": "a prompt file is read epoch after epoch",
    "complex_human_instruction": "the instruction that SanaPipeline itself uses is taken",
    "num_validation_images": "a sample grid has four images",
    "validation_epochs": "there are no epochs; give --validation_steps",
    "lora_dropout": "the adapters have no dropout: a captured step draws no masks",
    "num_train_epochs": "give --max_train_steps",
    "scale_lr": "give the learning rate that is meant",
    "dataloader_num_workers": "prompts are encoded ahead of the step on their own stream",
    "adam_weight_decay_text_encoder": "the text encoder is not trained",
    "adam_epsilon": "the optimizers' own 1e-8 is used, the script's default",
    "logging_dir": "logs lie in the run folder, --output_dir",
    "allow_tf32": "all matmuls are in the network's bfloat16",
    "upcast_before_saving": "the student is always written in float32",
    "offload": "text encoder and decoder are on the GPU only while they work",
    "local_rank": "torchrun sets it in the environment",
    "enable_vae_tiling": "images are decoded one at a time",
    "enable_npu_flash_attention": "only NVIDIA GPUs and CPUs are supported",
    **dict.fromkeys(
        ("dataset_config_name", "image_column", "center_crop", "random_flip", "cache_latents"),
        NO_IMAGES,
    ),
    **dict.fromkeys(
        ("class_data_dir", "class_prompt", "with_prior_preservation", "prior_loss_weight",
         "num_class_images", "sample_batch_size"), NO_PRIOR,
    ),
    **dict.fromkeys(("lr_num_cycles", "lr_power"), NO_CYCLES),
    **dict.fromkeys(
        ("weighting_scheme", "mf", "logit_mean", "logit_std", "mode_scale"), UNUSED_THERE
    ),
    **dict.fromkeys(
        ("prodigy_beta3", "prodigy_decouple", "prodigy_use_bias_correction",
         "prodigy_safeguard_warmup"), NO_PRODIGY,
    ),
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_model_id"), NO_HUB),
}  # fmt: skip


def official_config(flags: Mapping[str, Any]) -> RunConfig:
    """The official preset with what was typed, by flag; ``ValueError`` names flag and reason."""
    settings: dict[str, Any] = {}
    for flag, value in flags.items():
        if flag in REFUSED:
            raise ValueError(f"--{flag} has no effect: {REFUSED[flag]}; leave it out")
        keys = TAKEN.get(flag, ())
        if flag in WORDS:
            keys, words, reason = WORDS[flag]
            if value not in words:
                known = " or ".join(words) or "the flag alone"
                raise ValueError(f"--{flag}: only {known} is supported, got {value}; {reason}")
            value = words[value]
        settings |= dict.fromkeys(keys, value)
    shown = flags.get("val_resolution")
    if shown is not None and shown != settings.get("sana.resolution", shown):
        raise ValueError(
            "--val_resolution: sample grids have the resolution of the training, --resolution"
        )
    if "r_not_equal_t_ratio" in flags:
        settings["distill.equal_fraction"] = 1.0 - flags["r_not_equal_t_ratio"]
    config = with_settings(preset(PRESET), settings)
    if "max_train_steps" not in flags:
        return config
    aux, student = config.distill.aux_updates, config.distill.student_updates
    updates = max(1, flags["max_train_steps"] * student // (aux + student))
    return with_settings(config, {"train.updates": updates})


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


def spoken_flags() -> dict[str, str]:
    """Option of ``distill`` -> the flag that is typed here in its place."""
    said = {"--out": "--output_dir", "--resume": "--resume_from_checkpoint"}
    said |= {"--skip-bad": "mfd-fast encode-prompts --skip-bad", "--prompt-key": "--caption_column"}
    return said | {
        f"--{keys[0].replace('_', '-')}": f"--{flag}"
        for flag, keys in TAKEN.items()
        if len(keys) == 1
    }
