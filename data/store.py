"""A store: the HDF5 file that a data set is read from, one row per image, pixels as compact integers.

    images        (N, h, w) or (N, h, w, c), uint8 or uint16; value / 255 or / 65535 lies in [0, 1]
    masks_packed  (N, ceil(k h w / 8)) uint8; row i is np.packbits of its k expert masks (k, h, w)
    patient       (N,) int or str; the group that no split may divide
    id            (N,) str; nodule, slice (N,) int; style (N, k) int: optional
    experts       (N,) int, optional: an image has its first so many masks; the others are stored as zeros and
                  never shown
    series        (N,) str, optional: of CT
    file          (N,) str, optional: what the image was read from; axis (N,) int that was cut across, -1 for
                  an image that is no volume; height, width (N,) int of the image before it was fitted

What a user has in another format, an original, is turned into a store by `data.convert`.
"""

import io
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from metrics.files import whole_file

FORMAT = 1  # raise it when the layout changes: stores of another number are refused
FIELDS = ("patient", "id", "nodule", "slice", "style", "experts", "series", "file", "axis", "height", "width")
TEXT = ("id", "series", "file")
CHANNELS = 16  # at most; more is taken for (N, c, h, w)
BLOCK = 256  # rows read at once: bounds memory, and one request per block is fast
DEFLATE_LIMIT = 1032  # gzip cannot shrink data further than this; more is a forged size


class LayoutError(ValueError):
    """An HDF5 file that is readable but does not hold what it should."""


@dataclass(frozen=True)
class Store:
    """An opened store: everything but the pixels, which `read` fetches by row. No file stays open."""

    path: Path
    shape: tuple[int, int, int, int]  # N, h, w, c
    annotators: int
    patient: np.ndarray  # (N,)
    ids: list[str]  # how to name each row in a message
    fields: dict[str, np.ndarray]  # the FIELDS that the file has
    digest: str  # of the original's files; "" for a file that was not converted

    @property
    def style(self) -> np.ndarray | None:
        """(N, k), ISIC3 only."""
        return self.fields.get("style")

    @property
    def experts(self) -> np.ndarray | None:
        """How many masks each image has, (N,), where not all have k."""
        return self.fields.get("experts")

    def marked(self) -> np.ndarray:
        """Whether any expert marked anything on each image, (N,) bool. Raises ValueError as `read`."""
        with reading(self.path) as file:
            return np.any(_read_rows(file["masks_packed"], np.arange(len(self))) > 0, axis=1)

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images (m, h, w, c) uint8 or uint16 and packed masks (m, bytes) uint8 of ascending, distinct rows.

        Raises ValueError, naming the file, if its data cannot be read."""
        with reading(self.path) as file:
            images, masks = (_read_rows(file[name], rows) for name in ("images", "masks_packed"))
        return images.reshape(len(rows), *self.shape[1:]), masks


def _read_rows(dataset: h5py.Dataset, rows: np.ndarray) -> np.ndarray:
    out = np.empty((len(rows), *dataset.shape[1:]), dataset.dtype)
    for start in range(0, len(dataset), BLOCK):
        low, high = np.searchsorted(rows, (start, start + BLOCK))
        if low < high:
            wanted = rows[low:high]
            out[low:high] = dataset[wanted[0]:wanted[-1] + 1][wanted - wanted[0]]
    return out


@contextmanager
def reading(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file to read from; what h5py raises on a damaged one becomes a ValueError that names it.

    No lock is asked for: stores are replaced whole, and a writer holds its own lock past the renaming."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except LayoutError:
        raise
    except Exception as error:  # h5py raises nearly any type
        raise ValueError(f"{path}: not a readable HDF5 file ({error}); restore it") from error


def open_store(path: Path | str) -> Store:
    """Open a file of the layout above and check it; reads no pixels.

    Raises FileNotFoundError, or ValueError naming the file, what was found and what was expected."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected an HDF5 file with images and masks_packed")
    with reading(path) as file:
        version = file.attrs.get("atfm_format", FORMAT)
        if version != FORMAT:
            raise LayoutError(f"{path}: format {version}, expected {FORMAT}; make it again")
        images, masks = (stored_dataset(file, path, name) for name in ("images", "masks_packed"))
        shape, annotators = _sizes(images, masks, path)
        fields = {name: _field(file, path, name, shape[0], annotators)
                  for name in FIELDS if name == "patient" or name in file}
        digest = np.bytes_(file.attrs.get("fingerprint", b"")).decode()
    experts = fields.get("experts")
    if experts is not None and not (1 <= experts.min() and experts.max() <= annotators):
        raise LayoutError(f"{path}: experts from {experts.min()} to {experts.max()}, expected 1 to "
                          f"{annotators}")
    return Store(path, shape, annotators, fields["patient"], _names(fields), fields, digest)


