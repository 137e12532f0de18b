"""SFM, Segmentation Flow Matching (paper, Algorithm 1): coupling, path, losses and solvers, as functions."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

TIMES = 1000  # t is drawn from {0, 1/1000, ..., 999/1000}: the paper's lambda = 1e-3


@dataclass(frozen=True)
class Path:
    """States on the ways from x_0 to x_1, and their velocity: both (b, k, h, w)."""

    x_t: Tensor
    u: Tensor


def draw_time(b: int, device: torch.device, times: str = "uniform") -> Tensor:
    """t for each image of the batch, (b,), shared by its annotators (Algorithm 1); times "zero": t = 0."""
    if times == "zero":
        return torch.zeros(b, device=device)
    return torch.randint(TIMES, (b,), device=device) / TIMES


def check_masks(image: Tensor, masks: Tensor) -> None:
    """Raises ValueError for masks that do not fit the image."""
    if masks.ndim != 4 or len(masks) != len(image) or masks.shape[2:] != image.shape[2:]:
        raise ValueError(f"masks of shape {tuple(masks.shape)} for image of shape {tuple(image.shape)}: "
                         "expected (b, k, h, w) for (b, c, h, w)")


def one_expert(masks: Tensor) -> Tensor:
    """A random expert's mask for each image, (b, 1, h, w) of (b, k, h, w)."""
    b, k = masks.shape[:2]
    return masks[torch.arange(b), torch.randint(k, (b,))][:, None]


def couple(x_0: Tensor, masks: Tensor) -> Tensor:
    """The draw of x_0 that belongs to each expert, (b, k, h, w): of draws (b, c k, h, w), masks (b, k, h, w).

    Draws are assigned one-to-one to c copies of the masks by the least sum of squared differences, optimal
    transport within the image (arXiv 2302.00482); one of an expert's c draws is taken at random. A random
    expert's draw is any of them equally often, so both marginals are those of independent draws.
    Raises ValueError unless the draws are a multiple of k."""
    k = masks.shape[1]
    copies, rest = divmod(x_0.shape[1], k)
    if rest or not copies:
        raise ValueError(f"{x_0.shape[1]} draws of x_0 for {k} experts: expected a multiple")
    # |x - y|^2 = |x|^2 + |y|^2 - 2 x y, of which only the last depends on the assignment.
    gain = (x_0.flatten(2) @ masks.flatten(2).to(x_0.dtype).mT).repeat(1, 1, copies)  # (b, c k, c k)
    draws = np.stack([np.argsort(linear_sum_assignment(one, maximize=True)[1]) for one in gain.cpu().numpy()])
    of_expert = torch.from_numpy(draws).to(x_0.device).view(-1, copies, k)  # numbers of draws
    one = torch.randint(copies, (len(x_0), 1, k), device=x_0.device)
    chosen = of_expert.gather(1, one)[:, 0]  # (b, k)
    return x_0[torch.arange(len(x_0), device=x_0.device)[:, None], chosen]


def linear_path(x_0: Tensor, x_1: Tensor, t: Tensor, sigma: float = 0.0) -> Path:
    """x_t = t x_1 + (1 - t) x_0 + sigma sqrt(t (1 - t)) z for x_0, x_1 (b, k, h, w) and t (b,) in [0, 1).

    u = (x_1 - x_t) / (1 - t), which is x_1 - x_0 without noise; with it, x_t is a Brownian bridge of scale
    sigma (arXiv 2303.08797, Sec. 3) and u its drift. z is standard normal."""
    t = t[:, None, None, None]
    x_t = t * x_1 + (1 - t) * x_0
    if sigma == 0:
        return Path(x_t, x_1 - x_0)
    x_t = x_t + sigma * (t * (1 - t)).sqrt() * torch.randn_like(x_t)
    return Path(x_t, (x_1 - x_t) / (1 - t))


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


