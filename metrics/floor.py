"""The floor of GED: what a perfect sampler has, where experts are independent of each other given the image.

A sampler cannot know which experts were asked. Let D be the mean distance 1 - IoU of two masks that are drawn
independently from the distribution of an image's masks. The k experts and the n samples of a perfect sampler
are such draws, so that E d(s, y) = D, E d(s, s') = D (1 - 1/n) and E d(y, y') = D (1 - 1/k) over all ordered
pairs, those of a mask with itself included. Of GED_n = 2 E d(s, y) - E d(s, s') - E d(y, y') remains

    GED_n = D (1/k + 1/n).

A model far below it has seen the experts' masks, or its samples are not independent.
"""

from collections.abc import Mapping

import numpy as np


def floor(experts_diversity: np.ndarray, experts: np.ndarray, n: int) -> np.ndarray:
    """GED_n of a perfect sampler on each image, D (1/k + 1/n); NaN for an image with one expert.

    experts_diversity (images,): E d(y, y') over all ordered pairs of an image's experts, from which
    D = E d(y, y') k / (k - 1), the mean over pairs of different experts. experts (images,): k."""
    k = np.asarray(experts, float)
    # With k = 1 there is no pair of different experts, and so no D.
    with np.errstate(divide="ignore", invalid="ignore"):
        # Of the k^2 ordered pairs, k are a mask with itself and have distance 0: k / (k - 1) removes them.
        distance = np.where(k > 1, experts_diversity * k / (k - 1), np.nan)
    return distance * (1 / k + 1 / n)


def floor_of(scores: Mapping[str, np.ndarray], n: int) -> np.ndarray:
    """`floor` on each image of a test, (images,); scores: of any of its systems, each (seeds, images)."""
    # The experts' masks are the same under each seed of sampling, so the first row serves.
    return floor(scores["Experts' diversity"][0], scores["Experts"][0], n)