def _sizes(images: h5py.Dataset, masks: h5py.Dataset, path: Path) -> tuple[tuple[int, int, int, int], int]:
    """(N, h, w, c), and k from the bytes per image."""
    shape = (*images.shape, 1) if images.ndim == 3 else images.shape
    if images.dtype not in (np.uint8, np.uint16) or len(shape) != 4 or shape[3] > CHANNELS or 0 in shape:
        raise LayoutError(f"{path}: images is {images.dtype} {images.shape}, expected uint8 or uint16 "
                          f"(N, h, w) or (N, h, w, c), c up to {CHANNELS}, at least one image")
    count, height, width, _ = shape
    annotators = 8 * masks.shape[-1] // (height * width) if masks.ndim == 2 else 0
    per_image = -(-annotators * height * width // 8)
    if masks.dtype != np.uint8 or annotators == 0 or masks.shape != (count, per_image):
        raise LayoutError(f"{path}: masks_packed is {masks.dtype} {masks.shape}, expected uint8 "
                          f"({count}, k x {height} x {width} / 8)")
    return shape, annotators


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


def _field(file: h5py.File, path: Path, name: str, count: int, annotators: int) -> np.ndarray:
    """A small per-row array: ints as they are, strings as an object array of str."""
    found = stored_dataset(file, path, name)
    is_text = h5py.check_string_dtype(found.dtype) is not None
    if not (is_text and name in ("patient", *TEXT) or found.dtype.kind in "iu" and name not in TEXT):
        expected = "text" if name in TEXT else "integers"
        raise LayoutError(f"{path}: {name} is {found.dtype}, expected {expected}")
    shape = (count, annotators) if name == "style" else (count,)
    if found.shape != shape:
        raise LayoutError(f"{path}: {name} has shape {found.shape}, expected {shape}")
    return found.asstr()[...] if is_text else found[...]


def _names(fields: dict[str, np.ndarray]) -> list[str]:
    """How to name each row: its id, or 'patient 7, nodule 0, slice 1' from what the file has."""
    if "id" in fields:
        return [str(name) for name in fields["id"]]
    known = {str(name): fields[name] for name in ("patient", "nodule", "slice") if name in fields}
    if len(known) == 1:
        known["row"] = np.arange(len(fields["patient"]))
    return [", ".join(f"{name} {value}" for name, value in zip(known, values))
            for values in zip(*known.values())]


class Writer:
    """Writes a store row by row; it appears under its name when complete, or not at all.

    Until then the file is in memory: HDF5 2.0 ends the process when it meets a full disk.

    with Writer("set.h5", origin="where it comes from") as writer:
        writer.append(image, masks, patient=7, nodule=0, slice=1)
    """

    def __init__(self, path: Path | str, origin: str, digest: str = "", small: bool = False,
                 prepared: str = ""):
        """`origin` describes the data for a human; `digest` identifies the files it was made from.

        small: compressed; without it a store loads fastest. prepared: axis and window of `data.prepare`, as
        JSON."""
        self.path = Path(path)
        self._packing = {"compression": "gzip", "compression_opts": 9} if small else {}
        self._stack = ExitStack()
        self._out = self._stack.enter_context(whole_file(self.path))
        self._memory = io.BytesIO()
        self._file = self._stack.enter_context(h5py.File(self._memory, "w"))
        self._file.attrs.update(atfm_format=FORMAT, source=_fixed(origin), fingerprint=_fixed(digest))
        if prepared:
            self._file.attrs["prepared"] = _fixed(prepared)
        self._fields: dict[str, list] = {}
        self._pixels: dict[str, list[np.ndarray]] = {"images": [], "masks_packed": []}  # not in the file yet
        self._first: tuple = ()  # what the first row looks like

    def __enter__(self) -> "Writer":
        return self

    def append(self, image: np.ndarray, masks: np.ndarray, **fields: Any) -> None:
        """Add one image (h, w) or (h, w, c), uint8 or uint16, its masks (k, h, w) of 0/1, and its FIELDS.

        Raises ValueError for a type or shape the layout does not hold or that differs from the first row."""
        if image.dtype not in (np.uint8, np.uint16) or masks.shape[-2:] != image.shape[:2] or masks.ndim != 3:
            raise ValueError(f"{self.path}: image {image.dtype} {image.shape} with masks {masks.shape}; "
                             "expected uint8 or uint16 (h, w) or (h, w, c) with (k, h, w)")
        if "patient" not in fields or not set(fields) <= set(FIELDS):
            raise ValueError(f"{self.path}: a row with {sorted(fields)}; expected patient and any of "
                             f"{', '.join(FIELDS[1:])}")
        looks = (image.dtype, image.shape, masks.shape, sorted(fields))
        self._first = self._first or looks
        if looks != self._first:
            raise ValueError(f"{self.path}: a row with image, masks and fields {looks}; expected what the "
                             f"first row had, {self._first}")
        for name, value in fields.items():
            self._fields.setdefault(name, []).append(value)
        self._pixels["images"].append(image)
        self._pixels["masks_packed"].append(np.packbits(masks.astype(bool)))
        if len(self._pixels["images"]) == BLOCK:
            self._flush()

    def _flush(self) -> None:
        for name, rows in self._pixels.items():
            block = np.stack(rows)
            shape = block.shape[1:]
            if name not in self._file:
                self._file.create_dataset(name, (0, *shape), block.dtype, maxshape=(None, *shape),
                                          chunks=(16, *shape), **self._packing)
            dataset = self._file[name]
            dataset.resize(len(dataset) + len(rows), axis=0)
            dataset[-len(rows):] = block
            rows.clear()

    def _complete(self) -> None:
        if not self._first:
            raise ValueError(f"{self.path}: nothing was written; expected at least one image")
        if self._pixels["images"]:
            self._flush()
        for name, values in self._fields.items():
            data = _fixed(values) if isinstance(values[0], str) else values
            self._file.create_dataset(name, data=data, **self._packing)
        self._file.close()
        self._out.write(self._memory.getbuffer())

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        with self._stack:
            if error is not None:
                raise error
            self._complete()


def _fixed(text: str | list[str]) -> np.ndarray:
    """Fixed-length UTF-8. Other text lies on a heap, which HDF5 2.0 reads without end if it is damaged."""
    encoded = np.char.encode(text, "utf-8")
    return encoded.astype(h5py.string_dtype("utf-8", max(1, encoded.dtype.itemsize)))
