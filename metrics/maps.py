"""Scores that compare pixel-wise maps of the samples with those of the experts: S_NCC, Dice of means, ECE.

samples (b, n, h, w) and masks (b, k, h, w) are bool or 0/1 integers on one device; scores are (b,) float
tensors on it. Other shapes or values raise ValueError. Each score has a second form, `..._from(blocks)`, of a
sequence of blocks of pixels, as volumes are scored.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from metrics.overlap import Block, Overlaps, flattened

LOG_FLOOR = 1e-8  # added to probabilities under a logarithm; on binary samples it cancels in S_NCC
BINS = 10


def dice_of_means(samples: Tensor, masks: Tensor) -> Tensor:
    """Dice of (mean of samples > 0.5) with (mean of experts > 0.5), arXiv 2507.22418; in [0, 1].

    Strictly above: a pixel that half of the experts marked is background. Two empty masks give 1."""
    return dice_of_means_from([(samples, masks)])


def dice_of_means_from(blocks: Sequence[Block]) -> Tensor:
    """`dice_of_means` of blocks of pixels."""
    # Each majority is a set of one mask, so that `Overlaps` gives their Dice.
    majorities = ([x.mean(1)[:, None, None] > 0.5 for x in flattened(*block)] for block in blocks)
    return Overlaps.of_blocks(majorities).dice_sy[:, 0, 0].float()


def s_ncc(samples: Tensor, masks: Tensor) -> Tensor:
    """S_NCC, PHiSeg (arXiv 1906.04045): do samples vary where experts differ? In [-1, 1], higher is better.

    Mean over experts j of the normalised cross-correlation over pixels of two maps, both averaged over
    samples s: the cross-entropies CE(mean of samples, s) and CE(y_j, s), where
    CE(p, s) = -p log s - (1 - p) log(1 - s).
    A constant map, such as that of identical samples, correlates with nothing: its term is 0."""
    return s_ncc_from([(samples, masks)])


def s_ncc_from(blocks: Sequence[Block]) -> Tensor:
    """`s_ncc` of blocks of pixels."""
    # Two passes: sums about the mean lose no digits, as a mean of squares minus a squared mean would.
    total = sum(_cross_entropies(*flattened(*block)).sum(2, keepdim=True) for block in blocks)
    mean = total / sum(math.prod(samples.shape[2:]) for samples, _ in blocks)
    products, squares, largest = torch.zeros_like(mean[..., 0]).expand(3, -1, -1)
    for block in blocks:
        centred = _cross_entropies(*flattened(*block)) - mean
        products = products + (centred[:, :1] * centred).sum(2)
        squares = squares + centred.square().sum(2)
        largest = torch.maximum(largest, centred.abs().amax(2))
    # In nats: rounding stays far below, and one differing sample far above.
    constant, norms = largest < 1e-9, squares.sqrt()
    # Map 0 is that of the samples; each of the k maps of the experts is correlated with it.
    correlations = torch.where(constant[:, :1] | constant[:, 1:], 0.0,
                               products[:, 1:] / (norms[:, :1] * norms[:, 1:]))
    return correlations.mean(1).float()


def calibration_error(samples: Tensor, masks: Tensor) -> Tensor:
    """Expected calibration error (arXiv 1706.04599) of the mean sample, for the mean expert; in [0, 1].

    Pixels fall by their mean sample p into ten bins [0, .1), ..., [.9, 1]. The error is the sum over bins of
    (fraction of pixels) x |mean p - mean expert| within the bin. Background, easy and in the majority, pulls
    it towards 0, the best: compare it only on the same crops."""
    return calibration_error_from([(samples, masks)])


def calibration_error_from(blocks: Sequence[Block]) -> Tensor:
    """`calibration_error` of blocks of pixels."""
    per_bin, pixels = torch.zeros(()), 0
    for block in blocks:
        samples, masks = flattened(*block)
        # float64, as gaps add up over all pixels of a volume.
        count = samples.sum(1).double()
        gap = count / samples.shape[1] - masks.double().mean(1)
        # By the integer count: as a mean, .3 might fall to either side of its bin's edge.
        bins = (BINS * count).div(samples.shape[1], rounding_mode="floor").long().clamp(max=BINS - 1)
        # Gaps within a bin may cancel, by definition. The product with the bins' indicators sums them.
        per_bin = per_bin.to(gap) + gap[:, None] @ one_hot(bins, BINS).to(gap.dtype)
        pixels += gap.shape[1]
    return (per_bin.abs().sum((1, 2)) / pixels).float()


def _cross_entropies(samples: Tensor, masks: Tensor) -> Tensor:
    """(b, 1 + k, pixels): CE(mean of samples, s), then CE(y_j, s) of each expert, averaged over samples s."""
    mean = samples.double().mean(1, keepdim=True)
    log_1, log_0 = math.log(1 + LOG_FLOOR), math.log(LOG_FLOOR)  # of a sample that is 1, and of one that is 0
    # Of all samples the fraction `mean` is 1, so the average of log s needs no sum over samples.
    log_s, log_not_s = mean * log_1 + (1 - mean) * log_0, mean * log_0 + (1 - mean) * log_1
    p = torch.cat((mean, masks.double()), dim=1)
    return -p * log_s - (1 - p) * log_not_s
