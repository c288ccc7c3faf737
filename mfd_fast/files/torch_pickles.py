"""Files that ``torch.save`` wrote, read by torch once what they name and claim was looked at.

``torch.load(weights_only=True)`` runs no code, yet it makes room for whatever a file claims: for a
``bytearray`` of any length, a storage of any size in the old format, a tensor larger than its
storage, a deflated record.  So the pickle is first gone through without making anything.
"""

import math
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from mfd_fast.files.pickles import PICKLE_ERRORS, ForbiddenNameError, PlainUnpickler

ZIP_MAGIC = b"PK\x03\x04"  # what torch.load tells the formats by
PREAMBLES = 3  # pickles before the one of interest in the old format: magic, version, system
ELEMENT_BYTES = {
    **{"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Untyped": 1},
    **{"Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1},
}
MAX_REASON = 300  # characters of torch's own message


class _Storage(NamedTuple):
    element_bytes: int
    numel: int


def load_torch_file(path: str | Path) -> Any:
    """Tensors on the CPU in plain containers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is incomplete, names anything else (the name and its keys are told), or
            claims more than it holds.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint at {path}, found none; check the path")
    try:
        _check(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ForbiddenNameError as error:
        raise ValueError(
            f"{path} is refused: a checkpoint may hold tensors and plain containers only, and this "
            f"one names {error}; write it again without that"
        ) from None
    except (*PICKLE_ERRORS, RuntimeError, OSError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[-MAX_REASON:]
        raise ValueError(
            f"{path}, {path.stat().st_size} bytes, does not read as a complete checkpoint "
            f"({reason}); copy it again"
        ) from error


def _check(path: Path) -> None:
    """Go through the pickle; raises if it names or claims what it should not."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(ZIP_MAGIC)) == ZIP_MAGIC:
            _check_zip(path)
            return
        file.seek(0)
        for _ in range(PREAMBLES):
            _TorchUnpickler(file, size - file.tell()).load()
        unpickler = _TorchUnpickler(file, size - file.tell())
        unpickler.load()
        if (claimed := sum(unpickler.storages.values())) > size:
            raise ValueError(f"its tensors claim {claimed} bytes")


def _check_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        if len(records) != len(archive.infolist()) or "data.pkl" not in records:
            raise ValueError("it has no data.pkl, or two files of one name")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in records.values()):
            raise ValueError("its files are compressed, which torch.save does not do")
        entry = records["data.pkl"]
        with archive.open(entry) as file:
            unpickler = _TorchUnpickler(file, entry.file_size)
            unpickler.load()
        for key, claimed in unpickler.storages.items():
            held = records[f"data/{key}"].file_size
            if claimed > held:
                raise ValueError(f"data/{key} has {held} bytes where {claimed} are claimed")


class _TorchUnpickler(PlainUnpickler):
    """Makes storages of nothing, and nothing of tensors.

    Attributes:
        storages: bytes claimed for each, by its key.
    """

    def __init__(self, file: BinaryIO, size: int):
        super().__init__(file, size, encoding="latin1")
        self.storages: dict[str, int] = {}

    def persistent_load(self, pid: Any) -> _Storage:
        kind, element_bytes, key, _, numel, *view = pid
        if kind != "storage" or type(element_bytes) is not int or type(numel) is not int:
            raise pickle.UnpicklingError("it refers to something else than storages")
        if view and view[0] is not None:  # of the old format: a part of a storage
            numel = max(numel, sum(view[0][1:]))
        self.storages[key] = max(self.storages.get(key, 0), element_bytes * numel)
        return _Storage(element_bytes, numel)

    def _own(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return ELEMENT_BYTES.get(name.removesuffix("Storage"))
        if module.startswith("numpy"):
            return None
        return {
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": self._parameter,
            "torch.Size": tuple,
            "collections.Counter": dict,
        }.get(f"{module}.{name}") or super()._own(module, name)

    def _tensor(
        self, storage: _Storage, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any
    ) -> None:
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        is_outside = min(offset, *stride, 0) < 0 or last >= storage.numel
        if math.prod(size) != 0 and is_outside:
            raise ValueError(
                f"a tensor of shape {list(size)} is claimed of a storage of {storage.numel} numbers"
            )

    def _parameter(self, data: Any, *_: Any) -> Any:
        return data
