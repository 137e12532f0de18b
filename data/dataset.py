"""What training, validation and testing draw from: the images of one split."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data import splits
from data.convert import Reader, converted
from data.readers import reader_called, reader_of
from data.store import BLOCK, Store, is_hdf5, open_store
from metadata_manager import Metadata, dataset


def load(what: str | Metadata, split: str) -> "ExpertDataset":
    """The images of one split ("train", "val", "test", or "train_prior": what the flow trains on).

    `train_prior` differs from `train` only under the released split. Converts the original on first use.
    Raises FileNotFoundError or ValueError naming the file or flag that is wrong."""
    metadata = dataset(what) if isinstance(what, str) else what
    if split not in splits.SPLITS:
        raise ValueError(f"split {split!r}: unknown; expected one of {', '.join(splits.SPLITS)}")
    store = _store_of(metadata)
    try:
        rows = _split_rows(metadata, store)
    except ValueError as error:
        raise ValueError(f"{store.path}: {error}") from error
    if split == "test":
        _print_what_scores_mean(metadata, rows)
    chosen = rows[split]
    if metadata.marked:
        kept = chosen[store.marked()[chosen]]
        print(f"{metadata.what}, {split}: {len(chosen) - len(kept)} of {len(chosen)} images that no expert "
              "marked are left out", flush=True)
        chosen = kept
    return ExpertDataset(store, chosen[:metadata.limit], metadata.crop)


def _store_of(metadata: Metadata) -> Store:
    """The store of a data set, its original converted on first use. Errors as of `load`."""
    path = Path(metadata.data_path).expanduser()
    reader: Reader | None = reader_called(metadata.reader)
    if not metadata.data_path or not path.exists():
        raise FileNotFoundError(
            f"{metadata.what}: data_path '{metadata.data_path}' does not exist; edit PATHS in "
            f"metadata_manager.py, set ATFM_{metadata.what.upper()}_PATH or pass --data_path")
    # An .h5 file is a store or, like PHiSeg's, an original: its content says which.
    if is_hdf5(path):
        reader = reader_of(path)
    if reader is None:
        store = open_store(path)
    elif reader.convert is None:
        raise ValueError(f"{path}: not an .h5 file; make one of your cases with python -m data.prepare")
    else:
        store = converted(path, reader.files_of(path), reader.convert)
    for name, value, expected in (("annotators", store.annotators, metadata.annotators),
                                  ("image channels", store.shape[3], metadata.channels),
                                  ("pixels per side", store.shape[1:3], (metadata.size, metadata.size))):
        if value != expected:
            raise ValueError(f"{path}: {value} {name}, expected {expected} for {metadata.what}; "
                             "is it the right file?")
    return store


def _split_rows(metadata: Metadata, store: Store) -> dict[str, np.ndarray]:
    """The rows of each split of SPLITS. Raises ValueError where the store cannot be split so."""
    split, _, tested = metadata.split.partition("-")
    if split == "released":
        return reader_called(metadata.reader).released(store)
    rows = (splits.by_patient(store.patient, metadata.split_seed) if split == "group"
            else splits.by_fold(store.ids, store.patient, metadata.split_seed))
    # group-val and file-val test on the validation images.
    return rows | {"test": rows["val"]} if tested == "val" else rows


def _print_what_scores_mean(metadata: Metadata, rows: dict[str, np.ndarray]) -> None:
    """Prints a line if scores on the test images are too good, as these were trained or chosen on."""
    if metadata.split == "released":
        both, total = splits.overlap(rows["train_prior"], rows["test"])
        print(f"{metadata.what}: split released: {both} of {total} test images ({both / total:.1%}) are in "
              "the training list; use --split group for a clean test", flush=True)
    if metadata.split.endswith("-val"):
        print(f"{metadata.what}: split {metadata.split}: tested on the validation images, by which "
              "checkpoints were chosen: scores are too good; use --split "
              f"{metadata.split.removesuffix('-val')} for a clean test", flush=True)


class ExpertDataset(Dataset):
    """Images and their k expert masks x_1: (image (c, h, w) in [0, 1], masks (k, h, w) of 0/1), float32.

    Where images differ in their number of masks, item i has k_i <= k masks.
    Pixels are read on first use and kept as integers (8 or 16 bits per pixel, 1 bit per mask pixel)."""

    def __init__(self, store: Store, rows: np.ndarray, crop: int | None = None):
        """Items are `rows` of `store`, which may repeat; `crop` keeps the central crop x crop pixels.

        Raises ValueError if there are no rows or the crop is larger than the image."""
        height, width = store.shape[1:3]
        if len(rows) == 0:
            raise ValueError(f"{store.path}: no image in this split, expected at least one; if the data came "
                             "split without test images, --split file-val tests on the validation images")
        if crop is not None and not 1 <= crop <= min(height, width):
            raise ValueError(f"--crop {crop}: {store.path} has images of {height} x {width} pixels; "
                             f"choose 1 to {min(height, width)}")
        self.store, self.rows, self.crop = store, np.asarray(rows), crop
        self._in_memory: tuple[Tensor, Tensor] | None = None  # of the m distinct rows, see `_read`
        self._position = np.unique(self.rows, return_inverse=True)[1]  # of each item among these

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, masks = self._stored([index])
        return image[0].contiguous(), masks[0, :self._experts([index])[0]].contiguous()

    def batch(self, indices: Sequence[int] | np.ndarray, device: torch.device | str | None = None
              ) -> tuple[Tensor, Tensor]:
        """Items as (image (b, c, h, w), masks (b, k, h, w)), on `device` or where the pixels are; b may be 0.

        An image with k_i < k masks gives each of them, and k - k_i more that are drawn among them by torch's
        global generator: the mean loss over the k masks is in expectation the mean over the k_i.
        Raises ValueError, naming the file, if its pixels cannot be read."""
        image, masks = self._stored(indices)
        if self.store.experts is not None:
            masks = _filled(masks, torch.from_numpy(self._experts(indices)))
        return image.contiguous().to(device), masks.contiguous().to(device)

    def _stored(self, indices: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        """Items as they are stored, cropped: (b, c, h, w), and (b, k, h, w) with zeros where no mask is."""
        images, packed = self._pixels()
        position = torch.from_numpy(self._position[np.asarray(indices, np.int64)])
        # Batches are put together where the pixels are: only indices travel to a GPU.
        position = position.to(images.device, non_blocking=True)
        image = _unit_range(images[position]).permute(0, 3, 1, 2)
        masks = _unpacked(packed[position], self.store.annotators, *self.store.shape[1:3])
        side = self.crop
        if side is None:
            return image, masks
        top, left = ((length - side) // 2 for length in image.shape[2:])
        return image[..., top:top + side, left:left + side], masks[..., top:top + side, left:left + side]

    def _experts(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """k_i of each item, (b,) int64."""
        rows = self.rows[np.asarray(indices, np.int64)]
        if self.store.experts is None:
            return np.full(len(rows), self.store.annotators)
        return self.store.experts[rows].astype(np.int64)

    def styles(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """The styles (b, k) int64 in which the experts of items drew, of ISIC3 only: 0, 1, 2 for f, m, p."""
        assert self.store.style is not None  # checked by Loader
        return torch.from_numpy(self.store.style[self.rows[np.asarray(indices, np.int64)]].astype(np.int64))

    def to(self, device: torch.device | str) -> "ExpertDataset":
        """This dataset, its compact pixels moved to a device, where batches are assembled from then on."""
        images, masks = self._pixels()
        self._in_memory = images.to(device), masks.to(device)
        return self

    def subset(self, indices: Sequence[int] | np.ndarray) -> "ExpertDataset":
        """The items `indices`, in this order. Raises ValueError if there are none."""
        return ExpertDataset(self.store, self.rows[np.asarray(indices, np.int64)], self.crop)

    def spread(self, count: int) -> "ExpertDataset":
        """`count` items evenly spaced from first to last, or all if there are fewer."""
        spaced = np.linspace(0, len(self) - 1, min(count, len(self)))
        return self.subset(np.unique(spaced.round().astype(int)))

    @property
    def ids(self) -> list[str]:
        """How to name each item in a message."""
        return [self.store.ids[row] for row in self.rows]

    @property
    def patients(self) -> np.ndarray:
        """The patient (LIDC) or image id (ISIC3) of each item, (len,)."""
        return self.store.patient[self.rows]

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with the rows, the crop or any pixel of them, not with the path."""
        rows = np.unique(self.rows)
        first = next(self._blocks(rows))[0]
        # The same bytes may be pixels of another shape, so the shape counts too.
        layout = ((len(rows), *first.shape[1:]), str(first.dtype), self.store.annotators, self.crop)
        digest = hashlib.blake2b(repr(layout).encode(), digest_size=8)
        # Little-endian int64 on every machine, so that fingerprints can be compared.
        digest.update(self.rows.astype("<i8").data)
        for part in (0, 1):  # all images, then all masks
            for pixels in self._blocks(rows):
                digest.update(np.ascontiguousarray(pixels[part].cpu().numpy()).data)
        if self.store.experts is not None:
            digest.update(self.store.experts[self.rows].astype("<i8").data)
        return digest.hexdigest()

    def _blocks(self, rows: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """All pixels at once where they are in memory, else a block at a time, for a file may be larger."""
        if self._in_memory is not None:
            yield self._in_memory
            return
        for first in range(0, len(rows), BLOCK):
            yield self._read(rows[first:first + BLOCK])

    def _pixels(self) -> tuple[Tensor, Tensor]:
        if self._in_memory is None:
            # Each row once, even where items repeat it, as in the authors' lists of ISIC3.
            self._in_memory = self._read(np.unique(self.rows))
        return self._in_memory

    def _read(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Images (m, h, w, c) uint8 or int16 and masks (m, bytes) uint8 of ascending, distinct rows."""
        images, masks = self.store.read(rows)
        if images.dtype == np.uint16:
            images = images.view(np.int16)  # torch indexes int16 on every device, uint16 not
        return torch.from_numpy(images), torch.from_numpy(masks)


def _unit_range(images: Tensor) -> Tensor:
    """uint8, or the bits of uint16 as int16, to float32 in [0, 1]."""
    if images.dtype == torch.int16:
        # Values above 32767 are negative as int16: the mask undoes that.
        return (images.int() & 0xFFFF).float() / 65535
    return images.float() / 255


def _unpacked(packed: Tensor, annotators: int, height: int, width: int) -> Tensor:
    """The inverse of np.packbits: (b, bytes) uint8 to (b, k, h, w) float32 of 0/1."""
    # np.packbits puts the first pixel into the highest bit.
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    # The bits that only fill the last byte are cut off.
    bits = ((packed[:, :, None] >> shifts) & 1).flatten(1)[:, :annotators * height * width]
    return bits.unflatten(1, (annotators, height, width)).float()


def _filled(masks: Tensor, experts: Tensor) -> Tensor:
    """(b, k, h, w) whose first k_i = experts[b] masks are given: the others become random ones of these."""
    b, k = masks.shape[:2]
    slot = torch.arange(k).expand(b, k)
    # rand is below 1, so the index is below k_i.
    drawn = (torch.rand(b, k) * experts[:, None]).long()
    chosen = torch.where(slot < experts[:, None], slot, drawn).to(masks.device, non_blocking=True)
    return masks[torch.arange(b, device=masks.device)[:, None], chosen]
