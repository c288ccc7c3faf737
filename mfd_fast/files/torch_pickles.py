"""Files that ``torch.save`` wrote, mapped by torch once what they name was looked at.

``torch.load(weights_only=True)`` runs no code, and with ``mmap=True`` a file's tensors are never
more than its bytes; but a ``bytearray`` may be of any length, and a deflated record of any content.
So the pickle is first gone through without making anything.
"""

import zipfile
from pathlib import Path
from typing import Any

import torch

from mfd_fast.files.pickles import PICKLE_ERRORS, ForbiddenNameError, PlainUnpickler

ELEMENT_BYTES = {
    **{"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Untyped": 1},
    **{"Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1},
}
MAX_REASON = 300  # characters of torch's own message


def load_torch_file(path: str | Path) -> Any:
    """Tensors on the CPU in plain containers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is incomplete, older than torch 1.6, names anything else (the name and its
            keys are told), or claims more than it holds.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint at {path}, found none; check the path")
    try:
        _check(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except ForbiddenNameError as error:
        raise ValueError(
            f"{path} is refused: a checkpoint may hold tensors and plain containers only, and this "
            f"one names {error}; write it again without that"
        ) from None
    except (*PICKLE_ERRORS, RuntimeError, OSError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[-MAX_REASON:]
        raise ValueError(
            f"{path}, {path.stat().st_size} bytes, does not read as a complete checkpoint of torch "
            f"1.6 or later ({reason}); copy it again, or load and save it with a newer torch"
        ) from error


def _check(path: Path) -> None:
    """Go through the pickle; raises if it names or claims what it should not."""
    with zipfile.ZipFile(path) as archive:
        records = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        if len(records) != len(archive.infolist()) or "data.pkl" not in records:
            raise ValueError("it has no data.pkl, or two files of one name")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in records.values()):
            raise ValueError("its files are compressed, which torch.save does not do")
        with archive.open(records["data.pkl"]) as file:
            unpickler = _TorchUnpickler(file, records["data.pkl"].file_size, encoding="latin1")
            unpickler.storages = {}
            unpickler.load()
    for key, claimed in unpickler.storages.items():
        held = records[f"data/{key}"].file_size
        if claimed > held:
            raise ValueError(f"data/{key} has {held} bytes where {claimed} are claimed")


class _TorchUnpickler(PlainUnpickler):
    """Makes nothing of storages and tensors.

    Attributes:
        storages: bytes claimed for each, by its key.
    """

    storages: dict[str, int]

    def persistent_load(self, pid: Any) -> None:
        kind, element_bytes, key, _, numel = pid
        if kind != "storage" or type(element_bytes) is not int or type(numel) is not int:
            raise ValueError("it refers to something else than storages")
        self.storages[key] = max(self.storages.get(key, 0), element_bytes * numel)

    def _own(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return ELEMENT_BYTES.get(name.removesuffix("Storage"))
        if module.startswith("numpy"):
            return None
        made = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
        return {
            **{f"torch._utils.{function}": _nothing for function in made},
            "torch.Size": tuple,
            "collections.Counter": dict,
        }.get(f"{module}.{name}") or super()._own(module, name)


def _nothing(*_: Any) -> None:
    """What a tensor is here."""
