"""Solvers of the flow's ODE dx/dt = v(x, t) from t = 0 to t = 1 in equal steps (paper: Euler, 25 steps).

Each takes velocity(x, t) with t a float, the source x_0 and the number of steps, and returns x at t = 1.
"""

from collections.abc import Callable

from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]


def euler(velocity: Velocity, x_0: Tensor, steps: int) -> Tensor:
    """First order, one evaluation per step."""
    x = x_0
    for i in range(steps):
        x = x + velocity(x, i / steps) / steps
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
EVALUATIONS_PER_STEP = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "ab2": 1}
