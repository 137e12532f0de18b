"""The rows of one split, as images and expert masks: what training, validation and testing draw from."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.cache import Cache


class Slices(Dataset):
    """Images and their k expert masks x_1: (image (c, h, w) in [0, 1], masks (k, h, w) of 0/1), float32.

    Pixels are read on first use and kept as integers (8 or 16 bits per pixel, 1 bit per mask pixel)."""

    def __init__(self, cache: Cache, rows: np.ndarray, crop: int | None = None):
        """Rows of `cache`, which may repeat; `crop` keeps the central crop x crop pixels.

        Raises ValueError if there are no rows or the crop is larger than the image."""
        height, width = cache.shape[1:3]
        if len(rows) == 0:
            raise ValueError(f"{cache.path}: no image in this split; expected at least one")
        if crop is not None and not 1 <= crop <= min(height, width):
            raise ValueError(f"--crop {crop}: {cache.path} has images of {height} x {width} pixels; "
                             f"choose 1 to {min(height, width)}")
        self.cache = cache
        self.rows = np.asarray(rows)
        self.crop = crop
        self._images: Tensor | None = None  # (m, h, w, c) of the m distinct rows
        self._masks: Tensor | None = None  # (m, bytes)
        self._position = np.unique(self.rows, return_inverse=True)[1]  # of item i in the two above

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image, masks = self.batch([i])
        return image[0], masks[0]

    def batch(self, rows: Sequence[int] | np.ndarray, device: torch.device | str | None = None
              ) -> tuple[Tensor, Tensor]:
        """Items `rows` as (image (b, c, h, w), masks (b, k, h, w)), on `device` or where the pixels are."""
        images, packed = self._pixels()
        position = torch.from_numpy(self._position[np.asarray(rows)]).to(images.device)
        image = _unit_range(images[position]).permute(0, 3, 1, 2)
        masks = _unpack(packed[position], self.cache.annotators, *self.cache.shape[1:3])
        return self._window(image).contiguous().to(device), self._window(masks).contiguous().to(device)

    def to(self, device: torch.device | str) -> "Slices":
        """Move the compact pixels to a device, once; batches are then assembled there."""
        self._images, self._masks = (pixels.to(device) for pixels in self._pixels())
        return self

    @property
    def ids(self) -> list[str]:
        """How to name each item in a message."""
        return [self.cache.ids[row] for row in self.rows]

    @property
    def groups(self) -> np.ndarray:
        """The patient (LIDC) or image id (ISIC3) of each item, (len,)."""
        return self.cache.patient[self.rows]

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with the rows, the crop or any pixel of this split, not with the path."""
        images, masks = self._pixels()
        digest = hashlib.blake2b(digest_size=8)
        layout = (tuple(images.shape), str(images.dtype), self.cache.annotators, self.crop)
        digest.update(repr(layout).encode())
        for array in (self.rows.astype("<i8"), images.cpu().numpy(), masks.cpu().numpy()):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def _pixels(self) -> tuple[Tensor, Tensor]:
        if self._images is None or self._masks is None:
            images, masks = self.cache.read(np.unique(self.rows))
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


def _unpack(packed: Tensor, annotators: int, height: int, width: int) -> Tensor:
    """The inverse of np.packbits: (b, bytes) uint8 to (b, k, h, w) float32 of 0/1."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    bits = (packed[:, :, None] >> shifts) & 1
    pixels = bits.flatten(1)[:, :annotators * height * width]
    return pixels.reshape(-1, annotators, height, width).float()
