"""A store: the HDF5 file that a data set is read from, one row per image, pixels as compact integers.

    images        (N, h, w) or (N, h, w, c), uint8 or uint16; value / 255 or / 65535 lies in [0, 1]
    masks_packed  (N, ceil(k h w / 8)) uint8; row i is np.packbits of its k expert masks (k, h, w)
    patient       (N,) int or str; the group that no split may divide
    id            (N,) str, no two alike; nodule, slice (N,) int; style (N, k) int: optional
    experts       (N,) int, optional: an image has its first so many masks; the others are stored as zeros and
                  never shown
    series        (N,) str, optional: of CT
    file          (N,) str, optional: what the image was read from; axis (N,) int that was cut across, -1 for
                  an image that is no volume; height, width (N,) int of the image before it was fitted

`data.writer` writes it. What a user has in another format, an original, is turned into one by `data.convert`.
"""

import fcntl
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

FORMAT = 1  # raise it when the layout changes: stores of another number are refused
FIELDS = ("patient", "id", "nodule", "slice", "style", "experts", "series", "file", "axis", "height", "width")
TEXT = ("id", "series", "file")
NAMES = ("patient", "id", "series")  # equal if they differ only in Unicode form; `file` is as on disk
SUFFIXES = (".h5", ".hdf5")
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
    style: np.ndarray | None  # (N, k), ISIC3 only
    experts: np.ndarray | None  # how many masks each image has, (N,), where not all have k
    fields: dict[str, np.ndarray]  # the FIELDS that the file has
    digest: str  # of the original's files; "" for a file that was not converted

    def areas(self) -> np.ndarray:
        """Pixels that experts marked on each image, of all masks together, (N,) int. Errors as of `read`."""
        areas = np.zeros(len(self), np.int64)
        with reading(self.path) as file:
            for first in range(0, len(self), BLOCK):
                packed = file["masks_packed"][first:first + BLOCK]
                # Bits that only fill the last byte are 0 and add nothing.
                areas[first:first + BLOCK] = np.unpackbits(packed, axis=1).sum(1)
        return areas

    def marked(self) -> np.ndarray:
        """Whether any expert marked anything on each image, (N,) bool. Errors as of `read`."""
        return self.areas() > 0

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
    for first in range(0, len(dataset), BLOCK):
        # Rows ascend, so those in a block of the file are neighbours.
        low, high = np.searchsorted(rows, (first, first + BLOCK))
        if low < high:
            wanted = rows[low:high]
            # A range is read and then thinned out, since HDF5 is slow at selecting single rows.
            out[low:high] = dataset[wanted[0]:wanted[-1] + 1][wanted - wanted[0]]
    return out


def is_hdf5(path: Path) -> bool:
    """Whether a file is HDF5, or is called so: then `reading` says what is wrong with it."""
    return path.is_file() and (path.suffix.lower() in SUFFIXES or h5py.is_hdf5(path))


@contextmanager
def reading(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file to read from.

    No lock is taken: a store is replaced as a whole, and its writer keeps its lock until after the renaming.
    Raises ValueError, naming the file, for what h5py cannot read: a damaged file, or one that is in use."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except (LayoutError, MemoryError):
        raise
    except Exception as error:  # h5py raises nearly any type
        reason = " ".join(str(error).split())[:200]
        if _has_writer(path) or "open for write" in reason:
            raise ValueError(f"{path}: in use by a program that has it open for writing ({reason}); close it "
                             "there and run the same command again") from error
        raise ValueError(f"{path}: not a readable HDF5 file ({reason}); restore it") from error


def _has_writer(path: Path) -> bool:
    """Whether a process holds the lock that HDF5 takes to write to a file."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:  # BlockingIOError; or it cannot be opened, or its file system knows no locks
        return isinstance(error, BlockingIOError)
    return False


def open_store(path: Path | str) -> Store:
    """Open a file of the layout above and check it; reads no pixels.

    Raises FileNotFoundError, or ValueError naming the file, what it holds and what was expected."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected an HDF5 file with images and masks_packed")
    with reading(path) as file:
        # A file that another program wrote has no number: its arrays decide.
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
    return Store(path, shape, annotators, fields["patient"], _row_names(fields, path), fields.get("style"),
                 experts, fields, digest)


