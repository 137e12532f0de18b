"""Writing a store, see `data.store`: row by row, as a whole or not at all, and never over another's file."""

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np

from data.store import BLOCK, FIELDS, FORMAT, NAMES, nfc, reading
from metrics.files import whole_file


def refuse_foreign(path: Path, origin: str) -> None:
    """Raises ValueError, naming --output, if `path` exists and is not a store of this `origin`.

    So a command replaces neither what another program made, nor what it made with other flags."""
    if not path.exists():
        return
    made_from = ""
    if path.is_file() and h5py.is_hdf5(path):
        with reading(path) as file:
            if "atfm_format" in file.attrs:
                made_from = np.bytes_(file.attrs.get("source", b"")).decode()
    if made_from != origin:
        maker = f"is of another origin, '{made_from[:120]}'" if made_from else "was not made by this program"
        raise ValueError(f"--output {path}: exists and {maker}; it is not replaced: name another file, or "
                         "move this one away")


class DiskFile:
    """What HDF5 writes to: a file on disk, whose first error is kept instead of raised.

    HDF5 2.0 ends the process when it meets a full disk. Here it goes on, and `check` raises the error."""

    def __init__(self, file: BinaryIO):
        self._file = file.raw  # type: ignore[attr-defined]  # unbuffered: no other call may meet the error
        self.error: OSError | None = None
        self.read, self.readinto = self._file.read, self._file.readinto
        self.seek, self.tell = self._file.seek, self._file.tell

    def write(self, data: bytes | memoryview) -> int:
        left = memoryview(data)
        try:
            while len(left) and self.error is None:
                # A write without buffer may take only a part.
                left = left[self._file.write(left):]
        except OSError as error:
            self.error = error
        return len(data)

    def truncate(self, size: int) -> int:
        try:
            if self.error is None:
                self._file.truncate(size)
        except OSError as error:
            self.error = error
        return size

    def flush(self) -> None:
        """Does nothing: `whole_file` flushes to disk, once, at the end."""

    def check(self) -> None:
        """Raises the OSError of the first write that failed, if one did."""
        if self.error is not None:
            raise self.error


class _Abandoned(Exception):
    """Ends the writing of a file that is not to appear."""


class Writer:
    """Writes a store row by row; it appears under its name when complete, or not at all.

    with Writer("set.h5", origin="where it comes from") as writer:
        writer.append(image, masks, patient=7, nodule=0, slice=1)
    """

    def __init__(self, path: Path | str, origin: str, digest: str = "", small: bool = False,
                 prepared: str = "", replace: bool = False):
        """origin: where the data come from, for a human. digest: of the files it was made from. small:
        compressed, which loads slower. prepared: axis and window of `data.prepare`, as JSON. replace:
        whatever is there; without it, raises ValueError for a file of another origin."""
        self.path = Path(path).expanduser()
        if not replace:
            refuse_foreign(self.path, origin)
        self._packing = {"compression": "gzip", "compression_opts": 9} if small else {}
        self._stack = ExitStack()
        self._disk = DiskFile(self._stack.enter_context(whole_file(self.path)))
        self._file = self._stack.enter_context(h5py.File(self._disk, "w"))
        self._file.attrs.update(atfm_format=FORMAT, source=_fixed(origin), fingerprint=_fixed(digest))
        if prepared:
            self._file.attrs["prepared"] = _fixed(prepared)
        self._fields: dict[str, list] = {}
        self._pixels: dict[str, list[np.ndarray]] = {"images": [], "masks_packed": []}  # not in the file yet
        self._first: tuple = ()  # types, shapes and fields of the first row
        self._file_of_id: dict[str, str] = {}

    def __enter__(self) -> "Writer":
        return self

    def append(self, image: np.ndarray, masks: np.ndarray, **fields: Any) -> None:
        """Add one image (h, w) or (h, w, c), uint8 or uint16, its masks (k, h, w) of 0/1, and its FIELDS.

        Raises ValueError for a type or shape that no store has or that differs from the first row, and
        for an id that an earlier row has."""
        if image.dtype not in (np.uint8, np.uint16) or masks.shape[-2:] != image.shape[:2] or masks.ndim != 3:
            raise ValueError(f"{self.path}: image {image.dtype} {image.shape} with masks {masks.shape}; "
                             "expected uint8 or uint16 (h, w) or (h, w, c) with (k, h, w)")
        if "patient" not in fields or not set(fields) <= set(FIELDS):
            raise ValueError(f"{self.path}: a row with {sorted(fields)}; expected patient and any of "
                             f"{', '.join(FIELDS[1:])}")
        layout = (image.dtype, image.shape, masks.shape, sorted(fields))
        self._first = self._first or layout
        if layout != self._first:
            raise ValueError(f"{self.path}: a row with image, masks and fields {layout}; expected what the "
                             f"first row had, {self._first}")
        fields |= {name: nfc(fields[name]) for name in NAMES if isinstance(fields.get(name), str)}
        if "id" in fields:
            file, first = fields.get("file", ""), self._file_of_id.get(fields["id"])
            if first is not None:
                raise ValueError(f"{self.path}: two rows with the id {fields['id']!r}"
                                 + (f" ({first} and {file})" if file else "")
                                 + "; expected one of its own for each, such as '<patient>/<slice>'")
            self._file_of_id[fields["id"]] = file
        for name, value in fields.items():
            self._fields.setdefault(name, []).append(value)
        self._pixels["images"].append(image)
        # A bit per pixel instead of a byte.
        self._pixels["masks_packed"].append(np.packbits(masks.astype(bool)))
        # Written by blocks: a data set need not fit into memory.
        if len(self._pixels["images"]) == BLOCK:
            self._flush()

    def _flush(self) -> None:
        for name, rows in self._pixels.items():
            block = np.stack(rows)
            shape = block.shape[1:]
            if name not in self._file:
                # Chunks of 16 images: a batch reads few bytes too many, a block reads few chunks.
                self._file.create_dataset(name, (0, *shape), block.dtype, maxshape=(None, *shape),
                                          chunks=(16, *shape), **self._packing)
            dataset = self._file[name]
            dataset.resize(len(dataset) + len(rows), axis=0)
            dataset[-len(rows):] = block
            rows.clear()
        self._disk.check()

    def _complete(self) -> None:
        self._disk.check()
        if not self._first:
            raise ValueError(f"{self.path}: nothing was written; expected at least one image")
        if self._pixels["images"]:
            self._flush()
        for name, values in self._fields.items():
            data = _fixed(values) if isinstance(values[0], str) else values
            self._file.create_dataset(name, data=data, **self._packing)
        # HDF5 writes its last bytes when it closes: only then is it known whether all had room.
        self._file.close()
        self._disk.check()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is None or error is self._disk.error:
            with self._stack:  # an error of this file is named by `whole_file`
                self._complete()
        else:  # an error of what the rows are read from is raised as it is
            with suppress(_Abandoned), self._stack:
                raise _Abandoned


def _fixed(text: str | Sequence[str]) -> np.ndarray:
    """Fixed-length UTF-8. Other text lies on a heap, which HDF5 2.0 reads without end if it is damaged.

    Bytes of a file's name that are no UTF-8, which Python holds as surrogates, become escapes."""
    encoded = np.char.encode(text, "utf-8", "backslashreplace")
    return encoded.astype(h5py.string_dtype("utf-8", max(1, encoded.dtype.itemsize)))
