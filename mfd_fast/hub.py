"""Files from and to the Hugging Face hub, or a sentence about what is missing."""

import os
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


def push(folder: Path, model_id: str) -> str:
    """Upload a folder as a model, which is made if it is missing; its address.

    The token is the one that ``hf auth login`` keeps, or HF_TOKEN.  ``OSError`` says what the hub
    answered; the folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        api.create_repo(model_id, exist_ok=True)
        about = "A student by Mean Flow Distillation"
        return str(
            api.upload_folder(repo_id=model_id, folder_path=folder, commit_message=about).repo_url
        )
    except HfHubHTTPError.__bases__ as error:  # those of its transport, which differs by version
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise OSError(
            f"{model_id} could not be pushed ({reason[0]}); {folder} is there: log in with hf auth "
            f"login, or type hf upload {model_id} {folder}"
        ) from error


def without_loading_bars() -> None:
    """transformers draws no bar of weights it loads; the hub's, of what it fetches, stay."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    enable_progress_bars()
