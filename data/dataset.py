"""What training, validation and testing draw from: the images of one split."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data import isic3, lidc, mmis, phiseg, splits
from data.convert import converted
from data.store import Store, open_store
from metadata_manager import Metadata, experiment

READERS = {"lidc": lidc, "isic3": isic3, "mmis": mmis}  # of originals, by Metadata.reader


def load(what: str | Metadata, split: str) -> "ExpertDataset":
    """The images of one split ("train", "val", "test", or "train_prior": what the flow trains on).

    `train_prior` differs from `train` only under the released split. Converts the original on first use.
    Raises FileNotFoundError or ValueError naming the file or flag that is wrong."""
    metadata = experiment(what).metadata if isinstance(what, str) else what
    if split not in splits.SPLITS:
        raise ValueError(f"split {split!r}: unknown; expected one of {', '.join(splits.SPLITS)}")
    store = _store_of(metadata)
    try:
        rows = _split_rows(metadata, store)
    except ValueError as error:
        raise ValueError(f"{store.path}: {error}") from error
    if metadata.split == "released" and split == "test":
        both, total = splits.overlap(rows["train_prior"], rows["test"])
        print(f"{metadata.what}: split released: {both} of {total} test images ({both / total:.1%}) are in "
              "the training list; use --split group for a clean test", flush=True)
    if metadata.split.endswith("-val") and split == "test":
        print(f"{metadata.what}: split {metadata.split}: tested on the validation images, by which "
              "checkpoints were chosen: scores are too good; use --split "
              f"{metadata.split.removesuffix('-val')} for a clean test", flush=True)
    chosen = rows[split]
    if metadata.marked:
        kept = chosen[store.marked()[chosen]]
        print(f"{metadata.what}, {split}: {len(chosen) - len(kept)} of {len(chosen)} images that no expert "
              "marked are left out", flush=True)
        chosen = kept
    return ExpertDataset(store, chosen[:metadata.limit], metadata.crop)


def _store_of(metadata: Metadata) -> Store:
    path = Path(metadata.data_path).expanduser()
    if not metadata.data_path or not path.exists():
        raise FileNotFoundError(
            f"{metadata.what}: data_path '{metadata.data_path}' does not exist; edit PATHS in "
            f"metadata_manager.py, set ATFM_{metadata.what.upper()}_PATH or pass --data_path")
    if path.suffix.lower() in (".h5", ".hdf5") or path.is_file() and h5py.is_hdf5(path):
        store = converted(path, [path], phiseg.convert) if phiseg.is_phiseg(path) else open_store(path)
    else:
        if metadata.reader not in READERS:
            raise ValueError(f"{path}: not an .h5 file; make one of your cases with python -m data.prepare")
        reader = READERS[metadata.reader]
        store = converted(path, reader.files_of(path), reader.convert)
    for name, found, expected in (("annotators", store.annotators, metadata.annotators),
                                  ("image channels", store.shape[3], metadata.channels),
                                  ("pixels per side", store.shape[1:3], (metadata.size, metadata.size))):
        if found != expected:
            raise ValueError(f"{path}: {found} {name}, expected {expected} for {metadata.what}; "
                             "is it the right file?")
    return store


def _split_rows(metadata: Metadata, store: Store) -> dict[str, np.ndarray]:
    split, _, tested = metadata.split.partition("-")
    if split != "released":
        rows = (splits.by_patient(store.patient, metadata.split_seed) if split == "group"
                else splits.by_fold(store.ids, store.patient, metadata.split_seed))
        return rows | {"test": rows["val"]} if tested == "val" else rows
    if metadata.reader != "isic3":  # from here on: released
        return splits.released(len(store))
    if store.style is None:
        raise ValueError("has no style; --split released needs it, use --split group")
    return splits.released_isic(store.style)


class ExpertDataset(Dataset):
    """Images and their k expert masks x_1: (image (c, h, w) in [0, 1], masks (k, h, w) of 0/1), float32.

    Where images differ in their number of masks, an item has its own k_i of at most k.
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
        self._images: Tensor | None = None  # (m, h, w, c) of the m distinct rows
        self._masks: Tensor | None = None  # (m, bytes)
        self._position = np.unique(self.rows, return_inverse=True)[1]  # of each item in the two above

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, masks = self._stored([index])
        return image[0].contiguous(), masks[0, :self._experts([index])[0]].contiguous()

    def batch(self, indices: Sequence[int] | np.ndarray, device: torch.device | str | None = None
              ) -> tuple[Tensor, Tensor]:
        """Items as (image (b, c, h, w), masks (b, k, h, w)), on `device` or where the pixels are.

        An image with k_i < k masks gives each of them, and k - k_i more that are drawn among them by torch's
        global generator. A loss that averages l_j over the k masks is then in expectation
        (1 / k) [sum_j l_j + (k - k_i) mean_j l_j] = mean_j l_j, the mean over the k_i.
        b may be 0. Raises ValueError, naming the file, if its pixels cannot be read."""
        image, masks = self._stored(indices)
        if self.store.experts is not None:
            masks = _filled(masks, torch.from_numpy(self._experts(indices)))
        return image.contiguous().to(device), masks.contiguous().to(device)

    def _stored(self, indices: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        """Items as they are stored, cropped: (b, c, h, w), and (b, k, h, w) with zeros where no mask is."""
        images, packed = self._pixels()
        position = torch.from_numpy(self._position[np.asarray(indices, np.int64)])
        position = position.to(images.device, non_blocking=True)
        image = _unit_range(images[position]).permute(0, 3, 1, 2)
        masks = _unpacked(packed[position], self.store.annotators, *self.store.shape[1:3])
        return self._window(image), self._window(masks)

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
        self._images, self._masks = (pixels.to(device) for pixels in self._pixels())
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
        images, masks = self._pixels()
        digest = hashlib.blake2b(digest_size=8)
        layout = (tuple(images.shape), str(images.dtype), self.store.annotators, self.crop)
        digest.update(repr(layout).encode())
        arrays = [self.rows.astype("<i8"), images.cpu().numpy(), masks.cpu().numpy()]
        if self.store.experts is not None:
            arrays.append(self.store.experts[self.rows].astype("<i8"))
        for array in arrays:
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def _pixels(self) -> tuple[Tensor, Tensor]:
        if self._images is None or self._masks is None:
            images, masks = self.store.read(np.unique(self.rows))
            if images.dtype == np.uint16:
                images = images.view(np.int16)  # torch indexes int16 on every device, uint16 not
            self._images, self._masks = torch.from_numpy(images), torch.from_numpy(masks)
        return self._images, self._masks

    def _window(self, pixels: Tensor) -> Tensor:
        if self.crop is None:
            return pixels
        top, left = ((side - self.crop) // 2 for side in pixels.shape[-2:])
        return pixels[..., top:top + self.crop, left:left + self.crop]


def _unit_range(images: Tensor) -> Tensor:
    """uint8, or uint16 seen as int16, to float32 in [0, 1]."""
    if images.dtype == torch.int16:
        return (images.int() & 0xFFFF).float() / 65535
    return images.float() / 255


def _unpacked(packed: Tensor, annotators: int, height: int, width: int) -> Tensor:
    """The inverse of np.packbits: (b, bytes) uint8 to (b, k, h, w) float32 of 0/1."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    bits = ((packed[:, :, None] >> shifts) & 1).flatten(1)[:, :annotators * height * width]
    return bits.unflatten(1, (annotators, height, width)).float()


def _filled(masks: Tensor, experts: Tensor) -> Tensor:
    """(b, k, h, w) whose first k_i = experts[b] masks are given: the others become random ones of these."""
    b, k = masks.shape[:2]
    slot = torch.arange(k).expand(b, k)
    drawn = (torch.rand(b, k) * experts[:, None]).long()
    chosen = torch.where(slot < experts[:, None], slot, drawn).to(masks.device, non_blocking=True)
    return masks[torch.arange(b, device=masks.device)[:, None], chosen]
