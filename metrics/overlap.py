"""Overlap of binary masks, IoU and Dice between all pairs of two sets, from which App. 7's scores follow.

|a ∩ c| of every pair is one matrix product over flattened masks. In float32 the product of 0/1 values is
exact as long as counts stay below 2^24, a mask of 4096 x 4096 pixels, also with TF32, which rounds factors
and not sums. Larger masks, such as volumes, are scored in blocks of pixels whose counts add up in float64.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Block = tuple[Tensor, Tensor]  # samples (b, n, h, w) and masks (b, k, h, w): some pixels of the same images


def iou_matrix(a: Tensor, c: Tensor) -> Tensor:
    """IoU, |a ∩ c| / |a ∪ c|, of every mask of one set with every mask of another.

    a (b, n, h, w) and c (b, m, h, w), bool or 0/1 integers on one device -> (b, n, m) float64 in [0, 1].
    Two empty masks give 1, an empty and a non-empty one 0.
    Raises ValueError for other shapes, types or values."""
    a, c = flattened(a, c, "a", "c", boxed=True)
    return _iou(_intersection(a, c), _size(a), _size(c))


def dice_matrix(a: Tensor, c: Tensor) -> Tensor:
    """Dice, 2 |a ∩ c| / (|a| + |c|), of every pair; arguments, result, empty masks as in `iou_matrix`."""
    return _dice(iou_matrix(a, c))


@dataclass(frozen=True)
class Overlaps:
    """What the scores of App. 7 need to know of n samples s and k expert masks y, computed once per image.

    All float64. Sizes are in pixels."""

    iou_ss: Tensor  # (b, n, n)
    iou_sy: Tensor  # (b, n, k)
    iou_yy: Tensor  # (b, k, k)
    size_s: Tensor  # (b, n)
    size_y: Tensor  # (b, k)

    @classmethod
    def of(cls, samples: Tensor, masks: Tensor) -> "Overlaps":
        """samples (b, n, h, w), masks (b, k, h, w) -> their overlaps; types and errors as in `iou_matrix`."""
        return cls.of_blocks([(samples, masks)])

    @classmethod
    def of_blocks(cls, blocks: Iterable[Block]) -> "Overlaps":
        """`of` masks that are given in blocks of pixels, one or more; errors as in `iou_matrix`."""
        totals: list[Tensor] = []
        for samples, masks in blocks:
            s, y = flattened(samples, masks, boxed=True)
            counts = [_intersection(s, s), _intersection(s, y), _intersection(y, y), _size(s), _size(y)]
            # Counts of blocks can be added, ratios could not.
            totals = [total + count for total, count in zip(totals, counts)] if totals else counts
        ss, sy, yy, size_s, size_y = totals
        return cls(_iou(ss, size_s, size_s), _iou(sy, size_s, size_y), _iou(yy, size_y, size_y),
                   size_s, size_y)

    @property
    def dice_sy(self) -> Tensor:
        """Dice of every sample with every expert mask, (b, n, k)."""
        return _dice(self.iou_sy)

    def prefix(self, n: int) -> "Overlaps":
        """The overlaps of the first n samples: those drawn for the largest n serve every smaller one."""
        drawn = self.iou_ss.shape[1]
        if not 1 <= n <= drawn:
            raise ValueError(f"prefix of n = {n} samples: expected 1 to {drawn}, the number drawn")
        return Overlaps(self.iou_ss[:, :n, :n], self.iou_sy[:, :n], self.iou_yy,
                        self.size_s[:, :n], self.size_y)


def _intersection(a: Tensor, c: Tensor) -> Tensor:
    """a (b, n, pixels), c (b, m, pixels), float32 0/1 -> |a ∩ c| (b, n, m) float64."""
    with torch.autocast(a.device.type, enabled=False):  # half precision would round counts above 2^8 or 2^11
        return (a @ c.transpose(1, 2)).double()


def _size(a: Tensor) -> Tensor:
    """a (b, n, pixels), float32 0/1 -> |a| (b, n) float64."""
    return a.sum(2).double()


def _iou(intersection: Tensor, size_a: Tensor, size_c: Tensor) -> Tensor:
    """|a ∩ c| (b, n, m), |a| (b, n), |c| (b, m) -> IoU (b, n, m).

    In float64: GED is a difference of near-equal means, and these matrices are small."""
    union = size_a[:, :, None] + size_c[:, None, :] - intersection
    # Two empty masks match. The clamp keeps 0 / 0 out of the branch that is not taken.
    return torch.where(union == 0, 1.0, intersection / union.clamp(min=1))


def _dice(iou: Tensor) -> Tensor:
    """Dice = 2 IoU / (1 + IoU), which also holds for the two empty cases."""
    return 2 * iou / (1 + iou)


def flattened(a: Tensor, c: Tensor, a_name: str = "samples", c_name: str = "masks", boxed: bool = False
              ) -> list[Tensor]:
    """Two checked sets of masks, (b, n, h, w) and (b, m, h, w), as float32 (b, n, pixels), (b, m, pixels).

    boxed: only the pixels of the smallest box that holds every marked pixel."""
    a, c = torch.as_tensor(a), torch.as_tensor(c)  # NumPy's arrays too
    shapes = f"{a_name} {tuple(a.shape)} and {c_name} {tuple(c.shape)}"
    if a.ndim != 4 or c.ndim != 4 or not (a.numel() and c.numel()):
        raise ValueError(f"{shapes}: expected (b, n, h, w) and (b, k, h, w), none of them 0; "
                         "give a single image its batch axis with x[None]")
    if a.shape[0] != c.shape[0] or a.shape[2:] != c.shape[2:]:
        raise ValueError(f"{shapes}: b, h and w differ; compare masks of the same images at the same size")
    if a.device != c.device:
        raise ValueError(f"{a_name} on {a.device}, {c_name} on {c.device}: move both to one device")
    a, c = _integers(a, a_name), _integers(c, c_name)
    if boxed:
        # Pixels outside the box add to no count, and are most of many images.
        marked = a.amax((0, 1)) | c.amax((0, 1))
        rows, columns = _extent(marked.amax(1)), _extent(marked.amax(0))
        a, c = a[..., rows, columns], c[..., rows, columns]
    return [a.flatten(2).float(), c.flatten(2).float()]


def _extent(marked: Tensor) -> slice:
    """From the first to the last non-zero entry of a vector, or nothing."""
    # Where no mask has a pixel, an empty box serves: all counts are 0.
    positions = marked.nonzero()
    return slice(int(positions[0]), int(positions[-1]) + 1) if len(positions) else slice(0)


def _integers(masks: Tensor, name: str) -> Tensor:
    """Masks checked to be bool or 0/1 integers, as integers."""
    if masks.dtype == torch.bool:
        return masks.view(torch.uint8)  # the same bytes; bool is several times slower to reduce and convert
    if masks.is_floating_point() or masks.is_complex():
        raise ValueError(f"{name} {tuple(masks.shape)} are {masks.dtype}: expected bool or 0/1 integers; "
                         "threshold probabilities first (>= 0.5)")
    if masks.dtype in (torch.uint16, torch.uint32, torch.uint64):  # which torch only stores
        masks = masks.to(torch.int64)
    low, high = (int(value) for value in masks.aminmax())
    if low < 0 or high > 1:
        raise ValueError(f"{name} {tuple(masks.shape)} hold values from {low} to {high}: expected 0 and 1; "
                         "for 0/255 images use `masks > 0`")
    return masks
