"""Batches of a dataset by step number, for one of several processes, and their augmentation."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.dataset import ExpertDataset
from metadata_manager import Metadata

DEGREES = 15.0  # rotation, scale and shear of the augmentation of ISIC3 (App. 6)
SCALE = (0.9, 1.1)
SHEAR = 5.0  # degrees; the sources only say "small"

Augment = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Loader:
    """Batches by step number, so that a resumed run sees the images the uninterrupted one would have.

    loader(step) -> (image (b, c, h, w), masks (b, k, h, w)); `len(loader)` steps make an epoch, which visits
    every image once, in an order that depends only on (seed, epoch); its last batch may be smaller."""

    def __init__(self, dataset: ExpertDataset, batch_size: int, seed: int, device: torch.device | str = "cpu",
                 augment: Sequence[Augment] = (), rank: int = 0, ranks: int = 1,
                 per_annotator_loss: bool = True, with_style: bool = False):
        """Of several processes, number `rank` of `ranks` gets a part of each batch, see `_part`.

        augment: changes of (image, masks), one after the other, drawn from torch's global generator, which
        the training loop seeds by step and rank. per_annotator_loss: an annotator's loss does not depend on
        the other annotators' masks. with_style: batches also have the styles (b, k) int of the experts.
        Raises ValueError for a batch size below 1, and for styles that the data lacks."""
        if batch_size < 1:
            raise ValueError(f"batch size {batch_size}: expected at least 1")
        if with_style and dataset.store.style is None:
            raise ValueError(f"{dataset.store.path}: has no style of the experts' masks, as ISIC3 has; train "
                             "a --method that needs none")
        self.dataset = dataset.to(device)
        self.batch_size, self.seed, self.augment = batch_size, seed, augment
        self.rank, self.ranks, self.per_annotator_loss = rank, ranks, per_annotator_loss
        self.with_style = with_style
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        # Rounded up, as the last batch may be smaller.
        return -(-len(self.dataset) // self.batch_size)

    def __call__(self, step: int) -> tuple[Tensor, ...]:
        """This process's images of the batch of global step 0, 1, ..., with its annotators' masks."""
        images, annotators, _ = self._part(step)
        image, masks = self.dataset.batch(images)
        batch = image, masks[:, annotators]
        for change in self.augment:
            batch = change(*batch)
        if not self.with_style:
            return batch
        styles = self.dataset.styles(images)[:, annotators]
        return (*batch, styles.to(image.device, non_blocking=True))

    def indices(self, step: int) -> np.ndarray:
        """Items of the dataset in the whole batch of a step: a pure function of (seed, step)."""
        epoch, within = divmod(step, len(self))
        # Kept for the epoch, since a permutation of all images at each step would cost too much.
        if epoch != self._epoch:
            generator = np.random.RandomState((self.seed, epoch))
            self._epoch, self._order = epoch, generator.permutation(len(self.dataset))
        return self._order[within * self.batch_size:(within + 1) * self.batch_size]

    def weight(self, step: int) -> float:
        """The weight of this process's mean loss in that of the whole batch of a step, in (0, 1]."""
        return self._part(step)[2]

    def _part(self, step: int) -> tuple[np.ndarray, slice, float]:
        """This process's images of the batch, which of their annotators, and the weight of their mean loss.

        A process has every ranks-th image. Where there are fewer images than processes, an image's n
        processes have every n-th of its annotators. Three processes, one image, k = 2: annotators 0, 1, 0
        with weights 1/4, 1/2, 1/4.

        The weighted means add up to the batch's loss, the mean of l_ij over its b k pairs of image and
        annotator, in expectation over all that is drawn."""
        whole = self.indices(step)
        b = len(whole)
        if b >= self.ranks:
            images = whole[self.rank::self.ranks]
            return images, slice(None), len(images) / b
        part, image = divmod(self.rank, b)
        parts = len(range(image, self.ranks, b))  # processes of this image
        # A loss that needs all masks, as when samples of x_0 are assigned to experts, is not divided.
        k = self.dataset.store.annotators if self.per_annotator_loss else 1
        first = part % k
        # Processes beyond k repeat what others have, with other random numbers, and divide its weight.
        pairs, repeats = len(range(first, k, parts)), len(range(first, parts, k))
        annotators = slice(first, None, parts) if self.per_annotator_loss else slice(None)
        return whole[image:image + 1], annotators, pairs / (b * k * repeats)

    def size(self, step: int) -> int:
        """Images in the whole batch of a step."""
        return len(self.indices(step))

    def ids(self, step: int) -> list[str]:
        """Names of the images in the whole batch of a step, for a message about a bad one."""
        return self.dataset.subset(self.indices(step)).ids


