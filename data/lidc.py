"""The LIDC pickle: a folder of .pickle files, each {key: {"image", "masks", "series_uid"}}.

`image` is a float array (h, w) in [0, 1], `masks` a list of 4 arrays (h, w) of 0/1, `series_uid` a str.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.convert import Reader, files_in
from data.safe_pickle import PickledArray, describe, read_pickle
from data.store import is_hdf5, nfc
from data.writer import Writer

ANNOTATORS = 4
NAME_LENGTH = 1000
SUFFIXES = (".pickle", ".pkl", ".pck", ".p")


def is_lidc(path: Path) -> bool:
    """Whether a folder has pickles; a file that is not HDF5 is taken for one: `read_pickle` checks it."""
    return not is_hdf5(path) if path.is_file() else bool(files_in(path, *SUFFIXES))


def files_of(original: Path) -> list[Path]:
    """The pickles of a folder by name, or the one given. Raises ValueError if there is none."""
    files = [original] if original.is_file() else files_in(original, *SUFFIXES)
    if not files:
        raise ValueError(f"{original}: no .pickle or .pkl file in this folder; expected the LIDC pickles "
                         "(for an .h5 file give the path of the file itself)")
    return files


def convert(files: Sequence[Path], writer: Writer) -> None:
    """Append every slice of the pickles to a store, in their order; one file is in memory at a time.

    Images are quantised to 16 bits (error below 1e-5). Raises ValueError naming the file and key at fault."""
    file_of_key: dict[str, Path] = {}
    patient_of_series: dict[str, str] = {}
    shape: tuple[int, ...] | None = None
    for file in files:
        slices, bytes_left = read_pickle(file), file.stat().st_size
        if not isinstance(slices, dict) or not slices:
            raise ValueError(f"{file}: holds {describe(slices)}, expected a dict of slices that is not empty")
        for key, entry in tqdm(slices.items(), desc=file.name, unit="slice", disable=None):
            where = f"{file}, key {key[:80]!r}"
            # Keys go into messages and the store: no control characters, no endless text.
            _check_name(key, "key", where)
            # A slice that is in two files could be in training and in testing.
            if file_of_key.setdefault(nfc(key), file) != file:
                raise ValueError(f"{where}: also in {file_of_key[nfc(key)]}; expected every key once")
            image, masks, series = _checked(entry, where)
            if image.shape != (shape := shape or image.shape):
                raise ValueError(f"{where}: image of shape {image.shape}, expected {shape} like the first")
            bytes_left -= image.nbytes
            if bytes_left < 0:  # else a small file could fill the disk by naming one image again and again
                raise ValueError(f"{where}: more image data than bytes in the file; is it forged?")
            # A patient may have two series: the patient is the group if keys name it. No series is divided.
            named = re.fullmatch(r"(LIDC-IDRI-\d{4})_nodule(\d{1,9})_slice(\d{1,9})", key, re.ASCII)
            fields = {"nodule": int(named[2]), "slice": int(named[3])} if named else {}
            patient = named[1] if named else series
            # Otherwise a split by patient would divide the series.
            if patient_of_series.setdefault(series, patient) != patient:
                raise ValueError(f"{where}: series {series} is of patient {patient_of_series[series]} by "
                                 "another key; expected one patient for each series")
            # 16 bits: half the size of float32, and finer than the steps of a scanner.
            pixels = np.rint(image.astype(np.float64) * 65535).astype(np.uint16)
            writer.append(pixels, masks, patient=patient, id=key, series=series, **fields)


def _check_name(text: Any, name: str, where: str) -> None:
    if not (isinstance(text, str) and 1 <= len(text) <= NAME_LENGTH and text.isprintable()):
        raise ValueError(f"{where}: {name} is {describe(text)}, expected 1 to {NAME_LENGTH} printable "
                         "characters")


def _checked(entry: Any, where: str) -> tuple[np.ndarray, np.ndarray, str]:
    """Image (h, w), masks (4, h, w) and series of one slice, or ValueError beginning with `where`."""
    if not isinstance(entry, dict) or not {"image", "masks", "series_uid"} <= set(entry):
        content = ", ".join(map(repr, entry)) if isinstance(entry, dict) else describe(entry)
        raise ValueError(f"{where}: holds {content[:150]}; expected a dict with image, masks and series_uid")
    image, masks, series = entry["image"], entry["masks"], entry["series_uid"]
    _check_name(series, "series_uid", where)
    if not isinstance(image, PickledArray) or image.values.ndim != 2 or image.values.size == 0:
        raise ValueError(f"{where}: image is {describe(image)}, expected an array (h, w)")
    pixels = image.values
    if not (pixels.min() >= 0 and pixels.max() <= 1):  # NaN fails both comparisons
        raise ValueError(f"{where}: image from {pixels.min():.4g} to {pixels.max():.4g}, expected in [0, 1]")
    if not isinstance(masks, (list, tuple)) or len(masks) != ANNOTATORS:
        raise ValueError(f"{where}: masks is {describe(masks)}, expected a list of {ANNOTATORS}")
    for number, mask in enumerate(masks):
        if not isinstance(mask, PickledArray) or mask.values.shape != pixels.shape:
            raise ValueError(f"{where}: mask {number} is {describe(mask)}, expected an array {pixels.shape}")
        if not np.isin(mask.values, (0, 1)).all():
            raise ValueError(f"{where}: mask {number} has values other than 0 and 1")
    return pixels, np.stack([mask.values for mask in masks]).astype(np.uint8), series


READER = Reader("LIDC pickles", is_lidc, files_of, convert)
