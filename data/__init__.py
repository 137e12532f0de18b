"""Images with several expert masks each: one file per source format, one on-disk layout, one dataset class.

data.load("LIDC", "train")[i] -> (image (c, h, w) float32 in [0, 1], masks (k, h, w) float32 of 0/1)
"""

from pathlib import Path

import numpy as np

from data import isic3, lidc, phiseg, splits
from data.batches import Batches
from data.cache import Cache, Writer, cached, open_cache
from data.slices import Slices
from metadata_manager import Metadata, experiment

__all__ = ["Batches", "Slices", "Writer", "load"]


def load(what: str | Metadata, split: str) -> Slices:
    """The images of one split ("train", "val", "test", or "train_prior": what the flow trains on).

    `train_prior` differs from `train` only under the released split. Converts the source on first use.
    Raises FileNotFoundError or ValueError naming the file or flag that is wrong."""
    described = experiment(what).metadata if isinstance(what, str) else what
    if split not in splits.SPLITS:
        raise ValueError(f"split {split!r}: unknown; expected one of {', '.join(splits.SPLITS)}")
    if described.limit is not None and described.limit < 1:
        raise ValueError(f"--limit {described.limit}: expected at least 1 image")
    cache = _open_source(described)
    try:
        rows = _split_rows(described, cache)
    except ValueError as error:
        raise ValueError(f"{cache.path}: {error}") from error
    if described.split == "released" and split == "test":
        both, total = splits.overlap(rows["train_prior"], rows["test"])
        print(f"{described.what}: split released: {both} of {total} test images ({both / total:.1%}) are in "
              "the training list; use --split group for a clean test", flush=True)
    return Slices(cache, rows[split][:described.limit], described.crop)


def _open_source(described: Metadata) -> Cache:
    path = Path(described.data_path).expanduser()
    if not described.data_path or not path.exists():
        raise FileNotFoundError(
            f"{described.what}: data_path '{described.data_path}' does not exist; edit PATHS in "
            f"metadata_manager.py, set ATFM_{described.what.upper()}_PATH or pass --data_path")
    if path.suffix in (".h5", ".hdf5"):
        cache = cached(path, [path], phiseg.convert) if phiseg.is_phiseg(path) else open_cache(path)
    else:
        reader = {"lidc": lidc, "isic3": isic3}[described.reader]
        cache = cached(path, reader.source_files(path), reader.convert)
    for what, found, expected in (("annotators", cache.annotators, described.annotators),
                                  ("image channels", cache.shape[3], described.channels),
                                  ("pixels per side", cache.shape[1:3], (described.size, described.size))):
        if found != expected:
            raise ValueError(f"{path}: {found} {what}, expected {expected} for {described.what}; "
                             "is it the right file?")
    return cache


def _split_rows(described: Metadata, cache: Cache) -> dict[str, np.ndarray]:
    if described.split == "group":
        return splits.by_group(cache.patient, described.split_seed)
    if described.split == "released" and described.reader == "isic3":
        if cache.style is None:
            raise ValueError("has no style; --split released needs it, use --split group")
        return splits.released_isic(cache.style)
    if described.split == "released":
        return splits.released(len(cache))
    if described.split == "file":
        return phiseg.folds(cache.ids)
    raise ValueError(f"--split {described.split}: unknown; expected group, released or file")