def augmentations(metadata: Metadata) -> list[Augment]:
    """What the settings ask for, in the order in which it is applied to a batch."""
    return [augment] * metadata.augment + [dihedral] * metadata.dihedral


def dihedral(image: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Each square image of a batch, with its masks, in one of its 8 positions: flipped or not, 0 to 3 turns.

    image (b, c, s, s), masks (b, k, s, s) -> the same. Draws from torch's global CPU generator."""
    flipped, turns = torch.randint(2, (len(image),)), torch.randint(4, (len(image),))
    pixels = torch.arange(image.shape[-1] ** 2).view(image.shape[-2:])
    positions = torch.stack([torch.rot90(side, turn) for side in (pixels, pixels.flip(-1))
                             for turn in range(4)])
    # Pixels are gathered for the whole batch at once: on a GPU, a launch per image would cost more.
    positions, chosen = (x.to(image.device, non_blocking=True) for x in (positions, 4 * flipped + turns))
    source = positions.flatten(1)[chosen]

    def moved(x: Tensor) -> Tensor:
        return x.flatten(2).gather(2, source[:, None].expand(-1, x.shape[1], -1)).view_as(x)

    return moved(image), moved(masks)


def augment(image: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Flip, rotate, scale and shear each image of a batch at random, and its masks with it.

    image (b, c, h, w) in [0, 1], masks (b, k, h, w) of 0/1 -> the same shapes and ranges; outside is 0.
    Draws from torch's global CPU generator, whatever the device."""
    # Image by image: the numbers of one do not depend on how many follow.
    numbers = torch.stack([torch.rand(5) for _ in image])
    h, w = image.shape[2:]
    inverse = _inverse(*numbers.double().unbind(1))
    # From pixels to the coordinates of grid_sample, which are -1 and 1 at the image's borders.
    inverse = inverse * torch.tensor([w, h]) / torch.tensor([[w], [h]])
    theta = F.pad(inverse, (0, 1)).to(image.device, non_blocking=True)
    # In float64, for TF32 would round this product of matrices to a fraction of a pixel.
    grid = F.affine_grid(theta, list(image.shape), align_corners=False).float()
    moved = F.grid_sample(image, grid, mode="bilinear", align_corners=False).clamp(0, 1)
    # Nearest, so that masks stay 0 and 1.
    return moved, F.grid_sample(masks, grid, mode="nearest", align_corners=False)


def _inverse(side: Tensor, end: Tensor, turn: Tensor, grow: Tensor, slant: Tensor) -> Tensor:
    """Where a pixel of each moved image comes from, by five numbers (b,) in [0, 1): (b, 2, 2) on (x, y).

    x and y in pixels from the middle. The image is flipped along x, along y, then sheared along x, scaled and
    turned, as torchvision's `affine` does it."""
    angle, shear = torch.deg2rad(DEGREES * (2 * turn - 1)), torch.deg2rad(SHEAR * (2 * slant - 1))
    scale = SCALE[0] + (SCALE[1] - SCALE[0]) * grow
    # The inverse of scale, rotation and shear; the scale is divided out in the last line.
    x = torch.stack([angle.cos() - angle.sin() * shear.tan(), angle.cos() * shear.tan() + angle.sin()], dim=1)
    y = torch.stack([-angle.sin(), angle.cos()], dim=1)
    flips = torch.where(torch.stack([side, end], dim=1) < 0.5, -1.0, 1.0)
    return torch.stack([x, y], dim=1) * flips[:, :, None] / scale[:, None, None]
