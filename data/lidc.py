"""The LIDC pickle: a folder of .pickle files, each {key: {"image", "masks", "series_uid"}}.

`image` is a float array (h, w) in [0, 1], `masks` a list of 4 arrays (h, w) of 0/1, `series_uid` a str.
A pickle is a program; only its number arrays and plain containers are read, and nothing it names is called.
"""

import os
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from data.cache import Writer

ANNOTATORS = 4
NAME_LENGTH = 1000


def source_files(source: Path) -> list[Path]:
    """The pickles of a folder by name, or the one given. Raises ValueError if there is none."""
    if source.is_file():
        return [source]
    found = sorted(path for path in source.iterdir() if path.suffix in (".pickle", ".pkl"))
    if not found:
        raise ValueError(f"{source}: no .pickle or .pkl file in this folder; expected the LIDC pickles "
                         "(for an .h5 file give the path of the file itself)")
    return found


def convert(files: Sequence[Path], writer: Writer) -> None:
    """Append every slice of the pickles to a cache, in their order; one file is in memory at a time.

    Images are quantised to 16 bits (error below 1e-5). Raises ValueError naming the file and key at fault."""
    file_of_key: dict[str, Path] = {}
    patient_of_series: dict[str, str] = {}
    shape: tuple[int, ...] = ()
    for file in files:
        bytes_left = file.stat().st_size
        for key, entry in tqdm(read_pickle(file).items(), desc=file.name, unit="slice", disable=None):
            where = f"{file}, key {key[:80]!r}"
            if not _is_name(key):
                raise ValueError(f"{where}: expected a key of 1 to {NAME_LENGTH} printable characters")
            if key in file_of_key:
                raise ValueError(f"{where}: also in {file_of_key[key]}; expected every key once")
            file_of_key[key] = file
            image, masks, series = _check(entry, where)
            shape = shape or image.shape
            if image.shape != shape:
                raise ValueError(f"{where}: image of shape {image.shape}, expected {shape} like the first")
            bytes_left -= image.nbytes
            if bytes_left < 0:  # else a small file could fill the disk by naming one image again and again
                raise ValueError(f"{where}: more image data than bytes in the file; is it forged?")
            named = _named_in(key)
            # A patient may have two series: the patient is the group if keys name it. No series is divided.
            patient = patient_of_series.setdefault(series, named.pop("patient", series))
            pixels = np.rint(image.astype(np.float64) * 65535).astype(np.uint16)
            writer.append(pixels, masks, patient=patient, id=key, **named)


def _is_name(text: Any) -> bool:
    return isinstance(text, str) and 1 <= len(text) <= NAME_LENGTH and text.isprintable()


def _named_in(key: str) -> dict[str, Any]:
    """Patient, nodule and slice of a key like 'LIDC-IDRI-0643_nodule00_slice000'; nothing of any other."""
    match = re.fullmatch(r"(LIDC-IDRI-\d{4})_nodule(\d{1,9})_slice(\d{1,9})", key, re.ASCII)
    return {"patient": match[1], "nodule": int(match[2]), "slice": int(match[3])} if match else {}


def _check(entry: Any, where: str) -> tuple[np.ndarray, np.ndarray, str]:
    """Image (h, w), masks (4, h, w) and series of one slice, or ValueError beginning with `where`."""
    if not isinstance(entry, dict) or not {"image", "masks", "series_uid"} <= set(entry):
        found = ", ".join(map(repr, entry)) if isinstance(entry, dict) else _describe(entry)
        raise ValueError(f"{where}: holds {found[:200]}; expected a dict with image, masks and series_uid")
    image, masks, series = entry["image"], entry["masks"], entry["series_uid"]
    if not isinstance(image, PickledArray) or image.values.ndim != 2 or image.values.size == 0:
        raise ValueError(f"{where}: image is {_describe(image)}, expected an array (h, w)")
    image = image.values
    if not (image.min() >= 0 and image.max() <= 1):  # NaN fails both comparisons
        raise ValueError(f"{where}: image from {image.min():.4g} to {image.max():.4g}, expected it in [0, 1]")
    if not isinstance(masks, (list, tuple)) or len(masks) != ANNOTATORS:
        found = f"{len(masks)} masks" if isinstance(masks, (list, tuple)) else f"masks as {_describe(masks)}"
        raise ValueError(f"{where}: {found}, expected a list of {ANNOTATORS}")
    for number, mask in enumerate(masks):
        if not isinstance(mask, PickledArray) or mask.values.shape != image.shape:
            raise ValueError(f"{where}: mask {number} is {_describe(mask)}, expected an array {image.shape}")
        if not np.isin(mask.values, (0, 1)).all():
            raise ValueError(f"{where}: mask {number} has values other than 0 and 1")
    if not _is_name(series):
        raise ValueError(f"{where}: series_uid is {_describe(series)}, expected 1 to {NAME_LENGTH} printable "
                         "characters")
    return image, np.stack([mask.values for mask in masks]).astype(np.uint8), series


def _describe(value: Any) -> str:
    """Type and shape of a value, never its contents: those are the file's, and may be without end."""
    if isinstance(value, PickledArray):
        return f"an array {value.values.dtype} {value.values.shape}"
    return f"a {type(value).__name__}"


def read_pickle(path: Path) -> dict[str, Any]:
    """The dict of a pickle that holds PickledArray, dict, list, tuple, str, bytes and numbers only.

    Raises ValueError, naming the file, if it holds anything else, refers to other code or is damaged."""
    try:
        with open(path, "rb") as file:
            found = _Unpickler(_Bounded(file)).load()
    except OSError:
        raise
    except Exception as error:  # a hostile pickle can provoke any exception
        raise ValueError(f"{path}: refused as a LIDC pickle ({type(error).__name__}: {str(error)[:300]}); "
                         "expected a complete file of NumPy arrays in dicts and lists") from error
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path}: holds {_describe(found)}, expected a dict of slices that is not empty")
    return found


class PickledArray:
    """Stand-in for numpy.ndarray while unpickling; `values` is a view of the bytes in the file.

    NumPy's own reconstruction is not used: it allocates whatever shape the file asks for."""

    def __init__(self, *reconstruct: Any):
        self.values = np.empty(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, raw = state
        self.values = np.frombuffer(raw, dtype.value).reshape(shape, order="F" if fortran else "C")


class _PickledDtype:
    """Stand-in for numpy.dtype: plain numbers only."""

    def __init__(self, code: str, *flags: Any):
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


# numpy.core is the path before NumPy 2, numpy._core since.
ADMITTED = {
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): _PickledDtype,
    ("numpy.core.multiarray", "_reconstruct"): PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): PickledArray,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _encode,
}
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
        if not isinstance(self.stack[-1], (PickledArray, _PickledDtype)):
            raise pickle.UnpicklingError("it sets the state of something that is not an array")
        self.stack[-1].__setstate__(state)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(key, value)

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(key, value)

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(key, value)

    def _set(self, key: Any, value: Any) -> None:
        if not isinstance(key, str) or not isinstance(self.stack[-1], dict):
            raise pickle.UnpicklingError(f"{_describe(key)} as key, expected dicts with text as keys")
        self.stack[-1][key] = value

    def load_bytearray8(self) -> None:
        self.append(self.read(int.from_bytes(self.read(8), "little")))

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
