"""The LIDC file of PHiSeg and CCDM: one HDF5 file with groups train, val and test, whose split is kept.

Each group has `images` (N, h, w) float, in [0, 1] or [-0.5, 0.5]; `labels` (N, h, w, 4) of 0/1; `uids` (N,),
CT series. Numbers published for PHiSeg and CCDM belong to this split.
"""

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from data.convert import Reader
from data.splits import FOLDS
from data.store import BLOCK, LayoutError, reading, stored_dataset
from data.writer import Writer

EXPERTS = 64  # at most: labels that were never written take no space, so that any number could be claimed


def is_phiseg(path: Path) -> bool:
    """Whether an HDF5 file has this layout; of others, and damaged ones, `data.store` says what is wrong."""
    try:
        with reading(path) as file:  # a link may lead to a file that nobody named
            return all(isinstance(file.get(fold, getlink=True), h5py.HardLink)
                       and isinstance(file[fold], h5py.Group) for fold in FOLDS)
    except ValueError:
        return False


def convert(files: Sequence[Path], writer: Writer) -> None:
    """Append every slice of the one file to a store; its id begins with its fold, see `splits.by_fold`.

    Images are quantised to 16 bits. Raises ValueError naming the file and group of a bad array."""
    (path,) = files
    with reading(path) as file:
        folds = {fold: _arrays(file[fold], f"{path}, {fold}") for fold in FOLDS}
        # A block at a time, as the images together may exceed the memory.
        lowest = min(float(images[first:first + BLOCK].min()) for images, _, _ in folds.values()
                     for first in range(0, len(images), BLOCK))
        # Copies of this file differ: in some intensities are centred on 0.
        shift = 0.5 if lowest < 0 else 0.0
        for fold, (images, labels, series) in folds.items():
            for first in tqdm(range(0, len(images), BLOCK), desc=fold, unit="block", disable=None):
                block = slice(first, first + BLOCK)
                for row, (image, label) in enumerate(zip(images[block] + shift, labels[block]), first):
                    _check(image, label, f"{path}, {fold}, row {row}")
                    # `_check` lets rounding errors of 1e-6 pass.
                    pixels = np.rint(np.clip(image, 0, 1) * 65535).astype(np.uint16)
                    writer.append(pixels, np.moveaxis(label, -1, 0), patient=str(series[row]),
                                  id=f"{fold}/{row}")


def _check(image: np.ndarray, label: np.ndarray, where: str) -> None:
    if not (image.min() >= -1e-6 and image.max() <= 1 + 1e-6):  # NaN fails both comparisons
        raise LayoutError(f"{where}: image ranges from {image.min():.4g} to {image.max():.4g}, expected "
                          "[0, 1], or [-0.5, 0.5] in the whole file")
    if not np.isin(label, (0, 1)).all():
        raise LayoutError(f"{where}: labels have values other than 0 and 1")


def _arrays(group: h5py.Group, where: str) -> tuple[h5py.Dataset, h5py.Dataset, np.ndarray]:
    """images (N, h, w), labels (N, h, w, k) and the series of each row (N,), their shapes checked."""
    images, uids = (stored_dataset(group, where, name) for name in ("images", "uids"))
    labels = stored_dataset(group, where, "labels", sparse=True)
    if (images.ndim != 3 or labels.shape[:-1] != images.shape or uids.shape != images.shape[:1]
            or labels.shape[-1] > EXPERTS):
        raise LayoutError(f"{where}: images {images.shape}, labels {labels.shape}, uids {uids.shape}; "
                          f"expected (N, h, w), (N, h, w, k) and (N,), k up to {EXPERTS}")
    is_text = h5py.check_string_dtype(uids.dtype) is not None
    return images, labels, uids.asstr()[...] if is_text else uids[...]


READER = Reader("file of PHiSeg", is_phiseg, convert=convert)
