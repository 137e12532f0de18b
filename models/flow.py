"""SFM, Segmentation Flow Matching (paper, Algorithm 1): the path, and the losses on it, as pure functions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.parallel import Part, whole

TIMES = 1000  # t is drawn from {0, 1/1000, ..., 999/1000}: the paper's lambda = 1e-3


@dataclass(frozen=True)
class Path:
    """States on straight lines from x_0 to x_1, and their velocity: both (b, k, h, w)."""

    x_t: Tensor
    u: Tensor


def draw_time(b: int, device: torch.device) -> Tensor:
    """t for each image of the batch, (b,), shared by its annotators (Algorithm 1)."""
    return torch.randint(TIMES, (b,), device=device) / TIMES


def one_expert(masks: Tensor, part: Part | None = None) -> Tensor:
    """A random expert's mask for each image, (b, 1, h, w) of (b, k, h, w). part: see `models.parallel`."""
    b, k = masks.shape[:2]
    part = part or whole(b)
    return masks[torch.arange(b), part.cut(torch.randint(k, (part.b,)))][:, None]


def linear_path(x_0: Tensor, x_1: Tensor, t: Tensor) -> Path:
    """x_t = t x_1 + (1 - t) x_0 and u = x_1 - x_0 for x_0 (b, 1, h, w), x_1 (b, k, h, w), t (b,)."""
    t = t[:, None, None, None]
    return Path(t * x_1 + (1 - t) * x_0, x_1 - x_0)


def endpoint(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """x_1^t = x_t + (1 - t) v, the mask predicted from time t: (b, k, h, w)."""
    return x_t + (1 - t[:, None, None, None]) * v


def dice(predicted: Tensor, mask: Tensor, over: str) -> Tensor:
    """Soft Dice, in (0, 1], of maps (b, k, h, w) in [0, 1]; for each image and annotator, or over the batch.

    over: "image" gives (b, k), "batch" (k,).
    One is added to numerator and denominator, so that two empty maps score 1.
    """
    dims = (-2, -1) if over == "image" else (0, -2, -1)
    overlap, total = (predicted * mask).sum(dims), (predicted + mask).sum(dims)
    return (2 * overlap + 1) / (total + 1)


def semantic_loss(x_1t: Tensor, own: Tensor, every: Tensor, method: str, over: str, target: str) -> Tensor:
    """L_SF, the mean of 1 - Dice(x_1^t, y), a scalar (Algorithm 1).

    x_1t (b, j, h, w): the predictions on the paths to the annotators `own` (b, j, h, w), out of `every`
    (b, k, h, w).
    method: "soft" keeps the gradient; "thresholded" cuts it, as the released code does. over: see `dice`.
    target: each path's prediction is compared with its "own" annotator or with "all".
    """
    predicted = x_1t.clamp(0, 1) if method == "soft" else (x_1t.detach() >= 0.5).to(own.dtype)
    if target == "own":
        return 1 - dice(predicted, own, over).mean()
    each = [dice(predicted, y[:, None].expand_as(predicted), over).mean() for y in every.unbind(1)]
    return 1 - torch.stack(each).mean()
