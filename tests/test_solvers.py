"""Solvers against ODEs with closed forms: exactness, order of convergence, cost."""

import math

import pytest
import torch

from metadata_manager import SOLVERS as NAMES
from models.solvers import EVALUATIONS_PER_STEP, SOLVERS

ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "ab2": 2}


def velocity(x, t):
    """Logistic growth at rate 2 (1 + t): 1 / x - 1 falls by exp(-2 t - t^2), by exp(-3) from t = 0 to 1."""
    return 2 * (1 + t) * x * (1 - x)


def error(solver, steps):
    x_0 = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    exact = 1 / (1 + (1 / x_0 - 1) * math.exp(-3))
    return (SOLVERS[solver](velocity, x_0, steps) - exact).abs().max().item()


def test_every_solver_is_tested_counted_and_offered():
    assert set(ORDERS) == set(SOLVERS) == set(EVALUATIONS_PER_STEP) == set(NAMES)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_constant_velocity_is_integrated_exactly(solver, steps):
    x_0, u = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    x_1 = SOLVERS[solver](lambda x, t: u, x_0, steps)
    torch.testing.assert_close(x_1, x_0 + u, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("solver", SOLVERS)
def test_error_falls_with_the_order_of_the_solver(solver):
    measured = [math.log2(error(solver, steps) / error(solver, 2 * steps)) for steps in (32, 64)]
    assert measured == pytest.approx([ORDERS[solver]] * 2, abs=0.1)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 10])
def test_number_of_evaluations(solver, steps):
    times = []
    SOLVERS[solver](lambda x, t: times.append(t) or x, torch.ones(1), steps)
    assert len(times) == EVALUATIONS_PER_STEP[solver] * steps
    assert all(type(t) is float and 0 <= t <= 1 for t in times)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_source_is_left_as_it_is(solver):
    x_0 = torch.ones(3)
    SOLVERS[solver](lambda x, t: x, x_0, 3)
    assert torch.equal(x_0, torch.ones(3))
