"""A folder of text embeddings on disk: only real tokens, memory-mapped, checksummed.

    STORE/header.json      what was encoded, by what, how; the number of prompts
    STORE/null.bin         a shard (text/shard.py) with the empty prompt alone
    STORE/shard-00000.bin  the first ``shard_size`` prompts, and so on

An interrupted store holds the first shards and nothing else that counts; writing goes on after
them and ends with the bytes it would have had without the interruption.
"""

import fcntl
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mfd_fast.files.plain import read_json
from mfd_fast.files.whole import WRITING, clean, write_text
from mfd_fast.models.sana.text.prompts import Prompts
from mfd_fast.models.sana.text.shard import (
    CHECKSUM_BYTES,
    map_tokens,
    read_lengths,
    verify_shard,
    writing,
)

FORMAT = 1
HEADER, NULL = "header.json", "null.bin"


class TextEncoder(Protocol):
    """What turns prompts into embeddings."""

    def describe(self) -> dict[str, Any]:
        """What decides the embeddings, as JSON: checkpoint, template, ...; ``"dim"`` is needed."""
        ...

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings ``[B, L, dim]`` and mask ``[B, L]`` bool; real tokens come first."""
        ...

    def null(self) -> Tensor:
        """The real tokens of the empty prompt, ``[l, dim]``."""
        ...


class TextStore:
    """A complete store, opened for reading.

    Args:
        path: the folder.
        verify: compare the checksums of all bytes; otherwise the header's, every shard's size, and
            that it is of this store.

    Attributes:
        header: what ``header.json`` says.
        lengths: real tokens of every prompt, ``[N]`` int32 on the host.
        longest: the largest of them, the empty prompt's included.
        null: the empty prompt's tokens ``[l, dim]`` bfloat16.

    ``ValueError`` names the file that is broken, missing or of another store.
    """

    def __init__(self, path: str | Path, *, verify: bool = False):
        self.path = Path(path)
        self.header = read_header(self.path)
        self._dim, self._shard_size = self.header["encoder"]["dim"], self.header["shard_size"]
        there = {file.name for file in self.path.iterdir() if file.is_file()}
        num_shards = 1 + -(-self.header["prompts"]["count"] // self._shard_size)
        missing = next((n for n in map(shard_name, range(num_shards - 1)) if n not in there), None)
        if missing or NULL not in there:
            held = len(there & {NULL, *map(shard_name, range(min(num_shards, len(there))))})
            raise ValueError(
                f"{self.path} is not complete: {num_shards - held} of {num_shards} shards are "
                f"missing, {missing or NULL} first; repeat mfd-fast encode-prompts to go on"
            )
        shards = shard_sizes(self.header)
        lengths = [_lengths(self.path / name, n, self.header) for name, n in shards.items()]
        if verify:
            for name in shards:
                verify_shard(self.path / name)
        self._starts = np.concatenate([np.cumsum(part) - part for part in lengths[1:]])
        self._tokens: dict[str, np.ndarray] = {}
        self.lengths = np.concatenate(lengths[1:])
        self.longest = int(max(part.max() for part in lengths))
        null = map_tokens(self.path / NULL, self._dim)[: lengths[0][0]]
        self.null = torch.from_numpy(null.astype(np.int16)).view(torch.bfloat16)

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: Sequence[int], length: int | None = None) -> dict[str, Tensor]:
        """``{"text": [B, L, dim] bfloat16, "mask": [B, L] bool}`` on the host.

        L is ``length``, or the longest of these prompts and the empty one; padding is zeros.
        ``ValueError`` if a prompt is longer than ``length``.
        """
        wanted = [int(self.lengths[index]) for index in indices]
        length = max(*wanted, len(self.null)) if length is None else length
        check_fits(max(wanted), length)
        text = torch.zeros(len(wanted), length, self._dim, dtype=torch.bfloat16)
        rows = text.view(torch.int16).numpy()
        for row, index, size in zip(rows, indices, wanted, strict=True):
            start = self._starts[index]
            row[:size] = self._map(shard_name(index // self._shard_size))[start : start + size]
        return {"text": text, "mask": torch.arange(length) < torch.tensor(wanted)[:, None]}

    def _map(self, name: str) -> np.ndarray:
        if name not in self._tokens:
            self._tokens[name] = map_tokens(self.path / name, self._dim)
        return self._tokens[name]


def check_fits(longest: int, length: int) -> None:
    """``ValueError`` if a prompt has more tokens than there is room for."""
    if longest > length:
        raise ValueError(
            f"the text length is {length}, but a prompt has {longest} tokens; make it at least that"
        )


def write_text_store(
    path: str | Path,
    prompts: Prompts,
    encoder: TextEncoder,
    *,
    batch: int,
    shard_size: int,
    progress: Callable[[int], Any] = lambda count: None,
) -> TextStore:
    """Encode all prompts into a store, or go on with one that was interrupted.

    Args:
        path: a new or empty folder, or the store of these prompts, encoder, batch and shard size.
        batch: prompts in one call of the encoder.  It is recorded, because the bits that an encoder
            gives may depend on it.
        shard_size: prompts in one file; at most these are encoded again after an interruption.
        progress: called with the number of prompts done since its last call.

    ``ValueError`` if the folder holds something else, or the encoder gives other embeddings now.
    """
    path = Path(path)
    header = _sealed(
        {
            "format": FORMAT,
            "dtype": "bfloat16",
            "prompts": {"count": len(prompts), "digest": prompts.digest},
            "encoder": encoder.describe(),
            "batch": batch,
            "shard_size": shard_size,
        }
    )
    _begin(path, header)
    with _locked(path):
        _write_null(path, header, encoder.null())
        for number, (name, size) in enumerate(list(shard_sizes(header).items())[1:]):
            if (path / name).is_file():
                _lengths(path / name, size, header)
                progress(size)
                continue
            end = number * shard_size + size
            with writing(path / name, **_identity(header)) as add:
                for start in range(number * shard_size, end, batch):
                    chunk = prompts[start : min(start + batch, end)]
                    add(*encoder.encode(chunk))
                    progress(len(chunk))
    return TextStore(path)


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.bin"


def shard_sizes(header: dict[str, Any]) -> dict[str, int]:
    """The files of a store with their numbers of prompts, the empty one's first."""
    count, size = header["prompts"]["count"], header["shard_size"]
    starts = range(0, count, size)
    return {NULL: 1} | {
        shard_name(number): min(size, count - start) for number, start in enumerate(starts)
    }


