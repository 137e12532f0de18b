"""The HDF5 layout every data set is read from: pixels as compact integers, one row per image.

    images        (N, h, w) or (N, h, w, 3), uint8 or uint16; value / 255 or / 65535 lies in [0, 1]
    masks_packed  (N, ceil(k h w / 8)) uint8; row i is np.packbits of its k expert masks (k, h, w)
    patient       (N,) int or str; the group that no split may divide
    id            (N,) str; nodule, slice (N,) int; style (N, k) int: optional

A source in another format (pickle, PNG) is converted once by `cached` into such a file.
"""

import fcntl
import glob
import hashlib
import io
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np

FORMAT = 1  # raise it when the layout or a converter changes: caches of another number are converted again
FIELDS = ("patient", "id", "nodule", "slice", "style")
BLOCK = 256  # rows read or written at once: bounds memory, and one request per block is fast
DEFLATE_LIMIT = 1032  # gzip cannot shrink data further than this; more is a forged size


@dataclass(frozen=True)
class Cache:
    """An opened data set: everything but the pixels, which `read` fetches by row. No file stays open."""

    path: Path
    shape: tuple[int, int, int, int]  # N, h, w, c
    annotators: int
    patient: np.ndarray  # (N,)
    ids: list[str]  # how to name each row in a message
    style: np.ndarray | None  # (N, k), ISIC3 only
    fingerprint: str  # of the source files it was converted from; "" for a file that was not converted

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images (m, h, w, c) uint8 or uint16 and packed masks (m, bytes) uint8 of ascending, distinct rows.

        Raises ValueError, naming the file, if its data cannot be read."""
        try:
            with h5py.File(self.path, "r", locking=False) as file:
                images, masks = (_read_rows(file[name], rows) for name in ("images", "masks_packed"))
        except Exception as error:  # h5py raises nearly any type on a damaged file
            raise ValueError(f"{self.path}: damaged, rows cannot be read ({error}); restore it") from error
        return images.reshape(len(rows), *self.shape[1:]), masks


def open_cache(path: Path | str) -> Cache:
    """Open a file of the layout above and check it; reads no pixels.

    Raises FileNotFoundError, or ValueError naming the file, what was found and what was expected."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected an HDF5 file with images and masks_packed")
    try:
        # No lock: caches are replaced whole, never changed, and their writer's lock outlasts the replacement.
        with h5py.File(path, "r", locking=False) as file:
            return _open(file, path)
    except LayoutError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: not a readable HDF5 file ({error}); restore it") from error


class LayoutError(ValueError):
    """An HDF5 file that is readable but not of this layout."""


def _open(file: h5py.File, path: Path) -> Cache:
    version = file.attrs.get("atfm_format", FORMAT)
    if version != FORMAT:
        raise LayoutError(f"{path}: format {version}, expected {FORMAT}; convert the source again")
    shape = _images_shape(stored_dataset(file, path, "images"), path)
    annotators = _annotators(stored_dataset(file, path, "masks_packed"), path, shape)
    present = [name for name in FIELDS if name == "patient" or name in file]
    fields = {name: _field(file, path, name, shape[0]) for name in present}
    style = fields.get("style")
    if style is not None and style.shape != (shape[0], annotators):
        raise LayoutError(f"{path}: style has shape {style.shape}, expected {(shape[0], annotators)}")
    fingerprint = np.bytes_(file.attrs.get("fingerprint", b"")).decode()
    return Cache(path, shape, annotators, fields["patient"], _names(fields), style, fingerprint)


def _images_shape(images: h5py.Dataset, path: Path) -> tuple[int, int, int, int]:
    """N, h, w, c."""
    is_image = images.ndim == 3 or images.ndim == 4 and images.shape[3] == 3
    if not is_image or images.dtype not in (np.uint8, np.uint16):
        raise LayoutError(f"{path}: images is {images.dtype} {images.shape}, expected uint8 or uint16 "
                          "(N, h, w) or (N, h, w, 3)")
    if 0 in images.shape:
        raise LayoutError(f"{path}: images has shape {images.shape}, expected at least one image")
    return (*images.shape[:3], *(images.shape[3:] or (1,)))


def _annotators(masks: h5py.Dataset, path: Path, shape: tuple[int, int, int, int]) -> int:
    """k, from the bytes per image."""
    count, height, width, _ = shape
    if masks.dtype != np.uint8 or masks.ndim != 2:
        raise LayoutError(f"{path}: masks_packed is {masks.dtype} {masks.shape}, "
                          "expected uint8 (N, k h w / 8)")
    if len(masks) != count:
        raise LayoutError(f"{path}: {len(masks)} rows in masks_packed, {count} in images; expected as many")
    annotators = 8 * masks.shape[1] // (height * width)
    if annotators == 0 or masks.shape[1] != _packed_bytes(annotators, height, width):
        raise LayoutError(f"{path}: masks_packed has {masks.shape[1]} bytes per image, "
                          f"expected k x {height} x {width} / 8")
    return annotators


