"""One file of text embeddings: complete under its name, or not there.

    tokens    [sum of lengths, dim] bfloat16
    lengths   [prompts] int32
    owner     16 bytes: the checksum of the store's header; a shard of another store is refused
    checksum  16 bytes: BLAKE2b of all bytes before

All numbers are little-endian.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mfd_fast.files.whole import written

CHECKSUM_BYTES = 16
TOKEN_BYTES, LENGTH_BYTES = 2, 4  # of a bfloat16, of an int32
READ_BYTES = 1 << 22  # at a time, when a checksum is compared


@contextmanager
def writing(path: Path, *, owner: bytes, dim: int) -> Iterator[Callable[[Tensor, Tensor], None]]:
    """Gives what appends embeddings ``[B, L, dim]`` with a mask ``[B, L]`` bool, real tokens first,
    to the file, which appears when all went well.

    ``ValueError`` for another dim, a mask with gaps, or values that are not finite.
    """
    checksum, lengths = blake2b(digest_size=CHECKSUM_BYTES), []

    def write(data: bytes) -> None:
        file.write(data)
        checksum.update(data)

    def add(text: Tensor, mask: Tensor) -> None:
        sizes = mask.sum(1)
        is_first = torch.arange(mask.shape[1], device=mask.device) < sizes[:, None]
        if text.shape != (*mask.shape, dim) or not mask.equal(is_first):
            raise ValueError(
                f"expected embeddings [B, L, {dim}] with real tokens first; got "
                f"{list(text.shape)} and a mask {list(mask.shape)}"
            )
        tokens = text[mask].to("cpu", torch.bfloat16)
        if not tokens.isfinite().all():
            raise ValueError(
                "the text encoder gave values that are not finite; use another --dtype"
            )
        write(tokens.view(torch.int16).numpy().astype("<i2", copy=False).tobytes())
        lengths.append(sizes.cpu().numpy().astype("<i4"))

    with written(path) as part, part.open("wb") as file:
        yield add
        write(np.concatenate(lengths).tobytes() + owner)
        file.write(checksum.digest())


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
    """The file as rows of ``dim`` values, bit for bit bfloat16; read when they are looked at."""
    rows = path.stat().st_size // (TOKEN_BYTES * dim)  # the trailer may fill some of the last
    return np.memmap(path, dtype="<i2", mode="r", shape=(rows, dim))
