"""Files of the Hugging Face hub, or a sentence about what is missing."""

from pathlib import Path


def fetch(model_id: str, revision: str | None, patterns: list[str]) -> Path:
    """The local snapshot of a hub model with the files that match the patterns, and no others.

    ``FileNotFoundError`` if the model is neither in the cache nor to be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if model_id.count("/") != 1 or model_id.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"{model_id!r} is neither a folder nor a model id of the form owner/name; give "
            "the folder of a checkpoint with --teacher"
        )
    try:
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        at = "" if revision is None else f" at revision {revision!r}"
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FileNotFoundError(
            f"{model_id!r} is no local folder, and the model{at} is neither in the Hugging Face "
            f"cache nor could it be fetched ({reason[0]}); give the path of a local copy, or "
            "connect once"
        ) from error