def stored_dataset(group: h5py.Group, path: Path | str, name: str) -> h5py.Dataset:
    """The dataset `name` of a file or group, stored in this very file.

    Raises LayoutError, beginning with `path`, for links, data in other files and impossible sizes."""
    link = group.get(name, getlink=True)
    if link is None:
        held = ", ".join(sorted(group)[:10]) or "nothing"
        raise LayoutError(f"{path}: holds {held}, expected a dataset '{name}'")
    if not isinstance(link, h5py.HardLink):
        raise LayoutError(f"{path}: '{name}' is a {type(link).__name__}, expected a dataset in this file")
    found = group[name]
    if not isinstance(found, h5py.Dataset):
        raise LayoutError(f"{path}: '{name}' is a {type(found).__name__}, expected a dataset")
    if found.external or found.is_virtual:
        raise LayoutError(f"{path}: '{name}' keeps its data in other files; copy the data here")
    stored = found.id.get_storage_size()
    if found.nbytes > DEFLATE_LIMIT * stored:
        raise LayoutError(f"{path}: '{name}' claims {found.nbytes} bytes and stores {stored}; "
                          "incomplete or forged")
    return found


def _field(file: h5py.File, path: Path, name: str, count: int) -> np.ndarray:
    """A small per-row array: ints as they are, strings as an object array of str."""
    found = stored_dataset(file, path, name)
    is_text = h5py.check_string_dtype(found.dtype) is not None
    if not (is_text and name in ("patient", "id") or found.dtype.kind in "iu" and name != "id"):
        expected = "text" if name == "id" else "integers"
        raise LayoutError(f"{path}: {name} is {found.dtype}, expected {expected}")
    if found.ndim != (2 if name == "style" else 1) or len(found) != count:
        raise LayoutError(f"{path}: {name} has shape {found.shape}, expected an entry per image, of {count}")
    return found.asstr()[...] if is_text else found[...]


def _names(fields: dict[str, np.ndarray]) -> list[str]:
    """How to name each row: its id, or 'patient 7, nodule 0, slice 1' from what the file has."""
    if "id" in fields:
        return [str(name) for name in fields["id"]]
    known = [name for name in ("patient", "nodule", "slice") if name in fields]
    if known == ["patient"]:
        return [f"patient {patient}, row {row}" for row, patient in enumerate(fields["patient"])]
    return [", ".join(f"{name} {value}" for name, value in zip(known, values))
            for values in zip(*(fields[name] for name in known))]


def _read_rows(dataset: h5py.Dataset, rows: np.ndarray) -> np.ndarray:
    out = np.empty((len(rows), *dataset.shape[1:]), dataset.dtype)
    for start in range(0, len(dataset), BLOCK):
        low, high = np.searchsorted(rows, (start, start + BLOCK))
        if low < high:
            wanted = rows[low:high]
            out[low:high] = dataset[wanted[0]:wanted[-1] + 1][wanted - wanted[0]]
    return out


def _fixed(text: str | list[str]) -> np.ndarray:
    """Fixed-length UTF-8. Other text lies on a heap, which HDF5 2.0 reads without end if it is damaged."""
    encoded = np.char.encode(text, "utf-8")
    return encoded.astype(h5py.string_dtype("utf-8", max(1, encoded.dtype.itemsize)))


