"""Pickles of numpy arrays and plain containers, read without running anything that they name.

A pickle may name any callable and have it run.  Here every name that numpy uses is replaced by a
function of this file, which keeps the bytes and builds the array itself; every other name is
refused.  numpy's own unpickling is not called either: a forged dtype makes it read foreign memory.

What a pickle claims takes no memory: Python's own unpickler is used in the version written in
Python, whose memo is a dict and whose reads end with the file (the one written in C makes room for
any index and any length); and what its calls copy, all together, is at most what the file has.
"""

import math
import pickle
import reprlib
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

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
    RecursionError,
)


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


class PickledArray:
    """The bytes of an array from a pickle; ``np.asarray`` makes it an array without a copy.

    An array that nobody converts costs nothing, and need not be one of numbers.
    """

    __slots__ = ("_encode", "dtype", "order", "raw", "shape")

    def __init__(self, encode: Callable[[str], bytes]):
        """An empty shell until the state arrives; ``encode`` makes the bytes of Python 2's str."""
        self._encode = encode
        self.__setstate__((1, (0,), PickledDtype("b1"), False, b""))

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.dtype, fortran, self.raw = state
        if isinstance(self.raw, str):  # bytes in a pickle of Python 2, read as latin1
            self.raw = self._encode(self.raw)
        self.order = "F" if fortran else "C"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        own = self.dtype.numbers()
        if not isinstance(self.raw, (bytes, bytearray)):
            raise ValueError(f"an array holds {type(self.raw).__name__} instead of its bytes")
        if not all(type(size) is int for size in self.shape):
            raise ValueError("the shape of an array is not one of whole numbers")
        if math.prod(self.shape) * own.itemsize != len(self.raw):
            raise ValueError(
                f"an array of shape {list(self.shape)} and type {own} needs "
                f"{math.prod(self.shape) * own.itemsize} bytes, found {len(self.raw)}"
            )
        array = np.frombuffer(self.raw, own).reshape(self.shape, order=self.order)
        return np.array(array, dtype, copy=copy)


class PlainUnpickler(pickle._Unpickler):
    """One pickle of ``size`` bytes at most of ``file``, from where that stands."""

    dispatch: ClassVar[dict[int, Callable]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: BinaryIO, size: int, *, encoding: str = "ASCII"):
        super().__init__(_Reader(file, size), encoding=encoding)
        self._left = size

    def find_class(self, module: str, name: str) -> Any:
        """What stands in for a global; ``ForbiddenNameError`` says where an unknown one is."""
        known = self._own(module, name)
        if known is None:
            raise ForbiddenNameError(f"{module}.{name}"[:200] + self._under())
        return known

    def _under(self) -> str:
        """The keys that lead to what is being made."""
        keys = []
        for part in (*self.metastack, self.stack):
            for left, (value, after) in zip(
                range(len(part) - 1, -1, -1), pairwise((*part, None)), strict=True
            ):
                is_open = isinstance(after, (dict, list)) and not after
                if isinstance(value, str) and (is_open or left < 2):  # a call's name is above
                    keys.append(reprlib.repr(value))
        return f" (under {' '.join(keys)})" if keys else ""

    def _own(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core", "numpy.core").replace("__builtin__", "builtins")
        return {
            "builtins.set": partial(self._container, set),
            "builtins.frozenset": partial(self._container, frozenset),
            "builtins.bytes": self._bytes,
            "builtins.bytearray": self._bytearray,
            "collections.OrderedDict": partial(self._container, OrderedDict),
            "_codecs.encode": self._bytes,
            "numpy.ndarray": PickledArray,
            "numpy.dtype": PickledDtype,
            "numpy.core.multiarray._reconstruct": self._shell,
            "numpy.core.multiarray.scalar": self._scalar,
            "numpy.core.numeric._frombuffer": self._from_buffer,
        }.get(f"{module}.{name}")

    def _spend(self, value: Any, *kinds: type) -> Any:
        """``value``, which is about to be copied: of one of the kinds, and not over the budget."""
        if not isinstance(value, kinds):
            raise ValueError(
                f"a container is to be made of a {type(value).__name__} in place of what it "
                f"holds{self._under()}"
            )
        self._left -= len(value)
        if self._left < 0:
            raise ValueError(f"its calls copy more than the file holds{self._under()}")
        return value

    def _bytes(self, value: Any = b"", encoding: str = "latin1") -> bytes:
        """``_codecs.encode``, ``bytes``: how old pickle protocols spell bytes."""
        if encoding not in ("latin1", "latin-1"):
            raise ValueError(f"bytes are spelled in {reprlib.repr(encoding)} instead of 'latin1'")
        value = self._spend(value, str, bytes, bytearray)
        return value.encode("latin1") if isinstance(value, str) else bytes(value)

    def _bytearray(self, *value_and_encoding: Any) -> bytearray:
        return bytearray(self._bytes(*value_and_encoding))

    def _container(self, kind: type, values: Any = ()) -> Any:
        return kind(self._spend(values, list, tuple))

    def _shell(self, *_subtype_shape_and_code: Any) -> PickledArray:
        """``_reconstruct``."""
        return PickledArray(self._bytes)

    def _from_buffer(
        self, raw: bytes, dtype: PickledDtype, shape: tuple, order: str, *_axes: Any
    ) -> PickledArray:
        """``_frombuffer``: how pickle protocol 5 spells an array."""
        array = self._shell()
        array.__setstate__((1, shape, dtype, order == "F", raw))
        return array

    def _scalar(self, dtype: PickledDtype, raw: Any = b"") -> Any:
        """One number, as an array of shape ``()``; or a ``numpy.str_``, as str."""
        if dtype.code[:1] == "U":
            big = dtype.byte_order == ">"
            return self._bytes(raw).decode("utf-32-be" if big else "utf-32-le").rstrip("\0")
        array = self._shell()
        array.__setstate__((1, (), dtype, False, raw))
        return array

    def _build(self) -> None:
        """State for what was made here; attributes of anything else are dropped."""
        state = self.stack.pop()
        if isinstance(made := self.stack[-1], (PickledArray, PickledDtype)):
            made.__setstate__(state)

    def _bytearray8(self) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.BYTEARRAY8[0]] = _bytearray8


class _Reader:
    """At most ``size`` bytes of a file; a request for more than is there makes no room for it."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._end = file, file.tell() + size

    def read(self, count: int) -> bytes:
        if count > (left := self._end - self._file.tell()):
            raise EOFError(f"{count} bytes are announced where {left} are left")
        return self._file.read(count)

    def readline(self) -> bytes:
        return self._file.readline(max(0, self._end - self._file.tell()))


class ForbiddenNameError(Exception):
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
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            return PlainUnpickler(file, size, encoding=encoding).load()
    except ForbiddenNameError as error:
        raise ValueError(
            f"expected only numpy arrays and plain containers in {path}, got the name {error}, "
            "which would run code; nothing of it was run. Get the file again from its source"
        ) from None
    except PICKLE_ERRORS as error:
        raise ValueError(
            f"expected a complete pickle at {path}, got {size} bytes that do not "
            f"read as one ({type(error).__name__}: {error}); copy the file again"
        ) from error
