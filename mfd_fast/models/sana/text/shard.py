"""One file of text embeddings: complete under its name, or not there.

    tokens    [sum of lengths, dim] bfloat16
    lengths   [prompts] int32
    owner     16 bytes: the checksum of the store's header; a shard of another store is refused
    checksum  16 bytes: BLAKE2b of all bytes before

All numbers are little-endian.
"""

import os
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

CHECKSUM_BYTES = 16
TOKEN_BYTES, LENGTH_BYTES = 2, 4  # of a bfloat16, of an int32
READ_BYTES = 1 << 22  # at a time, when a checksum is compared
PART = ".part"  # ends the name of a file that is being written


class ShardWriter:
    """Context manager: writes batches to the file, which appears when all went well."""

    def __init__(self, path: Path, *, owner: bytes, dim: int):
        self.path, self.owner, self.dim = path, owner, dim
        self._part = path.with_name(path.name + PART)
        self._checksum = blake2b(digest_size=CHECKSUM_BYTES)
        self._lengths: list[np.ndarray] = []

    def __enter__(self) -> "ShardWriter":
        self._file = self._part.open("wb")
        return self

    def add(self, text: Tensor, mask: Tensor) -> None:
        """Append ``[B, L, dim]`` embeddings; mask ``[B, L]`` bool, real tokens first.

        ``ValueError`` for another dim, a mask with gaps, or numbers that are not finite.
        """
        lengths = mask.sum(1)
        is_first = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
        if text.shape != (*mask.shape, self.dim) or not mask.equal(is_first):
            raise ValueError(
                f"expected embeddings [B, L, {self.dim}] with real tokens first; got "
                f"{list(text.shape)} and a mask {list(mask.shape)}"
            )
        tokens = text[mask].to("cpu", torch.bfloat16)
        if not tokens.isfinite().all():
            raise ValueError(
                "the text encoder gave numbers that are not finite; use another --dtype"
            )
        self._write(tokens.view(torch.int16).numpy().astype("<i2", copy=False).tobytes())
        self._lengths.append(lengths.cpu().numpy().astype("<i4"))

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self._write(np.concatenate(self._lengths).tobytes() + self.owner)
            self._file.write(self._checksum.digest())
            publish(self._file, self._part, self.path)
        else:
            self._file.close()
            self._part.unlink()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._checksum.update(data)


def publish(file: Any, part: Path, path: Path) -> None:
    """Close a file and give it its name once its bytes are on the disk."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def read_lengths(path: Path, *, prompts: int, owner: bytes, dim: int) -> np.ndarray:
    """Real tokens of every prompt, ``[prompts]`` int32.

    ``ValueError`` if the file has another size than they ask for, or belongs to another store.
    """
    size = path.stat().st_size
    trailer = prompts * LENGTH_BYTES + 2 * CHECKSUM_BYTES
    with path.open("rb") as file:
        file.seek(max(0, size - trailer))
        data = file.read()
    lengths = np.frombuffer(data[: prompts * LENGTH_BYTES], dtype="<i4") if size >= trailer else []
    tokens = int(np.sum(lengths, dtype=np.int64)) if np.all(np.asarray(lengths) > 0) else -1
    if size < trailer or size != tokens * dim * TOKEN_BYTES + trailer:
        raise ValueError(f"{path} is broken: {size} bytes do not fit its {prompts} prompts{_MEND}")
    if data[-2 * CHECKSUM_BYTES : -CHECKSUM_BYTES] != owner:
        raise ValueError(f"{path} belongs to another store, or is broken{_MEND}")
    return lengths


_MEND = "; delete this file and repeat mfd-fast encode-prompts"


def verify_shard(path: Path) -> None:
    """Compare the checksum of the whole file; ``ValueError`` if a bit differs."""
    left = path.stat().st_size - CHECKSUM_BYTES
    checksum = blake2b(digest_size=CHECKSUM_BYTES)
    with path.open("rb") as file:
        while left > 0 and (data := file.read(min(left, READ_BYTES))):
            checksum.update(data)
            left -= len(data)
        if file.read() != checksum.digest():
            raise ValueError(f"{path} is broken: its checksum differs{_MEND}")


def map_tokens(path: Path, dim: int) -> np.ndarray:
    """The file as rows of ``dim`` numbers, bit for bit bfloat16; read when they are looked at."""
    rows = path.stat().st_size // (TOKEN_BYTES * dim)  # the trailer may fill some of the last
    return np.memmap(path, dtype="<i2", mode="r", shape=(rows, dim))
