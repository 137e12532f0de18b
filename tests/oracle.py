"""What the tests compare with: every score of `metrics` as plain loops for one image, and golden files.

samples (n, h, w) and masks (k, h, w) are bool tensors. Slow on purpose; nothing is shared with `metrics`.
"""

import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def golden(name: str) -> dict[str, Tensor]:
    """What the authors' code gave, see tests/golden; the test is skipped where the file is missing."""
    path = Path(__file__).parent / "golden" / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    with np.load(path) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def iou(a: Tensor, c: Tensor) -> float:
    union = (a | c).sum().item()
    return 1.0 if union == 0 else (a & c).sum().item() / union


def dice(a: Tensor, c: Tensor) -> float:
    total = a.sum().item() + c.sum().item()
    return 1.0 if total == 0 else 2 * (a & c).sum().item() / total


def mean_distance(a: Tensor, c: Tensor) -> float:
    return sum(1 - iou(s, y) for s in a for y in c) / (len(a) * len(c))


def diversity(samples: Tensor) -> float:
    return mean_distance(samples, samples)


def ged(samples: Tensor, masks: Tensor) -> float:
    return 2 * mean_distance(samples, masks) - mean_distance(samples, samples) - mean_distance(masks, masks)


def hm_iou(samples: Tensor, masks: Tensor) -> float:
    length = math.lcm(len(samples), len(masks))
    pairs = [[iou(samples[i % len(samples)], masks[j % len(masks)]) for j in range(length)]
             for i in range(length)]
    rows, columns = linear_sum_assignment(pairs, maximize=True)
    return sum(pairs[i][j] for i, j in zip(rows, columns)) / length


def mdm(samples: Tensor, masks: Tensor) -> float:
    return sum(max(dice(s, y) for s in samples) for y in masks) / len(masks)


def pixels(x: Tensor) -> list[tuple[float, ...]]:
    """The values of a set at each pixel."""
    return list(zip(*x.double().flatten(1).tolist()))


def means(x: Tensor) -> list[float]:
    return [sum(values) / len(values) for values in pixels(x)]


def dice_of_means(samples: Tensor, masks: Tensor) -> float:
    return dice(*(torch.tensor([p > 0.5 for p in means(x)]) for x in (samples, masks)))


def cross_entropies(target: list[float], samples: Tensor) -> list[float]:
    """-p log s - (1 - p) log(1 - s) at each pixel, averaged over the samples."""
    return [statistics.fmean(-p * math.log(s + 1e-8) - (1 - p) * math.log(1 - s + 1e-8) for s in values)
            for p, values in zip(target, pixels(samples))]


def correlation(a: list[float], c: list[float]) -> float:
    return 0.0 if min(map(statistics.pstdev, (a, c))) < 1e-9 else statistics.correlation(a, c)


def s_ncc(samples: Tensor, masks: Tensor) -> float:
    spread = cross_entropies(means(samples), samples)
    errors = [cross_entropies(y, samples) for y in masks.double().flatten(1).tolist()]
    return sum(correlation(spread, error) for error in errors) / len(masks)


def calibration_error(samples: Tensor, masks: Tensor) -> float:
    p, y = means(samples), means(masks)
    bins = [min(int(10 * sum(values) / len(values)), 9) for values in pixels(samples)]
    gaps = [sum(p[i] - y[i] for i in range(len(p)) if bins[i] == number) for number in range(10)]
    return sum(map(abs, gaps)) / len(p)