def _sizes(images: h5py.Dataset, masks: h5py.Dataset, path: Path) -> tuple[tuple[int, int, int, int], int]:
    """(N, h, w, c), and k from the bytes per image."""
    shape = (*images.shape, 1) if images.ndim == 3 else images.shape
    if images.dtype not in (np.uint8, np.uint16) or len(shape) != 4 or shape[3] > CHANNELS or 0 in shape:
        raise LayoutError(f"{path}: images is {images.dtype} {images.shape}, expected uint8 or uint16 "
                          f"(N, h, w) or (N, h, w, c), c up to {CHANNELS}, at least one image")
    count, height, width, _ = shape
    # k is not stored, but follows from the bytes of an image.
    annotators = 8 * masks.shape[-1] // (height * width) if masks.ndim == 2 else 0
    per_image = -(-annotators * height * width // 8)
    if masks.dtype != np.uint8 or annotators == 0 or masks.shape != (count, per_image):
        raise LayoutError(f"{path}: masks_packed is {masks.dtype} {masks.shape}, expected uint8 "
                          f"({count}, k x {height} x {width} / 8)")
    return shape, annotators


def stored_dataset(group: h5py.Group, path: Path | str, name: str, sparse: bool = False) -> h5py.Dataset:
    """The dataset `name` of a file or group, stored in this very file.

    sparse: parts that were never written are zeros, as of masks that are empty there; the caller bounds the
    size, by that of the image. Raises LayoutError, beginning with `path`, for links, data in other files and,
    unless sparse, sizes beyond what is stored."""
    link = group.get(name, getlink=True)
    if link is None:
        held = ", ".join(sorted(group)[:10]) or "nothing"
        raise LayoutError(f"{path}: holds {held}, expected a dataset '{name}'")
    dataset = group[name] if isinstance(link, h5py.HardLink) else link  # a link may lead to another file
    if not isinstance(dataset, h5py.Dataset):
        raise LayoutError(f"{path}: '{name}' is a {type(dataset).__name__}, expected a dataset in this file")
    if dataset.external or dataset.is_virtual:
        raise LayoutError(f"{path}: '{name}' keeps its data in other files; copy the data here")
    stored = dataset.id.get_storage_size()
    # A file of a few bytes could otherwise claim an array that fills the memory.
    if dataset.nbytes > DEFLATE_LIMIT * stored and not sparse:
        raise LayoutError(f"{path}: '{name}' claims {dataset.nbytes} bytes and stores {stored}; "
                          "incomplete or forged")
    return dataset


def _field(file: h5py.File, path: Path, name: str, count: int, annotators: int) -> np.ndarray:
    """A per-row array: ints as they are, strings as an object array of str, NAMES in one Unicode form."""
    dataset = stored_dataset(file, path, name)
    is_text = h5py.check_string_dtype(dataset.dtype) is not None
    if not (is_text and name in ("patient", *TEXT) or dataset.dtype.kind in "iu" and name not in TEXT):
        expected = "text" if name in TEXT else "integers"
        raise LayoutError(f"{path}: {name} is {dataset.dtype}, expected {expected}")
    shape = (count, annotators) if name == "style" else (count,)
    if dataset.shape != shape:
        raise LayoutError(f"{path}: {name} has shape {dataset.shape}, expected {shape}")
    if not is_text:
        return dataset[...]
    texts = dataset.asstr()[...]
    return np.array([nfc(text) for text in texts], object) if name in NAMES else texts


def nfc(name: str) -> str:
    """A name in Unicode's form NFC: macOS writes a letter such as é as two characters, others as one."""
    return unicodedata.normalize("NFC", name)


def _row_names(fields: dict[str, np.ndarray], path: Path) -> list[str]:
    """How to name each row: its id, or 'patient 7, nodule 0, slice 1' from what the file has.

    Scores are kept by these names. Raises LayoutError for an id that two rows have."""
    if "id" in fields:
        names = [str(name) for name in fields["id"]]
        name, count = Counter(names).most_common(1)[0]
        if count > 1:
            first, second = np.flatnonzero(np.array(names) == name)[:2]
            raise LayoutError(f"{path}: rows {first} and {second} have the same id {name!r}; expected one of "
                              "its own for each, such as '<patient>/<slice>'")
        return names
    known = {str(name): fields[name] for name in ("patient", "nodule", "slice") if name in fields}
    # The row's number where nothing else distinguishes two images.
    if len(known) == 1 or len(set(zip(*known.values()))) < len(fields["patient"]):
        known["row"] = np.arange(len(fields["patient"]))
    return [", ".join(f"{name} {value}" for name, value in zip(known, values))
            for values in zip(*known.values())]
