"""Pickles of numpy arrays and plain containers, read without running anything that they name.

A pickle may name any callable and have it run.  Here every name that numpy uses is replaced by a
class of this file, which keeps the bytes and builds the array itself; every other name is refused.
numpy's own unpickling is not called either: a forged dtype makes it read foreign memory.
"""

import math
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

NUMBER_KINDS = "biuf"  # bool, signed, unsigned, float
PICKLE_ERRORS = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    TypeError,
    IndexError,
    KeyError,
    ValueError,
    OverflowError,
    MemoryError,
)


class PickledArray:
    """The bytes of an array from a pickle; ``np.asarray`` makes it an array without a copy.

    An array that nobody converts costs nothing, and need not be one of numbers.
    """

    __slots__ = ("dtype", "order", "raw", "shape")

    def __init__(self, *_subtype_shape_and_code: Any):
        """``numpy._core.multiarray._reconstruct``: an empty shell until the state arrives."""
        self.__setstate__((1, (0,), PickledDtype("b1"), False, b""))

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.dtype, fortran, self.raw = state
        if isinstance(self.raw, str):  # bytes in a pickle of Python 2, read as latin1
            self.raw = self.raw.encode("latin1")
        self.order = "F" if fortran else "C"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        own = self.dtype.numbers()
        if not isinstance(self.raw, (bytes, bytearray)):
            raise ValueError(f"an array holds {type(self.raw).__name__} instead of its bytes")
        if math.prod(self.shape) * own.itemsize != len(self.raw):
            raise ValueError(
                f"an array of shape {list(self.shape)} and type {own} needs "
                f"{math.prod(self.shape) * own.itemsize} bytes, found {len(self.raw)}"
            )
        array = np.frombuffer(self.raw, own).reshape(self.shape, order=self.order)
        return np.array(array, dtype, copy=copy)


class BufferArray(PickledArray):
    """``numpy._core.numeric._frombuffer``: how pickle protocol 5 spells an array."""

    __slots__ = ()

    def __init__(self, raw: bytes, dtype: "PickledDtype", shape: tuple, order: str, *_axes: Any):
        self.__setstate__((1, shape, dtype, order == "F", raw))


class ScalarArray(PickledArray):
    """``numpy._core.multiarray.scalar``: one number, as an array of shape ``()``."""

    __slots__ = ()

    def __init__(self, dtype: "PickledDtype", raw: bytes = b""):
        self.__setstate__((1, (), dtype, False, raw))


class PickledDtype:
    """``numpy.dtype``: only its code and byte order are kept."""

    __slots__ = ("byte_order", "code")

    def __init__(self, code: str, *_align_and_copy: Any):
        self.code, self.byte_order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.byte_order = state[1]

    def numbers(self) -> np.dtype:
        """The numpy dtype; ``ValueError`` unless it is one of numbers."""
        if self.code[:1] not in NUMBER_KINDS or not self.code[1:].isdigit():
            raise ValueError(f"an array holds values of type {self.code!r} instead of numbers")
        return np.dtype(self.code).newbyteorder(self.byte_order.replace("|", "="))


def latin1_bytes(text: str, encoding: str) -> bytes:
    """``_codecs.encode``: how old pickle protocols spell bytes."""
    if encoding != "latin1":
        raise ValueError(f"bytes are spelled in {encoding!r} instead of 'latin1'")
    return text.encode(encoding)


NUMPY_NAMES = {
    "ndarray": PickledArray,
    "_reconstruct": PickledArray,
    "_frombuffer": BufferArray,
    "scalar": ScalarArray,
    "dtype": PickledDtype,
}
NUMPY_MODULES = {
    "numpy": ("ndarray", "dtype"),
    "numpy.core.multiarray": ("_reconstruct", "scalar"),
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
    "numpy.core.numeric": ("_frombuffer",),
    "numpy._core.numeric": ("_frombuffer",),
}
ALLOWED = {
    f"{module}.{name}": NUMPY_NAMES[name]
    for module, names in NUMPY_MODULES.items()
    for name in names
} | {
    "_codecs.encode": latin1_bytes,
    "collections.OrderedDict": OrderedDict,
    **{
        f"{module}.{kind.__name__}": kind
        for module in ("builtins", "__builtin__")
        for kind in (set, frozenset, bytes, bytearray)
    },
}


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[f"{module}.{name}"]
        except KeyError:
            raise _ForbiddenNameError(f"{module}.{name}") from None


class _ForbiddenNameError(Exception):
    """The pickle names something that is not on the list."""


def load_plain_pickle(path: str | Path, *, encoding: str = "ASCII") -> Any:
    """What the pickle holds; its arrays are :class:`PickledArray`, everything else is plain Python.

    Args:
        encoding: of strings written by Python 2; ``"latin1"`` where they stand for bytes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, not a pickle, or names anything but numpy arrays, numbers and
            plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a pickle at {path}, found none; check the path")
    try:
        with path.open("rb") as file:
            return _RestrictedUnpickler(file, encoding=encoding).load()
    except _ForbiddenNameError as error:
        raise ValueError(
            f"expected only numpy arrays and plain containers in {path}, got the name {error}, "
            "which would run code; nothing of it was run. Get the file again from its source"
        ) from None
    except PICKLE_ERRORS as error:
        raise ValueError(
            f"expected a complete pickle at {path}, got {path.stat().st_size} bytes that do not "
            f"read as one ({type(error).__name__}: {error}); copy the file again"
        ) from error
