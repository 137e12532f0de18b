"""Pixel-wise maps of a set of samples, and the scores read off them: S_NCC, Dice of the means, calibration.

samples (b, n, h, w) and masks (b, k, h, w) are bool, 0/1 integers or probabilities in [0, 1] on one device;
scores are (b,) and maps (b, h, w) float tensors on it. Other shapes or values raise ValueError.
Each score has a second form, `..._from(blocks)`, for masks that come some pixels at a time, as volumes do.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from metrics.overlap import Block, Overlaps

LOG_FLOOR = 1e-8  # added to probabilities under a logarithm; on binary samples it cancels in S_NCC
BINS = 10


def variance_map(samples: Tensor) -> Tensor:
    """Pixel-wise variance of the samples (divided by n), as shown in arXiv 2507.22418; in [0, 1/4]."""
    return _probabilities(samples, "samples").var(1, correction=0).float()


def entropy_map(samples: Tensor) -> Tensor:
    """Pixel-wise entropy of the mean of the samples, in nats; in [0, log 2]."""
    mean = _probabilities(samples, "samples").mean(1)
    return (torch.special.entr(mean) + torch.special.entr(1 - mean)).float()


def dice_of_means(samples: Tensor, masks: Tensor) -> Tensor:
    """Dice of (mean of samples > 0.5) with (mean of experts > 0.5), arXiv 2507.22418; in [0, 1].

    Strictly above: a pixel that half of the experts marked is background. Two empty masks give 1."""
    return dice_of_means_from([(samples, masks)])


def dice_of_means_from(blocks: Iterable[Block]) -> Tensor:
    """`dice_of_means` of blocks of pixels."""
    pairs = (_pair(*block) for block in blocks)
    majorities = ((_majority(samples), _majority(masks)) for samples, masks in pairs)
    return Overlaps.of_blocks(majorities).dice_sy[:, 0, 0].float()


def s_ncc(samples: Tensor, masks: Tensor) -> Tensor:
    """S_NCC, PHiSeg (arXiv 1906.04045): do samples vary where experts differ? In [-1, 1], higher is better.

    Mean over experts j of the normalised cross-correlation over pixels of two maps, both averaged over
    samples s: the cross-entropies CE(mean of samples, s) and CE(y_j, s), where
    CE(p, s) = -p log s - (1 - p) log(1 - s).
    A constant map, such as that of identical binary samples, correlates with nothing: its term is 0."""
    return s_ncc_from([(samples, masks)])


def s_ncc_from(blocks: Iterable[Block]) -> Tensor:
    """`s_ncc` of blocks of pixels."""
    moments = None
    for block in blocks:
        of_block = _Moments.of(_cross_entropies(*_pair(*block)))
        moments = of_block if moments is None else moments.merged(of_block)
    assert moments is not None, "no block"
    return moments.correlations().mean(1).float()


def calibration_error(samples: Tensor, masks: Tensor) -> Tensor:
    """Expected calibration error (arXiv 1706.04599) of the mean sample, for the mean expert; in [0, 1].

    Pixels fall by their mean sample p into ten bins [0, .1), ..., [.9, 1]. The error is the sum over bins of
    (fraction of pixels) x |mean p - mean expert| within the bin. Background, easy and in the majority, pulls
    it towards 0, the best: compare it only on the same crops."""
    return calibration_error_from([(samples, masks)])


def calibration_error_from(blocks: Iterable[Block]) -> Tensor:
    """`calibration_error` of blocks of pixels."""
    per_bin, pixels = torch.zeros(()), 0
    for block in blocks:
        samples, masks = _pair(*block)
        count = samples.sum(1).flatten(1)  # of binary samples, so that bins are a matter of integers
        gap = count / samples.shape[1] - masks.mean(1).flatten(1)
        bins = (BINS * count).div(samples.shape[1], rounding_mode="floor").long().clamp(max=BINS - 1)
        per_bin = per_bin.to(gap) + gap[:, None] @ one_hot(bins, BINS).to(gap.dtype)
        pixels += gap.shape[1]
    return (per_bin.abs().sum((1, 2)) / pixels).float()


def _majority(masks: Tensor) -> Tensor:
    """masks (b, n, h, w) -> the pixels that more than half of them mark, (b, 1, h, w) bool."""
    return masks.mean(1, keepdim=True) > 0.5


def _cross_entropies(samples: Tensor, masks: Tensor) -> Tensor:
    """(b, 1 + k, pixels): CE(mean of samples, s), then CE(y_j, s) of each expert, averaged over samples s."""
    log_s = (samples + LOG_FLOOR).log().mean(1, keepdim=True)
    log_not_s = (1 - samples + LOG_FLOOR).log().mean(1, keepdim=True)
    p = torch.cat((samples.mean(1, keepdim=True), masks), dim=1)
    return (-p * log_s - (1 - p) * log_not_s).flatten(2)


@dataclass(frozen=True)
class _Moments:
    """Of 1 + k maps over some pixels, what their correlation with the first one needs; each (b, 1 + k).

    Sums are about the mean and are merged as in Chan, Golub and LeVeque (1983), so that nothing cancels."""

    pixels: int
    mean: Tensor
    squares: Tensor  # sum of squared differences from the mean
    products: Tensor  # sum of the products of these differences with those of the first map
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, maps: Tensor) -> "_Moments":
        """maps (b, 1 + k, pixels)."""
        mean = maps.mean(2)
        centred = maps - mean[:, :, None]
        low, high = maps.aminmax(dim=2)
        return cls(maps.shape[2], mean, centred.square().sum(2), (centred[:, :1] * centred).sum(2), low, high)

    def merged(self, other: "_Moments") -> "_Moments":
        pixels, shift = self.pixels + other.pixels, other.mean - self.mean
        weight = self.pixels * other.pixels / pixels
        return _Moments(pixels, self.mean + shift * (other.pixels / pixels),
                        self.squares + other.squares + weight * shift * shift,
                        self.products + other.products + weight * shift[:, :1] * shift,
                        torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))

    def correlations(self) -> Tensor:
        """Of the k later maps with the first, (b, k); 0 if one of the two is constant."""
        # In nats: rounding stays far below, and one differing sample far above.
        constant = torch.maximum(self.high - self.mean, self.mean - self.low) < 1e-9
        norms = self.squares.sqrt()
        return torch.where(constant[:, :1] | constant[:, 1:], 0.0,
                           self.products[:, 1:] / (norms[:, :1] * norms[:, 1:]))


def _pair(samples: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets as checked float64 of matching b, h, w."""
    samples, masks = torch.as_tensor(samples), torch.as_tensor(masks)
    if samples.shape[:1] != masks.shape[:1] or samples.shape[2:] != masks.shape[2:]:
        raise ValueError(f"samples {tuple(samples.shape)} and masks {tuple(masks.shape)}: "
                         "expected (b, n, h, w) and (b, k, h, w) of the same images at the same size")
    return _probabilities(samples, "samples"), _probabilities(masks, "masks")


def _probabilities(x: Tensor, name: str) -> Tensor:
    """x (b, n, h, w) as float64, its values checked to lie in [0, 1]."""
    x = torch.as_tensor(x)
    if x.ndim != 4 or not x.numel():
        raise ValueError(f"{name} {tuple(x.shape)}: expected four axes (b, n, h, w), none of them 0")
    x = x.double()
    low, high = (float(value) for value in x.aminmax())
    if not (low >= 0 and high <= 1):  # also true for NaN
        raise ValueError(f"{name} hold values from {low} to {high}: expected probabilities in [0, 1]")
    return x
