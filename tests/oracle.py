"""Every score of `metrics` as plain loops over pairs and pixels, for one image: the reference of the tests.

samples (n, h, w) and masks (k, h, w) are bool tensors. Slow on purpose; nothing is shared with `metrics`.
"""

import math

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def iou(a: Tensor, c: Tensor) -> float:
    union = (a | c).sum().item()
    return 1.0 if union == 0 else (a & c).sum().item() / union


def dice(a: Tensor, c: Tensor) -> float:
    total = a.sum().item() + c.sum().item()
    return 1.0 if total == 0 else 2 * (a & c).sum().item() / total


def mean_distance(a: Tensor, c: Tensor) -> float:
    return sum(1 - iou(one, other) for one in a for other in c) / (len(a) * len(c))


def diversity(samples: Tensor) -> float:
    return mean_distance(samples, samples)


def ged(samples: Tensor, masks: Tensor) -> float:
    return 2 * mean_distance(samples, masks) - mean_distance(samples, samples) - mean_distance(masks, masks)


def hm_iou(samples: Tensor, masks: Tensor) -> float:
    length = math.lcm(len(samples), len(masks))
    repeated_s = [samples[i % len(samples)] for i in range(length)]
    repeated_y = [masks[j % len(masks)] for j in range(length)]
    pairs = [[iou(s, y) for y in repeated_y] for s in repeated_s]
    rows, columns = linear_sum_assignment(pairs, maximize=True)
    return sum(pairs[i][j] for i, j in zip(rows, columns)) / length


def mdm(samples: Tensor, masks: Tensor) -> float:
    return sum(max(dice(s, y) for s in samples) for y in masks) / len(masks)


def means(x: Tensor) -> list[float]:
    """Mean over the set at each pixel."""
    return [sum(column) / len(x) for column in zip(*x.flatten(1).tolist())]


def dice_of_means(samples: Tensor, masks: Tensor) -> float:
    a, c = (torch.tensor([p > 0.5 for p in means(x)]) for x in (samples, masks))
    return dice(a, c)


def variances(samples: Tensor) -> list[float]:
    return [sum((value - mean) ** 2 for value in column) / len(samples)
            for column, mean in zip(zip(*samples.flatten(1).tolist()), means(samples))]


def entropies(samples: Tensor) -> list[float]:
    return [-sum(p * math.log(p) for p in (mean, 1 - mean) if p > 0) for mean in means(samples)]


def cross_entropies(target: list[float], samples: Tensor) -> list[float]:
    """-p log s - (1 - p) log(1 - s) at each pixel, averaged over the samples."""
    total = [0.0] * len(target)
    for sample in samples.flatten(1).tolist():
        for pixel, (p, s) in enumerate(zip(target, sample)):
            total[pixel] -= p * math.log(s + 1e-8) + (1 - p) * math.log(1 - s + 1e-8)
    return [value / len(samples) for value in total]


def correlation(a: list[float], c: list[float]) -> float:
    mean_a, mean_c = sum(a) / len(a), sum(c) / len(c)
    variance_a = sum((x - mean_a) ** 2 for x in a) / len(a)
    variance_c = sum((x - mean_c) ** 2 for x in c) / len(c)
    if min(variance_a, variance_c) < 1e-18:
        return 0.0
    covariance = sum((x - mean_a) * (y - mean_c) for x, y in zip(a, c)) / len(a)
    return covariance / math.sqrt(variance_a * variance_c)


def s_ncc(samples: Tensor, masks: Tensor) -> float:
    spread = cross_entropies(means(samples), samples)
    errors = [cross_entropies(y, samples) for y in masks.flatten(1).tolist()]
    return sum(correlation(spread, error) for error in errors) / len(masks)


def calibration_error(samples: Tensor, masks: Tensor) -> float:
    p, y = means(samples), means(masks)
    counts = [sum(column) for column in zip(*samples.flatten(1).tolist())]
    error = 0.0
    for number in range(10):
        inside = [i for i, count in enumerate(counts) if min(int(10 * count / len(samples)), 9) == number]
        if inside:
            gap = sum(p[i] for i in inside) / len(inside) - sum(y[i] for i in inside) / len(inside)
            error += len(inside) / len(p) * abs(gap)
    return error
