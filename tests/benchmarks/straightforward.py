"""The method as one would first write it from the paper: what the benchmarks compare the project's code with.

Always float32, one annotator, sample or item after another.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from data import ExpertDataset
from models import ATFM, GTR
from models.flow import draw_time, endpoint, linear_path
from models.losses import dice


def load(dataset: ExpertDataset, indices: Iterable[int]) -> tuple[Tensor, Tensor]:
    """A batch as a data loader makes it, item by item: image (b, c, h, w), masks (b, k, h, w)."""
    image, masks = zip(*(dataset[index] for index in indices))
    return torch.stack(image), torch.stack(masks)


def gtr_loss(gtr: GTR, image: Tensor, mask: Tensor, mc_samples: int) -> Tensor:
    """Eq. 5 for image (b, c, h, w), mask (b, h, w), a scalar: the Monte Carlo samples one after another."""
    logits = gtr(image).rsample(mc_samples, antithetic=True)
    log_p = [-F.binary_cross_entropy_with_logits(sample, mask, reduction="none").sum((1, 2))
             for sample in logits.unbind(1)]
    return math.log(mc_samples) - torch.stack(log_p).logsumexp(0).mean()


def flow_loss(atfm: ATFM, image: Tensor, masks: Tensor) -> Tensor:
    """Algorithm 1 for image (b, c, h, w), masks (b, k, h, w), a scalar: k forward passes, their mean."""
    x_0, t = atfm.sample_source(image, 1), draw_time(len(image), image.device)
    condition, terms = atfm.condition(image), []
    for mask in masks.split(1, dim=1):
        path = linear_path(x_0, mask, t)
        v = atfm.net(path.x_t, t, condition)
        l_sf = 1 - dice(endpoint(path.x_t, v, t).clamp(0, 1), mask, "image").mean()
        terms.append((v - path.u).square().mean() + atfm.objective.alpha * l_sf)
    return torch.stack(terms).mean()


@torch.no_grad()
def sample(atfm: ATFM, image: Tensor, n: int, steps: int, generator: torch.Generator) -> Tensor:
    """n samples of an image (1, c, h, w) by Euler's method, one after another: probabilities (1, n, h, w).

    ST-Net standardizes its weights at every evaluation, as in the released code."""
    ends, condition = [], atfm.condition(image)
    for x in atfm.sample_source(image, n, generator).split(1, dim=1):
        for step in range(steps):
            x = x + atfm.net(x, torch.full((1,), step / steps, device=image.device), condition) / steps
        ends.append(x)
    return torch.cat(ends, dim=1).clamp(0, 1)