def _packed_bytes(annotators: int, height: int, width: int) -> int:
    return -(-annotators * height * width // 8)


class Writer:
    """Writes a file of the layout row by row; it appears under its name when complete, or not at all.

    Until then the file is in memory: HDF5 2.0 ends the process when it meets a full disk.

    with Writer("set.h5", source="where it comes from") as writer:
        writer.append(image, masks, patient=7, nodule=0, slice=1)
    """

    def __init__(self, path: Path | str, source: str, fingerprint: str = ""):
        """`source` describes the data for a human; `fingerprint` identifies the files it was made from."""
        self.path = Path(path)
        self._remove_abandoned()
        # A name of its own, so that two processes writing the same file do not meet.
        self._temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.tmp")
        self._out = open(self._temporary, "xb")
        _locked(self._out)
        self._memory = io.BytesIO()
        self._file = h5py.File(self._memory, "w")
        self._file.attrs.update(atfm_format=FORMAT, source=_fixed(source), fingerprint=_fixed(fingerprint))
        self._images: list[np.ndarray] = []
        self._masks: list[np.ndarray] = []
        self._fields: dict[str, list] = {}
        self._shape: tuple | None = None

    def __enter__(self) -> "Writer":
        return self

    def append(self, image: np.ndarray, masks: np.ndarray, **fields: Any) -> None:
        """Add one image (h, w) or (h, w, 3), uint8 or uint16, its masks (k, h, w) of 0/1, and its FIELDS.

        Raises ValueError for a type or shape the layout does not hold or that differs from the first row."""
        if image.dtype not in (np.uint8, np.uint16) or masks.shape[-2:] != image.shape[:2] or masks.ndim != 3:
            raise ValueError(f"{self.path}: image {image.dtype} {image.shape} with masks {masks.shape}; "
                             "expected uint8 or uint16 (h, w) or (h, w, 3) with (k, h, w)")
        if "patient" not in fields or not set(fields) <= set(FIELDS):
            raise ValueError(f"{self.path}: a row with {sorted(fields)}; expected patient and any of "
                             f"{', '.join(FIELDS[1:])}")
        if self._shape is None:
            self._create(image, masks, fields)
        if (image.shape, image.dtype, masks.shape, set(fields)) != self._shape:
            raise ValueError(f"{self.path}: a row of {image.dtype} {image.shape}, masks {masks.shape}, "
                             f"{sorted(fields)}; expected what the first row had, {self._shape}")
        self._images.append(image)
        self._masks.append(np.packbits(masks.astype(bool).reshape(-1)))
        for name, value in fields.items():
            self._fields[name].append(value)
        if len(self._images) == BLOCK:
            self._flush()

    def _create(self, image: np.ndarray, masks: np.ndarray, fields: dict[str, Any]) -> None:
        """Empty datasets shaped after the first row; uncompressed, which loads fastest."""
        self._shape = (image.shape, image.dtype, masks.shape, set(fields))
        self._fields = {name: [] for name in fields}
        for name, row, dtype in (("images", image.shape, image.dtype),
                                 ("masks_packed", (_packed_bytes(*masks.shape),), np.uint8)):
            self._file.create_dataset(name, (0, *row), dtype, maxshape=(None, *row), chunks=(16, *row))

    def _flush(self) -> None:
        for name, rows in (("images", self._images), ("masks_packed", self._masks)):
            dataset = self._file[name]
            dataset.resize(len(dataset) + len(rows), axis=0)
            dataset[-len(rows):] = np.stack(rows)
            rows.clear()

    def _finish(self) -> None:
        if self._shape is None:
            raise ValueError(f"{self.path}: nothing was written; expected at least one image")
        if self._images:
            self._flush()
        for name, values in self._fields.items():
            self._file.create_dataset(name, data=_fixed(values) if isinstance(values[0], str) else values)
        self._file.close()
        try:
            self._out.write(self._memory.getbuffer())
            self._out.flush()
            os.fsync(self._out.fileno())
            os.replace(self._temporary, self.path)
        except OSError as error:
            raise OSError(f"{self.path}: cannot be written ({error}); is the disk full?") from error

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)
            with suppress(OSError):  # closing a file on a full disk tries once more to write
                self._out.close()

    def _remove_abandoned(self) -> None:
        """Removes temporary files of processes that were killed: locks end with their process."""
        for old in self.path.parent.glob(f".{glob.escape(self.path.name)}.*.tmp"):
            with suppress(OSError), open(old, "rb") as file:  # gone by now, or of another user
                if _locked(file):
                    old.unlink()


def _locked(file: BinaryIO) -> bool:
    """Locks an open file until it is closed; False if a process has it, or the file system knows no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def cached(source: Path, files: Sequence[Path], convert: Callable[[Sequence[Path], Writer], None]) -> Cache:
    """The cache of `source`, made by `convert(files, writer)` on first use and again when a file changes.

    It lies beside the source or, if that folder is read-only, in $XDG_CACHE_HOME/atfm or ~/.cache/atfm."""
    source = source.resolve()
    fingerprint = _fingerprint(source, files)
    reason = "converting once"
    for place in _places(source):
        if not place.is_file():
            continue
        try:
            found = open_cache(place)
        except ValueError as error:
            reason = f"the cache is unusable ({error}); converting again"
            continue
        if found.fingerprint == fingerprint:
            return found
        reason = f"its files changed since {place} was made; converting again"
    with _first_writable(source, fingerprint) as writer:
        print(f"{source}: {reason}, into {writer.path}", flush=True)
        convert(files, writer)
    return open_cache(writer.path)


def _fingerprint(source: Path, files: Sequence[Path]) -> str:
    """Names, sizes and modification times of the source files, and the version of the layout."""
    lines = [f"{FORMAT}"]
    for file in files:
        status = file.stat()
        lines.append(f"{os.path.relpath(file.resolve(), source)} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _places(source: Path) -> tuple[Path, Path]:
    """Where the cache of `source` may lie, best first."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atfm"
    digest = hashlib.sha256(str(source).encode()).hexdigest()[:12]
    return source.with_name(f"{source.name}.atfm.h5"), home / f"{source.name}-{digest}.h5"


def _first_writable(source: Path, fingerprint: str) -> Writer:
    refusals = []
    for place in _places(source):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            return Writer(place, f"converted from {source}", fingerprint)
        except OSError as error:
            refusals.append(f"{place.parent} ({error})")
    raise OSError(f"{source}: no folder for its cache is writable: {'; '.join(refusals)}; set XDG_CACHE_HOME")
