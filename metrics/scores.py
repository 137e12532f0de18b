"""Scores of a set of samples against a set of expert masks, App. 7: GED, HM-IoU, MDM and sample diversity.

Each is a few lines over `Overlaps`; `ged(samples, masks)` does both steps, `ged_from(overlaps)` the second,
for callers that need several scores, or several n, of the same samples.

samples (b, n, h, w) and masks (b, k, h, w) are bool or 0/1 integers on one device; scores are (b,) float
tensors on it. Two empty masks match (IoU = Dice = 1), an empty and a non-empty one do not (0).
Wrong shapes, types or values raise ValueError.
"""

import math

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from metrics.overlap import Overlaps, iou_matrix


def ged(samples: Tensor, masks: Tensor) -> Tensor:
    """Generalized energy distance GED_n, App. 7 (Kohl et al., arXiv 1806.05034); >= 0, lower is better.

    2 E d(s, y) - E d(s, s') - E d(y, y') with d = 1 - IoU over all ordered pairs, those of a mask with itself
    included, and no square root. It falls with n even for a perfect model: never compare different n."""
    return ged_from(Overlaps.of(samples, masks)).float()


def hm_iou(samples: Tensor, masks: Tensor) -> Tensor:
    """Hungarian-matched IoU, App. 7 (Kohl et al., arXiv 1905.13077); in [0, 1], higher is better.

    Mean IoU of the best one-to-one matching, after both sets are repeated to lcm(n, k) members."""
    return hm_iou_from(Overlaps.of(samples, masks)).float()


def mdm(samples: Tensor, masks: Tensor) -> Tensor:
    """Maximum Dice matching, App. 7; in [0, 1], higher is better.

    Mean over the annotators of the best Dice among the n samples, called D_max in arXiv 2507.22418."""
    return mdm_from(Overlaps.of(samples, masks)).float()


def diversity(samples: Tensor) -> Tensor:
    """Sample diversity, App. 7: mean of 1 - IoU over all ordered pairs of samples; in [0, 1)."""
    return _diversity(iou_matrix(samples, samples)).float()


def ged_from(overlaps: Overlaps) -> Tensor:
    """GED_n from overlaps, (b,) float64; the 1 of each d = 1 - IoU cancels."""
    # 2 (1 - a) - (1 - s) - (1 - y) = s + y - 2 a, with a, s, y the mean IoU of the three kinds of pairs.
    across = overlaps.iou_sy.mean((1, 2))
    return overlaps.iou_ss.mean((1, 2)) + overlaps.iou_yy.mean((1, 2)) - 2 * across


def hm_iou_from(overlaps: Overlaps) -> Tensor:
    """HM-IoU_n from overlaps, (b,) float64. The matching runs on the CPU, one transfer per batch."""
    iou = overlaps.iou_sy.cpu().numpy()
    _, n, k = iou.shape
    # With lcm(n, k) members the sets are equally large, and each mask is in its set equally often.
    length = math.lcm(n, k)
    # Repeating masks repeats rows and columns of their IoU; nothing is computed again.
    tiled = np.tile(iou, (1, length // n, length // k))
    matched = [pairs[linear_sum_assignment(pairs, maximize=True)].mean() for pairs in tiled]
    return torch.tensor(matched, dtype=overlaps.iou_sy.dtype, device=overlaps.iou_sy.device)


def mdm_from(overlaps: Overlaps) -> Tensor:
    """MDM_n from overlaps, (b,) float64."""
    return overlaps.dice_sy.amax(1).mean(1)


def diversity_from(overlaps: Overlaps) -> Tensor:
    """Sample diversity from overlaps, (b,) float64."""
    return _diversity(overlaps.iou_ss)


def distance_from(overlaps: Overlaps) -> Tensor:
    """E d(s, y), the mean of 1 - IoU over all pairs of a sample and an expert's mask, (b,) float64."""
    return 1 - overlaps.iou_sy.mean((1, 2))


def experts_diversity_from(overlaps: Overlaps) -> Tensor:
    """E d(y, y') over all ordered pairs of experts, (b,) float64."""
    return _diversity(overlaps.iou_yy)


def empty_samples_from(overlaps: Overlaps) -> Tensor:
    """The fraction of samples that are empty masks, (b,) float64 in [0, 1]."""
    return (overlaps.size_s == 0).double().mean(1)


def empty_experts_from(overlaps: Overlaps) -> Tensor:
    """The fraction of experts whose masks are empty, (b,) float64 in [0, 1]."""
    return (overlaps.size_y == 0).double().mean(1)


def size_from(overlaps: Overlaps) -> Tensor:
    """The mean size of the experts' masks in pixels, (b,) float64."""
    return overlaps.size_y.mean(1)


def experts_from(overlaps: Overlaps) -> Tensor:
    """The number k of experts who marked an image, (b,) float64."""
    return torch.full_like(overlaps.size_y[:, 0], overlaps.size_y.shape[1])


def _diversity(iou_ss: Tensor) -> Tensor:
    return 1 - iou_ss.mean((1, 2))
