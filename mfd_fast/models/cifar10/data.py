"""CIFAR-10 from a local folder: the python or the binary version, as its makers publish it.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009).  60,000
colour images of 32 x 32 pixels in ten classes: five training files and a test file of 10,000 each.
Nothing is downloaded.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mfd_fast.files.pickles import load_plain_pickle

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
NUM_CLASSES = 10
TRAIN_FILES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_FILES = ("test_batch",)
SUBFOLDERS = (".", "cifar-10-batches-py", "cifar-10-batches-bin")


def load_cifar10(folder: str | Path, *, train: bool = True) -> tuple[Tensor, Tensor]:
    """Images ``[N, 3, 32, 32]`` uint8, labels ``[N]`` int64 in 0 to 9.

    Args:
        folder: holds ``data_batch_1`` to ``5`` and ``test_batch``, pickles or ``.bin`` files, or
            the archive's own subfolder with them.
        train: the five training files, or the test file.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated, or not what its name says.
    """
    folder = Path(folder)
    parts = [_read(_find(folder, name)) for name in (TRAIN_FILES if train else TEST_FILES)]
    images, labels = (np.concatenate(group) for group in zip(*parts, strict=True))
    return torch.from_numpy(images).view(-1, *SHAPE), torch.from_numpy(labels).long()


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 images to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def _find(folder: Path, name: str) -> Path:
    for subfolder in SUBFOLDERS:
        for path in (folder / subfolder / name, folder / subfolder / f"{name}.bin"):
            if path.is_file():
                return path
    raise FileNotFoundError(
        f"expected {name} or {name}.bin in {folder}, found neither; give the folder of the "
        "unpacked CIFAR-10 python or binary archive"
    )


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels ``[N, 3072]`` uint8 and labels ``[N]`` of one file."""
    pixels, labels = (_read_binary if path.suffix == ".bin" else _read_pickle)(path)
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), PIXELS):
        raise ValueError(
            f"expected uint8 pixels of shape [{len(labels)}, {PIXELS}] in {path}, got "
            f"{pixels.dtype} of shape {list(pixels.shape)}; unpack the archive again"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < NUM_CLASSES:
        raise ValueError(
            f"expected labels 0 to 9 in {path}, got {labels.min()} to {labels.max()}; unpack the "
            "archive again"
        )
    return pixels, labels


def _read_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    content = load_plain_pickle(path, encoding="latin1")
    if not isinstance(content, dict) or not {"data", "labels"} <= set(content):
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"expected a mapping with data and labels in {path}, got {found}")
    return np.asarray(content["data"]), np.asarray(content["labels"])


def _read_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Records of one label byte and 3,072 pixel bytes."""
    raw = np.frombuffer(path.read_bytes(), np.uint8)
    if raw.size % (1 + PIXELS):
        raise ValueError(
            f"expected records of {1 + PIXELS} bytes in {path}, got {raw.size} bytes; copy the "
            "file again"
        )
    records = raw.reshape(-1, 1 + PIXELS)
    return records[:, 1:].copy(), records[:, 0].copy()
