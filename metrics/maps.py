"""Pixel-wise maps of a set of samples, and the scores read off them: S_NCC, Dice of the means, calibration.

samples (b, n, h, w) and masks (b, k, h, w) are bool, 0/1 integers or probabilities in [0, 1] on one device;
scores are (b,) and maps (b, h, w) float tensors on it. Other shapes or values raise ValueError.
"""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from metrics.overlap import dice_matrix

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
    samples, masks = _pair(samples, masks)
    majority = samples.mean(1, keepdim=True) > 0.5, masks.mean(1, keepdim=True) > 0.5
    return dice_matrix(*majority)[:, 0, 0].float()


def s_ncc(samples: Tensor, masks: Tensor) -> Tensor:
    """S_NCC, PHiSeg (arXiv 1906.04045): do samples vary where experts differ? In [-1, 1], higher is better.

    Mean over experts j of the normalised cross-correlation over pixels of two maps, both averaged over
    samples s: the cross-entropies CE(mean of samples, s) and CE(y_j, s), where
    CE(p, s) = -p log s - (1 - p) log(1 - s).
    A constant map, such as that of identical binary samples, correlates with nothing: its term is 0."""
    samples, masks = _pair(samples, masks)
    log_s = (samples + LOG_FLOOR).log().mean(1, keepdim=True)
    log_not_s = (1 - samples + LOG_FLOOR).log().mean(1, keepdim=True)

    def cross_entropy(p: Tensor) -> Tensor:
        return -p * log_s - (1 - p) * log_not_s

    return _correlation(cross_entropy(samples.mean(1, keepdim=True)), cross_entropy(masks)).mean(1).float()


def calibration_error(samples: Tensor, masks: Tensor) -> Tensor:
    """Expected calibration error (arXiv 1706.04599) of the mean sample, for the mean expert; in [0, 1].

    Pixels fall by their mean sample p into ten bins [0, .1), ..., [.9, 1]. The error is the sum over bins of
    (share of pixels) x |mean p - mean expert| within the bin. Background, easy and in the majority, pulls it
    towards 0, the best: compare it only on the same crops."""
    samples, masks = _pair(samples, masks)
    count = samples.sum(1).flatten(1)  # of binary samples, so that bins are a matter of integers
    gap = count / samples.shape[1] - masks.mean(1).flatten(1)
    bins = (BINS * count).div(samples.shape[1], rounding_mode="floor").long().clamp(max=BINS - 1)
    per_bin = gap[:, None] @ one_hot(bins, BINS).to(gap.dtype)
    return (per_bin.abs().sum((1, 2)) / gap.shape[1]).float()


def _correlation(a: Tensor, c: Tensor) -> Tensor:
    """Normalised cross-correlation of a (b, 1, h, w) and c (b, k, h, w) -> (b, k), 0 if one is constant."""
    a, c = a.flatten(2), c.flatten(2)
    a, c = a - a.mean(2, keepdim=True), c - c.mean(2, keepdim=True)
    # In nats: rounding stays far below, and one differing sample far above.
    constant = (a.abs().amax(2) < 1e-9) | (c.abs().amax(2) < 1e-9)
    norms = a.norm(dim=2) * c.norm(dim=2)
    return torch.where(constant, 0.0, (a * c).sum(2) / norms)


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
