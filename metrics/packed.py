"""Large masks, such as volumes, as bits, an eighth of a byte per pixel; scored some pixels at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from metrics.overlap import Block

BLOCK = 2**20  # pixels of all masks together that are scored at once: about 70 MB


def pack(mask: np.ndarray) -> np.ndarray:
    """A mask of any shape, bool -> its bits, (ceil(pixels / 8),) uint8."""
    return np.packbits(mask, axis=None)


@dataclass(frozen=True)
class PackedSets:
    """Samples and experts' masks of one image by `pack`; iterating gives blocks of their pixels.

    It may be iterated several times, once for each score that needs the pixels."""

    samples: Sequence[np.ndarray]
    masks: Sequence[np.ndarray]
    pixels: int

    def __iter__(self) -> Iterator[Block]:
        """(1, n, 1, m) and (1, k, 1, m) bool, for the next m pixels."""
        step = 8 * max(1, BLOCK // (8 * (len(self.samples) + len(self.masks))))
        for start in range(0, self.pixels, step):
            count = min(step, self.pixels - start)
            yield self._block(self.samples, start, count), self._block(self.masks, start, count)

    @staticmethod
    def _block(packed: Sequence[np.ndarray], start: int, count: int) -> torch.Tensor:
        bits = np.stack([mask[start // 8:-(-(start + count) // 8)] for mask in packed])
        return torch.from_numpy(np.unpackbits(bits, axis=1, count=count)).view(torch.bool)[None, :, None]
