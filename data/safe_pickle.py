"""Reads pickles of NumPy arrays without running them.

A pickle is a program; only its number arrays and plain containers are read, and nothing it names is called.
"""

# mypy: disable-error-code="attr-defined, dict-item"
# (the standard library's unpickler in Python is unknown to it)

import os
import pickle
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


def read_pickle(path: Path) -> Any:
    """What a pickle holds, of PickledArray, dict, list, tuple, str, bytes and numbers only.

    Raises ValueError, naming the file, if it holds anything else, refers to other code or is damaged."""
    try:
        with open(path, "rb") as file:
            return _Unpickler(_Bounded(file)).load()
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a hostile pickle can provoke any exception
        raise ValueError(f"{path}: not a pickle of arrays ({type(error).__name__}: {str(error)[:300]}); "
                         "expected a complete file of NumPy arrays in dicts and lists") from error


def describe(value: Any) -> str:
    """Type and shape of a value, never its contents: those are the file's, and may be without end."""
    if isinstance(value, PickledArray):
        return f"an array {value.values.dtype} {value.values.shape}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, list | tuple) else "")


class PickledArray:
    """Stand-in for numpy.ndarray while unpickling; `values` is a view of the bytes in the file.

    NumPy's own reconstruction is not used: it allocates whatever shape the file asks for."""

    def __init__(self, *reconstruct: Any):
        self.values = np.empty(0)

    def __setstate__(self, state: tuple) -> None:
        # NumPy's state: version, shape, type, whether columns come first, bytes.
        _, shape, dtype, fortran, raw = state
        self.values = np.frombuffer(raw, dtype.value).reshape(shape, order="F" if fortran else "C")


class _PickledDtype:
    """Stand-in for numpy.dtype: plain numbers only."""

    def __init__(self, code: str, *flags: Any):
        # Neither objects, whose bytes are addresses in memory, nor text nor records.
        if not re.fullmatch(r"b1|[iu][1248]|f[248]", code):
            raise pickle.UnpicklingError(f"an array of type {code!r}, expected numbers")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.value = self.value.newbyteorder(state[1])


def _from_buffer(raw: bytes, dtype: _PickledDtype, shape: tuple[int, ...], order: str) -> PickledArray:
    """An array as protocol 5 writes it."""
    array = PickledArray()
    array.__setstate__((1, shape, dtype, order == "F", raw))
    return array


def _encode(text: str, encoding: str) -> bytes:
    """Bytes as protocol 2 writes them."""
    if encoding != "latin1":
        raise pickle.UnpicklingError("bytes in an encoding other than latin1")
    return text.encode("latin1")


ADMITTED = {
    # Passed to `_reconstruct`, which ignores it: a string cannot be called.
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): _PickledDtype,
    ("_codecs", "encode"): _encode,
}
for _core in ("numpy.core", "numpy._core"):  # before NumPy 2, and since
    ADMITTED[f"{_core}.multiarray", "_reconstruct"] = PickledArray
    ADMITTED[f"{_core}.numeric", "_frombuffer"] = _from_buffer
OPCODES = [getattr(pickle, name) for name in (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 "
    "EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS "
    "PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD"
).split()]


class _Unpickler(pickle._Unpickler):
    """The standard library's unpickler in Python, cut down to what number arrays need.

    The one in C reserves memory for any memo index or length a file names, sets attributes of any object and
    hashes any key (nested tuples: without end); in Python each of these is a method that can be narrowed."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not part of an array")
        return ADMITTED[module, name]

    def load_build(self) -> None:
        state = self.stack.pop()
        # The standard library would set attributes of any object here.
        if not isinstance(self.stack[-1], (PickledArray, _PickledDtype)):
            raise pickle.UnpicklingError("it sets the state of something that is not an array")
        self.stack[-1].__setstate__(state)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set(items)

    def _set(self, items: list) -> None:
        # strict: an odd number of items means a damaged file.
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str) or not isinstance(self.stack[-1], dict):
                raise pickle.UnpicklingError(f"{describe(key)} as key, expected dicts with text as keys")
            self.stack[-1][key] = value

    def load_bytearray8(self) -> None:
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    # An opcode that is not listed raises a KeyError, which `read_pickle` reports.
    dispatch = {opcode[0]: pickle._Unpickler.dispatch[opcode[0]] for opcode in OPCODES}
    dispatch |= {pickle.BUILD[0]: load_build, pickle.DICT[0]: load_dict, pickle.SETITEM[0]: load_setitem,
                 pickle.SETITEMS[0]: load_setitems, pickle.BYTEARRAY8[0]: load_bytearray8}


class _Bounded:
    """A file that refuses a read beyond its end before any memory is set aside for it."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._left = os.fstat(file.fileno()).st_size

    def read(self, count: int) -> bytes:
        if count > self._left:
            raise EOFError(f"{count} bytes announced, {self._left} left: the file is cut short or damaged")
        self._left -= count
        return self._file.read(count)

    def readline(self) -> bytes:
        line = self._file.readline()
        self._left -= len(line)
        return line
