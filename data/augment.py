"""Random flips, rotation, scale and shear of training images together with their masks (ISIC3, App. 6)."""

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

DEGREES = 15.0
SCALE = (0.9, 1.1)
SHEAR = 5.0  # degrees; the sources only say "small"


def augment(image: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Move every image of a batch, and its masks with it, by a random affine map of its own.

    image (b, c, h, w) in [0, 1], masks (b, k, h, w) of 0/1 -> the same shapes and ranges; outside is 0.
    Draws from torch's global CPU generator, whatever the device."""
    moved = [_move(one, its_masks, *torch.rand(5).tolist()) for one, its_masks in zip(image, masks)]
    images, moved_masks = zip(*moved)
    return torch.stack(images), torch.stack(moved_masks)


def _move(image: Tensor, masks: Tensor, side: float, end: float, turn: float, grow: float, slant: float
          ) -> tuple[Tensor, Tensor]:
    """One image and its masks by five numbers in [0, 1): two flips, rotation, scale, shear."""
    for flip, chance in ((functional.horizontal_flip, side), (functional.vertical_flip, end)):
        if chance < 0.5:
            image, masks = flip(image), flip(masks)
    affine = {
        "angle": DEGREES * (2 * turn - 1),
        "translate": [0, 0],
        "scale": SCALE[0] + (SCALE[1] - SCALE[0]) * grow,
        "shear": [SHEAR * (2 * slant - 1), 0.0],
    }
    image = functional.affine(image, interpolation=InterpolationMode.BILINEAR, **affine).clamp(0, 1)
    return image, functional.affine(masks, interpolation=InterpolationMode.NEAREST, **affine)
