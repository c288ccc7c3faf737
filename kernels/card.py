"""How many multiprocessors a launch has to fill.

``MFD_FAST_MULTIPROCESSORS`` (read once, at import) takes the place of what the device says.
"""

import os
from functools import cache

import torch

ASSUMED = 132  # an H100's, where there is no device to ask


def _forced() -> int | None:
    text = os.environ.get("MFD_FAST_MULTIPROCESSORS")
    if text is not None and not (text.isdecimal() and int(text) > 0):
        raise ValueError(
            f"MFD_FAST_MULTIPROCESSORS must be a whole number above 0; got {text!r}: unset it, and "
            "the device is asked"
        )
    return None if text is None else int(text)


FORCED = _forced()


def multiprocessors(device: torch.device) -> int:
    """Of the device that is to run a launch."""
    return FORCED or _of(device)


@cache
def _of(device: torch.device) -> int:
    if device.type != "cuda":
        return ASSUMED
    return torch.cuda.get_device_properties(device).multi_processor_count
