"""The official SANA command line, read here."""

import re

import pytest

from mfd_fast import cli
from mfd_fast.models import preset
from mfd_fast.models.sana.compat import REFUSED, SPECIAL, TAKEN, WORDS, official_config
from mfd_fast.run.config import leaves, to_dict

# The flags of the official launch script, but for --validation_epochs, which is refused.
LAUNCH_TEXT = """
--pretrained_model_name_or_path=owner/sana --output_dir=outputs --prompt_dataset=labels.tsv
--mixed_precision=bf16 --resolution=1024 --rank=64 --lora_alpha=64 --train_batch_size=1
--use_8bit_adam --learning_rate_stu=1e-4 --learning_rate_aux=1e-4 --ode_step_size=0.02
--aux_steps_per_cycle=50 --student_steps_per_cycle=20 --r_not_equal_t_ratio=1.0 --optimizer=AdamW
--max_grad_norm=1.0 --report_to=wandb --lr_scheduler=constant --lr_warmup_steps=0
--max_train_steps=30000 --validation_prompt=bear --checkpointing_steps=1000 --validation_steps=500
--val_resolution=1024 --num_inference_steps=4 --adam_beta1=0.9 --adam_beta2=0.999
--adam_weight_decay=1e-4 --seed=42
"""
LAUNCH = LAUNCH_TEXT.split()


def changed(config):
    """Settings that differ from the official preset, by dotted key."""
    official = dict(leaves(to_dict(preset("sana-1.6b-official"))))
    return {key: value for key, value in leaves(to_dict(config)) if official[key] != value}


def read_flags(argv):
    """What was typed, by flag."""
    return cli.command_of("compat").parse("sana", argv, "mfd-fast compat sana").keywords["flags"]


def test_the_official_launch_script_is_the_official_preset():
    flags = read_flags(LAUNCH)
    assert flags["output_dir"] == "outputs"
    assert changed(official_config(flags)) == {
        "teacher": "owner/sana",
        "sana.prompts": "labels.tsv",
        "sana.resolution": 1024,
        "sana.preview_prompt": "bear",
        "train.report_to": "wandb",
        "train.checkpoint_every": 1000,
        "train.preview_every": 500,
        "distill.seed": 42,
        "distill.student_optim.kind": "adamw8bit",
        "distill.aux_optim.kind": "adamw8bit",
    }


def test_values_may_follow_their_flag():
    flags = read_flags(["--rank", "8", "--gradient_checkpointing", "--max_train_steps", "70"])
    config = official_config(flags)
    assert (config.sana.rank, config.train.activation, config.train.updates) == (8, "block", 20)


def test_vsd_is_a_ratio_of_zero():
    config = official_config(read_flags(["--r_not_equal_t_ratio=0.0"]))
    assert config.distill.equal_fraction == 1.0


def test_every_flag_is_taken_or_refused_once():
    names = [*TAKEN, *WORDS, *SPECIAL, *REFUSED]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", REFUSED)
def test_a_flag_without_effect_is_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=re.escape(f"--{name} has no effect: {REFUSED[name]}")):
        official_config(read_flags([f"--{name}=1"]))
    assert name in read_flags([f"--{name}"])  # those that take no value


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rnak=4"], "unknown option '--rnak'; .*did you mean '--rank'"),
        (["--rank"], "--rank expects a value"),
        (["--rank=four"], "--rank: expected a whole number, got 'four'"),
        (["--mixed_precision=fp16"], "only bf16 or no is supported, got fp16"),
        (["--optimizer=prodigy"], "AdamW is the optimizer here"),
        (["--resolution=512", "--val_resolution=1024"], "have the resolution of the training"),
        (["--lr_scheduler=cosine"], "constant after its warm-up"),
        (["--gradient_accumulation_steps=2"], "give a larger --train_batch_size"),
        (["--report_to=comet_ml"], r"train\.report_to must be one of"),
        ([], "--output_dir is missing"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(argv, message, capsys):
    assert cli.main(["compat", "sana", *argv]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert len(error.strip().splitlines()) == 1
