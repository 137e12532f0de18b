"""MMIS-2024 task 1, nasopharyngeal carcinoma: training/, validation/ and testing/ with Sample_<k>.h5.

A file is a patient with `t1`, `t1c`, `t2` float (z, h, w) and `label_a1` ... `label_a4` of 0/1. The 2-D files
training_2d/Sample_<k>_slice_<z>.h5 have the same as (h, w); they are read where a fold has no volumes.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.convert import Reader, files_in
from data.images import Fit
from data.splits import FOLDS, fold_of
from data.store import SUFFIXES, LayoutError, reading, stored_dataset
from data.volumes import unit_range
from data.writer import Writer

MODALITIES = ("t1", "t1c", "t2")
LABELS = ("label_a1", "label_a2", "label_a3", "label_a4")
SIDE = 128  # pixels, as CFM has it


def is_mmis(folder: Path) -> bool:
    """Whether a folder has one of the folders of MMIS with an .h5 file in it."""
    return folder.is_dir() and any(fold_of(path.name) and files_in(path, *SUFFIXES)
                                   for path in folder.iterdir() if path.is_dir())


def files_of(original: Path) -> list[Path]:
    """The files of all folds, volumes rather than 2-D ones. Raises ValueError if none is for training."""
    files_of_fold: dict[str, list[Path]] = {}
    folders = [path for path in original.iterdir() if path.is_dir()] if original.is_dir() else []
    # 2-D folders come last, and are read only if their fold has no volumes.
    for folder in sorted(folders, key=lambda path: path.name.lower().endswith("_2d")):
        fold = fold_of(folder.name)
        if fold and not files_of_fold.get(fold):
            files_of_fold[fold] = files_in(folder, *SUFFIXES)
    if not files_of_fold.get("train"):
        raise ValueError(f"{original}: no training/Sample_<k>.h5 or training_2d/Sample_<k>_slice_<z>.h5; "
                         "expected MMIS2024TASK1, the folder with training, validation and testing in it")
    return [path for fold in FOLDS for path in files_of_fold.get(fold, [])]


def convert(files: Sequence[Path], writer: Writer) -> None:
    """Append every slice to a store, fitted into 128 x 128 pixels; its id begins with its fold.

    The three modalities of a file are scaled together, from their minimum to their maximum. Raises ValueError
    naming the file with a wrong array, or whose patient is another's in another fold."""
    fold_of_content: dict[bytes, Path] = {}
    for path in tqdm(files, desc="MMIS", unit="file", disable=None):
        image, masks = _arrays(path)
        fold, content = fold_of(path.parent.name), hashlib.sha256(image.tobytes()).digest()
        # Numbers of patients begin anew in each fold: only by its content is a copy in two folds known.
        twin = fold_of_content.setdefault(content, path)
        # Two black images are equal without being copies.
        if np.ptp(image) and fold_of(twin.parent.name) != fold:
            raise LayoutError(f"{path}: the same image as {twin}, in another fold; a patient belongs to one")
        # The name of a 2-D file says which slice of which patient it is.
        flat = re.fullmatch(r"(.+)_slice_(\d+)", path.stem)
        patient, first = (flat[1], int(flat[2])) if flat else (path.stem, 0)
        pixels = torch.from_numpy(np.moveaxis(unit_range(image), 0, 1)).float()  # (z, c, h, w)
        fit = Fit(image.shape[2], image.shape[3], SIDE, grow=True)
        experts = torch.from_numpy(np.moveaxis(masks, 0, 1))  # (z, k, h, w)
        for z, (slice_, its_masks) in enumerate(zip(pixels, experts), first):
            writer.append(fit.put_pixels(slice_), fit.put_masks(its_masks).numpy(),
                          patient=f"{fold}/{patient}", id=f"{fold}/{patient}/{z:03d}", slice=z,
                          file=str(path), height=fit.height, width=fit.width)


def _arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Image (3, z, h, w) float and masks (4, z, h, w) bool of a file; z is 1 for a 2-D one.

    A label that was created and never written is an empty mask. Raises LayoutError naming a wrong array."""
    with reading(path) as file:
        datasets = {name: stored_dataset(file, path, name, sparse=name in LABELS)
                    for name in (*MODALITIES, *LABELS)}
        shape = datasets["t1"].shape
        for name, dataset in datasets.items():  # before any is read, for an empty label may claim any size
            if dataset.shape != shape or dataset.ndim not in (2, 3) or dataset.dtype.kind not in "buif":
                raise LayoutError(f"{path}: {name} is {dataset.dtype} {dataset.shape}, expected numbers "
                                  f"{shape} as t1, (z, h, w) or (h, w)")
        arrays = {name: dataset[...] for name, dataset in datasets.items()}
    for name, array in arrays.items():
        if name in MODALITIES and not np.isfinite(array).all():
            raise LayoutError(f"{path}: {name} has values that are NaN or infinite")
        if name in LABELS and not np.isin(array, (0, 1)).all():
            raise LayoutError(f"{path}: {name} has values other than 0 and 1")
    # reshape gives 2-D files the axis z, of length 1.
    image, masks = (np.stack([arrays[name] for name in names]).reshape(len(names), -1, *shape[-2:])
                    for names in (MODALITIES, LABELS))
    return image.astype(np.float64), masks.astype(bool)


READER = Reader("MMIS folder", is_mmis, files_of, convert, fit="enlarged")