def semantic_loss(x_1t: Tensor, targets: Tensor, all_masks: Tensor, form: str, over: str, against: str
                  ) -> Tensor:
    """L_SF, the mean of 1 - Dice(x_1^t, y), a scalar (Algorithm 1).

    x_1t (b, j, h, w): the predictions on the paths to the masks `targets` (b, j, h, w), out of `all_masks`
    (b, k, h, w).
    form: "soft" keeps the gradient; "thresholded" cuts it, as the released code does. over: see `dice`.
    against: each path's prediction is compared with its "own" target or with "all" masks.
    """
    predicted = x_1t.clamp(0, 1) if form == "soft" else (x_1t.detach() >= 0.5).to(targets.dtype)
    if against == "own":
        return 1 - dice(predicted, targets, over).mean()
    each = [dice(predicted, y[:, None].expand_as(predicted), over).mean() for y in all_masks.unbind(1)]
    return 1 - torch.stack(each).mean()


# Solvers of dx/dt = v(x, t) from t = 0 to t = 1 in equal steps (paper: Euler, 25 steps). Each takes
# velocity(x, t) with t a float, the start x_0 and the number of steps, and returns x at t = 1.

Velocity = Callable[[Tensor, float], Tensor]


def euler(velocity: Velocity, x_0: Tensor, steps: int) -> Tensor:
    """First order, one evaluation per step."""
    x = x_0
    for i in range(steps):
        x = x + velocity(x, i / steps) / steps
    return x


def bridge(velocity: Velocity, x_0: Tensor, steps: int, sigma: float, normal: Callable[[], Tensor]) -> Tensor:
    """Steps of the Brownian bridge of scale sigma from x_0 to the mask that the velocity points at.

    x_s = x_t + (s - t) v + sigma sqrt((s - t) (1 - s) / (1 - t)) z, exact in law where
    x_1^t = x_t + (1 - t) v stays the same. The last step adds no noise and ends at x_1^t. sigma 0: `euler`.
    normal(): z, like x_0."""
    x = x_0
    for i in range(steps):
        x = x + velocity(x, i / steps) / steps
        left = steps - i - 1
        if sigma and left:
            x = x + sigma * math.sqrt(left / (left + 1) / steps) * normal()
    return x


def midpoint(velocity: Velocity, x_0: Tensor, steps: int) -> Tensor:
    """Second order, two evaluations per step: the slope in the middle of the step."""
    x = x_0
    for i in range(steps):
        middle = x + velocity(x, i / steps) / (2 * steps)
        x = x + velocity(middle, (i + 0.5) / steps) / steps
    return x


def heun(velocity: Velocity, x_0: Tensor, steps: int) -> Tensor:
    """Second order, two evaluations per step: the mean of the slopes at both ends."""
    x = x_0
    for i in range(steps):
        start = velocity(x, i / steps)
        end = velocity(x + start / steps, (i + 1) / steps)
        x = x + (start + end) / (2 * steps)
    return x


def rk4(velocity: Velocity, x_0: Tensor, steps: int) -> Tensor:
    """Fourth order, four evaluations per step: the classical Runge-Kutta method."""
    x = x_0
    for i in range(steps):
        k1 = velocity(x, i / steps)
        k2 = velocity(x + k1 / (2 * steps), (i + 0.5) / steps)
        k3 = velocity(x + k2 / (2 * steps), (i + 0.5) / steps)
        k4 = velocity(x + k3 / steps, (i + 1) / steps)
        x = x + (k1 + 2 * k2 + 2 * k3 + k4) / (6 * steps)
    return x


def ab2(velocity: Velocity, x_0: Tensor, steps: int) -> Tensor:
    """Second order, one evaluation per step: two-step Adams-Bashforth, its first step Euler's."""
    before = velocity(x_0, 0.0)
    x = x_0 + before / steps
    for i in range(1, steps):
        now = velocity(x, i / steps)
        x = x + (3 * now - before) / (2 * steps)
        before = now
    return x


SOLVERS: dict[str, Callable[[Velocity, Tensor, int], Tensor]] = {
    "euler": euler, "midpoint": midpoint, "heun": heun, "rk4": rk4, "ab2": ab2,
}
NFE_PER_STEP = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "ab2": 1}