def read_header(path: Path) -> dict[str, Any]:
    """``header.json`` of a store; ``ValueError`` if it is missing, broken or of another format."""
    file = path / HEADER
    if not file.is_file():
        raise ValueError(
            f"{path} is no text store: it has no {HEADER}. mfd-fast encode-prompts makes one"
        )
    try:
        header = read_json(file)
        is_whole = header == _sealed(header)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is broken ({error}); encode the prompts again") from None
    if not is_whole or header.get("format") != FORMAT or not _has_counts(header):
        raise ValueError(
            f"{file} is broken or of another format than {FORMAT}; encode the prompts again"
        )
    return header


def _has_counts(header: dict[str, Any]) -> bool:
    try:
        counts = (header["prompts"]["count"], header["shard_size"], header["encoder"]["dim"])
    except (KeyError, TypeError):
        return False
    return all(type(count) is int and count > 0 for count in counts)


def _sealed(header: dict[str, Any]) -> dict[str, Any]:
    """The header with its checksum."""
    content = {key: value for key, value in header.items() if key != "checksum"}
    data = json.dumps(content, sort_keys=True).encode()
    return content | {"checksum": blake2b(data, digest_size=CHECKSUM_BYTES).hexdigest()}


def _begin(path: Path, header: dict[str, Any]) -> None:
    """Make the folder with its header, or check that it is this store."""
    path.mkdir(parents=True, exist_ok=True)
    if (path / HEADER).is_file():
        there = read_header(path)
        if differing := _differing(header, there):
            raise ValueError(
                f"{path} holds a store with other {differing}; choose another folder with --out, "
                "or delete that one"
            )
        return
    names = (file.name for file in path.iterdir())
    if others := sorted(name for name in names if not name.startswith(WRITING)):
        raise ValueError(
            f"{path} holds other files ({others[0]}, ...); choose another folder with --out"
        )
    write_text(path / HEADER, json.dumps(header, indent=1))


def _differing(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """The keys, of both levels, with other values."""
    keys = [key for key in ours if key != "checksum" and ours[key] != theirs.get(key)]
    parts = []
    for key in keys:
        if isinstance(ours[key], dict) and isinstance(theirs.get(key), dict):
            parts += [f"{key}.{name}" for name in _differing(ours[key], theirs[key])]
        else:
            parts.append(key)
    return parts


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with (path / HEADER).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path} is being written by another process; wait for it") from None
        clean(path)
        yield


def _identity(header: dict[str, Any]) -> dict[str, Any]:
    """What a shard knows of its store."""
    return {"owner": bytes.fromhex(header["checksum"]), "dim": header["encoder"]["dim"]}


def _lengths(path: Path, prompts: int, header: dict[str, Any]) -> np.ndarray:
    return read_lengths(path, prompts=prompts, **_identity(header))


def _write_null(path: Path, header: dict[str, Any], null: Tensor) -> None:
    """Write the empty prompt, or compare it: that tells another encoder at little cost."""
    if not (path / NULL).is_file():
        with writing(path / NULL, **_identity(header)) as add:
            add(null[None], torch.ones(1, len(null), dtype=torch.bool, device=null.device))
        return
    length = int(_lengths(path / NULL, 1, header)[0])
    there = map_tokens(path / NULL, null.shape[1])[:length]
    ours = null.to("cpu", torch.bfloat16).view(torch.int16).numpy()
    if not np.array_equal(there, ours):
        raise ValueError(
            f"{path} was begun by an encoder that gives other embeddings for the empty prompt "
            "(other weights, device or version); use that one, or choose another folder with --out"
        )
