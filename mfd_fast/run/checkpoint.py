"""What a checkpoint is on disk: complete or absent, verified or refused, and never a pickle.

    student-000030-aux-000150/
        state.json                        numbers, settings, and which tensor stands where
        tensors-00000-of-00001.safetensors    one file a rank that holds something of its own
        manifest.json                     size and checksum of every file, and of itself

A checkpoint is written into a hidden folder, every file is synced, and one rename makes it appear.
``torch.distributed.checkpoint`` is not used: its metadata file is a pickle.  Sharded tensors are
pieces along dimension 0, one in every rank's file; whoever reads joins them.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass, replace
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file
from torch import Tensor

from mfd_fast.distill.ranks import is_sharded
from mfd_fast.files.whole import REMOVING, sync

STATE, MANIFEST = "state.json", "manifest.json"
FORMAT = 1
WRAPPERS = ("torchao.optim.",)  # modules whose tensors are made of plain ones, by torch's protocol
NAME = re.compile(r"student-(\d{6,})-aux-(\d{6,})")
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class DamagedCheckpointError(ValueError):
    """A checkpoint with a file that is missing, cut or changed; the message names the file."""


@dataclass(frozen=True, order=True)
class Counts:
    """The updates behind a checkpoint: they order checkpoints and name them."""

    student: int
    aux: int

    def __str__(self) -> str:
        return f"student-{self.student:06d}-aux-{self.aux:06d}"

    @staticmethod
    def of(path: Path) -> "Counts | None":
        """The counts in a checkpoint's name; None for any other name."""
        match = NAME.fullmatch(path.name)
        return Counts(*map(int, match.groups())) if match else None


def tensors_name(rank: int, world: int) -> str:
    """The tensor file of one rank."""
    return f"tensors-{rank:05d}-of-{world:05d}.safetensors"


@dataclass(frozen=True)
class Packed:
    """A state ready to be written: JSON, tensors every rank has alike, and this rank's pieces."""

    tree: Any
    whole: dict[str, Tensor]
    pieces: dict[str, Tensor]


def pack(tree: Any) -> Packed:
    """A tree of dicts, lists, tuples, numbers, strings and tensors, taken apart.

    The tensors are those of the tree, not copies; of a DTensor it is the local piece.
    ``ValueError`` names a leaf that fits neither JSON nor safetensors.
    """
    packed = Packed(None, {}, {})
    return replace(packed, tree=_pack(tree, "", packed))


def _pack(node: Any, path: str, packed: Packed) -> Any:
    if node is None or type(node) in (bool, int, float, str):
        return node
    if isinstance(node, dict):
        return {"dict": [[key, _pack(node[key], f"{path}/{key}", packed)] for key in node]}
    if isinstance(node, list | tuple):
        items = [_pack(item, f"{path}/{index}", packed) for index, item in enumerate(node)]
        return {type(node).__name__: items}
    name = path.lstrip("/")
    if isinstance(node, torch.dtype):
        return {"dtype": str(node).removeprefix("torch.")}
    if is_sharded(node) and len(node.placements) == 1 and node.placements[0].is_shard(dim=0):
        piece = node.to_local()
        if type(piece) is Tensor:
            packed.pieces[name] = piece
            return {"pieces": name}
    if type(node) in (Tensor, torch.nn.Parameter) and node.dtype in DTYPES:
        packed.whole[name] = node.detach()
        return {"tensor": name}
    if _class_name(node).startswith(WRAPPERS):
        names, context = node.__tensor_flatten__()
        parts = {"parts": {part: getattr(node, part) for part in names}, "context": context}
        return {"wrapped": [_class_name(node), _pack(parts, path, packed)]}
    raise ValueError(
        f"a checkpoint holds plain tensors, numbers and strings; {name} is a {type(node).__name__}"
        ". Leave it out of the state, or take an optimizer whose state is plain tensors (adamw)"
    )


def _class_name(node: Any) -> str:
    return f"{type(node).__module__}:{type(node).__qualname__}"


def _unwrapped(name: str, parts: dict[str, Any]) -> Tensor:
    """A tensor that is made of others again, such as moments of 8 bits with their scales."""
    if not name.startswith(WRAPPERS):
        raise ValueError(f"a checkpoint holds no objects of {name}; it was not written here")
    module, kind = name.split(":")
    cls = getattr(import_module(module), kind)
    return cls.__tensor_unflatten__(parts["parts"], parts["context"], None, None)


