"""Advice in the words of the command that was typed.

The library's messages name options as ``mfd-fast distill`` has them.  A command that has others of
the same meaning says its own; a command typed out in a message stays as it is.
"""

import re
from collections.abc import Mapping

# command -> option of distill -> what is typed there
WORDS: Mapping[str, Mapping[str, str]] = {
    "encode-prompts": {
        "--teacher": "the CHECKPOINT that comes first",
    },
    "evaluate": {"--prompt-key": "prompt_column in the run's config.yaml"},
    "compat": {
        "--out": "--output_dir",
        "--resume": "--resume_from_checkpoint",
        "--teacher": "--pretrained_model_name_or_path",
        "--sana.prompts": "--prompt_dataset",
        "--prompt-key": "--caption_column",
        "--skip-bad": "mfd-fast encode-prompts --skip-bad",
        "--sana.revision": "--revision",
        "--sana.variant": "--variant",
        "--sana.resolution": "--resolution",
        "--sana.targets": "--lora_layers",
        "--train.batch-size": "--train_batch_size",
    },
}
OPTION = re.compile(r"mfd-fast [a-z][^;]*|(?<![\w-])--[a-z][\w.-]*\w")


def spoken(command: str, message: str) -> str:
    """The message with the options that ``command`` has in place of distill's."""
    words = WORDS.get(command, {})
    return OPTION.sub(lambda found: words.get(found.group(), found.group()), message)
