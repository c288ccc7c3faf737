"""The device of a run."""

import torch


def pick_device(name: str) -> torch.device:
    """``train.device`` as a device; ``ValueError`` if cuda is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device is cuda, but no NVIDIA GPU is visible; use cpu or auto")
    is_cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if is_cuda else "cpu")