def unpack(node: Any, files: list[dict[str, Tensor]]) -> Any:
    """The tree that :func:`pack` was given, its tensors whole, from the files of all ranks."""
    if not isinstance(node, dict):
        return node
    ((kind, value),) = node.items()
    if kind == "dict":
        return {key: unpack(item, files) for key, item in value}
    if kind == "tensor":
        return files[0][value]
    if kind == "pieces":
        return torch.cat([file[value] for file in files])
    if kind == "dtype":
        return getattr(torch, value)
    if kind == "wrapped":
        return _unwrapped(value[0], unpack(value[1], files))
    items = [unpack(item, files) for item in value]
    return tuple(items) if kind == "tuple" else items


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write CPU tensors as safetensors, synced; the file's entry for the manifest.

    The format is a length, a JSON header and the bytes.  Written here so that the checksum is made
    in the same pass, and so that no lock of the interpreter is held: training goes on meanwhile.
    """
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    with path.open("wb", buffering=0) as file:
        digest = _Digest(file)
        digest.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            digest.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        os.fsync(file.fileno())
    return digest.entry()


def write_bytes(path: Path, data: bytes) -> dict[str, Any]:
    """Write a small file, synced; the file's entry for the manifest."""
    with path.open("wb", buffering=0) as file:
        digest = _Digest(file)
        digest.write(data)
        os.fsync(file.fileno())
    return digest.entry()


class _Digest:
    """Writes to a raw file and keeps size and checksum of what went through."""

    def __init__(self, file: BinaryIO):
        self.file, self.size, self.hash = file, 0, blake2b(digest_size=16)

    def write(self, data: bytes | memoryview) -> None:
        self.hash.update(data)
        rest = memoryview(data)
        while len(rest):  # a raw write may take less than it was given
            rest = rest[self.file.write(rest) :]
        self.size += len(data)

    def entry(self) -> dict[str, Any]:
        return {"bytes": self.size, "blake2b": self.hash.hexdigest()}


def manifest_bytes(entries: dict[str, Any], version: int) -> bytes:
    """The manifest of these files, with a checksum of itself."""
    body = {"format": version, "files": entries}
    checksum = blake2b(json.dumps(body).encode(), digest_size=16).hexdigest()
    return json.dumps({**body, "checksum": checksum}, indent=1).encode()


def commit(temporary: Path, final: Path, entries: dict[str, Any]) -> None:
    """Complete the hidden folder with its manifest and rename it; replaces a checkpoint there."""
    write_bytes(temporary / MANIFEST, manifest_bytes(entries, FORMAT))
    sync(temporary)
    if final.exists():
        remove(final)
    temporary.rename(final)
    sync(final.parent)


def remove(path: Path) -> None:
    """Remove a checkpoint; a kill half-way leaves a hidden folder, not half a checkpoint."""
    hidden = path.with_name(REMOVING + path.name)
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first; none if it does not exist."""
    found = [path for path in folder.glob("student-*") if Counts.of(path) and path.is_dir()]
    return sorted(found, key=Counts.of)


def verify(path: Path) -> None:
    """Read every byte; ``DamagedCheckpointError`` names the file that is not what was written."""
    for name, expected in _entries(path).items():
        try:
            with (path / name).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != expected["bytes"]:
                    raise _damaged(path, name, f"has {size} bytes, not {expected['bytes']}")
                digest = blake2b(digest_size=16)
                while block := file.read(1 << 22):
                    digest.update(block)
        except OSError as error:
            raise _damaged(path, name, f"cannot be read: {error.strerror}") from None
        if digest.hexdigest() != expected["blake2b"]:
            raise _damaged(path, name, "was changed: its checksum differs")


def _entries(path: Path) -> dict[str, dict[str, Any]]:
    """The manifest's entries; the manifest must be, byte for byte, one that was written here."""
    try:
        data = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise _damaged(path, MANIFEST, f"cannot be read: {error.strerror}") from None
    try:
        manifest = json.loads(data)
        version = manifest["format"]
        is_intact = manifest_bytes(manifest["files"], version) == data
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        is_intact = False
    if not is_intact:
        raise _damaged(path, MANIFEST, "was changed: its checksum differs")
    if version != FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {version}; this version reads {FORMAT}: continue with "
            "the version that wrote it"
        )
    return manifest["files"]


def _damaged(path: Path, name: str, what: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"the checkpoint {path} is damaged: {name} {what}")


def read(path: Path) -> Any:
    """The state in a checkpoint, on the CPU; ``DamagedCheckpointError`` if a byte changed."""
    verify(path)
    names = sorted(name for name in _entries(path) if name.endswith(".safetensors"))
    return unpack(json.loads((path / STATE).read_bytes()), [load_file(path / n) for n in names])


def read_header(path: Path) -> dict[str, Any]:
    """What a verified checkpoint tells besides its state, no tensor read."""
    state = dict(json.loads((path / STATE).read_bytes())["dict"])
    return unpack(state["header"], [])


def latest_good(
    folder: Path, *, before: Counts | None = None
) -> tuple[Path | None, list[DamagedCheckpointError]]:
    """The newest checkpoint that verifies, None if there is none; and what is wrong with newer
    ones.
    """
    damage = []
    for path in reversed(checkpoints_in(folder)):
        if before is not None and Counts.of(path) >= before:
            continue
        try:
            verify(path)
        except DamagedCheckpointError as error:
            damage.append(error)
        else:
            return path, damage
    return None, damage
