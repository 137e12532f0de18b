"""SFM, Segmentation Flow Matching (paper, Algorithm 1): time, path and solvers, as functions."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# t is drawn from {0, 1/1000, ..., 999/1000}: the paper's lambda = 1e-3.
TIMES = 1000


@dataclass(frozen=True)
class Path:
    """States on the paths from x_0 to x_1, and their velocity: both (b, k, h, w)."""

    x_t: Tensor
    u: Tensor


def draw_time(b: int, device: torch.device) -> Tensor:
    """t for each image of the batch, (b,), shared by its annotators (Algorithm 1)."""
    return torch.randint(TIMES, (b,), device=device) / TIMES


def check_masks(image: Tensor, masks: Tensor) -> None:
    """Raises ValueError for masks that do not fit the image."""
    if masks.ndim != 4 or len(masks) != len(image) or masks.shape[2:] != image.shape[2:]:
        raise ValueError(f"masks of shape {tuple(masks.shape)} for image of shape {tuple(image.shape)}: "
                         "expected (b, k, h, w) for (b, c, h, w)")


def one_expert(masks: Tensor) -> Tensor:
    """A random expert's mask for each image, (b, 1, h, w) of (b, k, h, w)."""
    b, k = masks.shape[:2]
    # Drawn on the CPU, so that a seed gives the same experts on every device.
    chosen = torch.randint(k, (b,)).to(masks.device, non_blocking=True)
    return masks[torch.arange(b, device=masks.device), chosen][:, None]


def linear_path(x_0: Tensor, x_1: Tensor, t: Tensor) -> Path:
    """x_t = t x_1 + (1 - t) x_0 and u = x_1 - x_0, for x_0 and x_1 (b, k, h, w) and t (b,) in [0, 1)."""
    # One t per image: the same for its annotators and for all pixels.
    t = t[:, None, None, None]
    return Path(t * x_1 + (1 - t) * x_0, x_1 - x_0)


def endpoint(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """x_1^t = x_t + (1 - t) v, the mask predicted from time t: (b, k, h, w)."""
    # The path is straight: along what is left of it, 1 - t, the velocity does not change.
    return x_t + (1 - t[:, None, None, None]) * v


# Solvers of dx/dt = v(x, t) from t = 0 to t = 1 in equal steps (paper: Euler, 25 steps). Each takes
# velocity(x, t) with t a float, x at t = 0 and the number of steps, and returns x at t = 1.
# No solver asks for v at t = 1: training draws t below 1, so the velocity there is not learned.

Velocity = Callable[[Tensor, float], Tensor]


def euler(velocity: Velocity, x_0: Tensor, steps: int) -> Tensor:
    """First order, one network evaluation per step."""
    x = x_0
    for i in range(steps):
        # t is i / steps, not a sum of steps, so that rounding does not add up.
        x = x + velocity(x, i / steps) / steps
    return x


def midpoint(velocity: Velocity, x_0: Tensor, steps: int) -> Tensor:
    """Second order, two network evaluations per step: the slope in the middle of the step."""
    x = x_0
    for i in range(steps):
        # Half a step with the slope at its beginning, only to see the slope in the middle.
        middle = x + velocity(x, i / steps) / (2 * steps)
        x = x + velocity(middle, (i + 0.5) / steps) / steps
    return x


def ab2(velocity: Velocity, x_0: Tensor, steps: int) -> Tensor:
    """Second order, one network evaluation per step: two-step Adams-Bashforth, its first step Euler's."""
    # The first step has no earlier slope to use.
    before = velocity(x_0, 0.0)
    x = x_0 + before / steps
    for i in range(1, steps):
        now = velocity(x, i / steps)
        # now + (now - before) / 2: the slope in the middle of the step, extrapolated from the last two.
        x = x + (3 * now - before) / (2 * steps)
        before = now
    return x


@dataclass(frozen=True)
class Solver:
    """A solver and its network evaluations per step."""

    solve: Callable[[Velocity, Tensor, int], Tensor]
    nfe: int


# A solver that is added is one entry here.
SOLVERS = {"euler": Solver(euler, nfe=1), "midpoint": Solver(midpoint, nfe=2), "ab2": Solver(ab2, nfe=1)}
