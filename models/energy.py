"""The energy score of samples against the experts' masks: the gradient of GED, as a loss.

    ES = (2 / (m k)) sum_ij d(s_i, y_j) - (1 / (m (m - 1))) sum_{i != i'} d(s_i, s_i')

for m independent samples s_i and k masks y_j. It is GED without the experts' diversity, which no sampler
changes, and it is the energy score (Gneiting and Raftery 2007, "Strictly proper scoring rules, prediction,
and estimation", Sec. 4.3) under GED's distance (Kohl et al., arXiv 1806.05034). IoU is a positive definite
kernel on sets (arXiv 2007.05943), so 1 - IoU is of negative type and the score is proper: in expectation over
the experts, no sampler has a lower score than one of the experts' distribution. Leaving out the pairs i = i'
makes the score fair, that is, unbiased for every m >= 2. GED itself keeps them and so falls with n.
"""

from torch import Tensor


def energy_score(samples: Tensor, masks: Tensor) -> Tensor:
    """The fair energy score, a scalar: the mean over images; lower is better, differentiable.

    samples (b, m, h, w) in [0, 1], m >= 2 independent samples per image, not antithetic ones. masks
    (b, k, h, w) of 0/1; an image with k_i < k experts repeats them, so that each counts equally. Raises
    ValueError for other shapes."""
    if samples.ndim != 4 or masks.ndim != 4 or samples.shape[1] < 2 or masks.shape[1] < 1 or (
            samples.shape[0] != masks.shape[0] or samples.shape[2:] != masks.shape[2:]):
        raise ValueError(f"samples {tuple(samples.shape)}, masks {tuple(masks.shape)}: expected (b, m, h, w) "
                         "with m >= 2 and (b, k, h, w) of the same images (--mc_samples)")
    m = samples.shape[1]
    # ES as above. A sample has no distance from itself, so the sum over all pairs is that over i != i'.
    to_experts = soft_distance(samples, masks).mean((1, 2))
    between_samples = soft_distance(samples, samples).sum((1, 2)) / (m * (m - 1))
    return (2 * to_experts - between_samples).mean()


def soft_distance(a: Tensor, c: Tensor) -> Tensor:
    """1 - IoU of soft masks, every a with every c: (b, n, h, w) and (b, m, h, w) in [0, 1] -> (b, n, m).

    IoU in the squared Tanimoto form (sum a c + 1) / (sum a^2 + sum c^2 - sum a c + 1), which is IoU for 0/1
    up to the added 1, by which two empty masks have IoU 1. Only this form has d(a, a) = 0 for a soft a: with
    sum a + sum c in the denominator, as in soft Dice, a grey mask is at a distance from itself, and a sampler
    that always gives the same grey mask could tie with the right one."""
    a, c = a.flatten(2), c.flatten(2)
    # As products of matrices: no (b, n, m, h, w) is kept for the gradient.
    overlap = a @ c.transpose(1, 2)
    union = a.square().sum(2)[:, :, None] + c.square().sum(2)[:, None, :] - overlap
    return 1 - (overlap + 1) / (union + 1)
