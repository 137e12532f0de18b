"""Training batches by step number, so that a resumed run sees the images the uninterrupted one would have."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from data.slices import Slices

Augment = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Batches:
    """batches(step) -> (image (b, c, h, w), masks (b, k, h, w)); `len(batches)` steps make an epoch.

    Each epoch visits every image once, in an order that depends on (seed, epoch) alone; its last batch may be
    smaller than the others."""

    def __init__(self, dataset: Slices, batch_size: int, seed: int, device: torch.device | str = "cpu",
                 augment: Augment | None = None):
        """`augment(image, masks)` draws from torch's global generator, which the training loop seeds by step.

        Raises ValueError for an empty batch."""
        if batch_size < 1:
            raise ValueError(f"batch size {batch_size}: expected at least 1")
        self.dataset = dataset.to(device)
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        image, masks = self.dataset.batch(self.rows(step))
        return (image, masks) if self.augment is None else self.augment(image, masks)

    def rows(self, step: int) -> np.ndarray:
        """Items of the dataset in the batch of global step 0, 1, ...: a pure function of (seed, step)."""
        epoch, within = divmod(step, len(self))
        if epoch != self._epoch:
            generator = np.random.RandomState((self.seed, epoch))
            self._epoch, self._order = epoch, generator.permutation(len(self.dataset))
        return self._order[within * self.batch_size:(within + 1) * self.batch_size]

    def ids(self, step: int) -> list[str]:
        """Names of the images of a step, for a message about a bad batch."""
        names = self.dataset.ids
        return [names[row] for row in self.rows(step)]
