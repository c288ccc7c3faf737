"""The official SANA script's command line: ``mfd-fast compat sana``."""

from pathlib import Path
from typing import Annotated, Any, TypedDict

from tyro.conf import arg

from mfd_fast.cli.parse import command, words
from mfd_fast.models import preset
from mfd_fast.run.config import leaves, to_dict


def _official_flags() -> Any:
    """A TypedDict of every flag of the official script, with what it means here."""
    from mfd_fast.models.sana.compat import PRESET, REFUSED, SPECIAL, TAKEN, WORDS

    kinds = {key: type(value) for key, value in leaves(to_dict(preset(PRESET)))}
    flags: dict[str, Any] = {
        flag: Annotated[kinds[keys[0]], arg(help=f"{' and '.join(keys)}.")]
        for flag, keys in TAKEN.items()
    }
    flags |= {flag: Annotated[kind, arg(help=f"{text}.")] for flag, (kind, text) in SPECIAL.items()}
    for flag, (keys, known, reason) in WORDS.items():
        text = f"{' and '.join(keys) or reason}."
        flags[flag] = Annotated[str, words("|".join(known)), arg(help=text)]
    for flag, reason in REFUSED.items():
        flags[flag] = Annotated[str, words(""), arg(help=f"Refused: {reason}.")]
    return TypedDict("OfficialFlags", flags, total=False)


@command(noun="FAMILY", names={"sana": "The official script's flags, under their own names."})
def compat(
    flags: Annotated[dict, arg(name="", constructor_factory=_official_flags)],
) -> None:
    """Run the official SANA command line; a flag that would have no effect is refused.

    Example: mfd-fast compat sana --pretrained_model_name_or_path=MODEL --prompt_dataset=labels.tsv
    --output_dir=runs/sana
    """
    from mfd_fast.models.sana.compat import checkpoint_to_resume, official_config

    config = official_config(flags)
    if not flags.get("output_dir"):
        raise ValueError("--output_dir is missing: the run folder to make")
    out = Path(flags["output_dir"])
    resume = checkpoint_to_resume(out, flags.get("resume_from_checkpoint", ""))
    from mfd_fast.run.session import run_distillation

    run_distillation(config, out, resume=resume)
