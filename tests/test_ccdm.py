"""CCDM's posterior, loss and states, against enumeration."""

import functools
import math
from itertools import product

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, kl_divergence

from tests.stepwise import Known, T, one_piece, replay, system
from tests.tiny import SIZE, batch, seeded


def transition(alpha_bar, t):
    """[label at t - 1][label at t]: a label is drawn anew with probability beta_t."""
    beta = 1 - alpha_bar[t] / alpha_bar[t - 1]
    return [[1 - beta / 2, beta / 2], [beta / 2, 1 - beta / 2]]


@functools.cache
def enumerated_posterior(alpha_bar, x_0, x_t, t):
    """q(x_{t-1} = 1 | x_t, x_0): of the ways from x_0 to x_t at level t, the fraction through 1 at t - 1.

    alpha_bar: a tuple."""
    weights = [0.0, 0.0]
    for between in product((0, 1), repeat=t - 1):
        way = (x_0, *between, x_t)
        likelihood = math.prod(transition(alpha_bar, i)[way[i - 1]][way[i]] for i in range(1, t + 1))
        weights[way[t - 1]] += likelihood
    return weights[1] / sum(weights)


@pytest.mark.parametrize("seed", range(4))
def test_ccdms_loss_is_the_divergence_of_posteriors(seed):
    model = system("ccdm")
    terms = one_piece(model, seed)
    image, y, t = replay(seed)
    kept = model.alpha_bar[t][:, None, None, None]
    x_t = torch.bernoulli(kept * y + (1 - kept) / 2)
    p_0 = model.net(x_t, t / T, image).sigmoid()
    divergences, levels = [], tuple(model.alpha_bar.tolist())
    for i, row, column in product(range(2), range(SIZE), range(SIZE)):
        at, level = (i, 0, row, column), t[i].item()
        of = [enumerated_posterior(levels, label, int(x_t[at]), level) for label in (0, 1)]
        p = Bernoulli((1 - p_0[at]) * of[0] + p_0[at] * of[1])
        divergences.append(kl_divergence(Bernoulli(torch.tensor(of[int(y[at])])), p).item())
    expected = sum(divergences) / len(divergences)
    assert terms == pytest.approx({"loss": expected, "KL": expected}, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("value", [-200.0, 200.0])
def test_ccdms_loss_and_gradient_are_finite_where_the_net_is_sure(value):
    model = system("ccdm", T=2)  # both t = 1, where posteriors are 0 or 1, and t = 2 come up
    nn.init.constant_(model.net.final_conv.bias, value)
    for seed in range(3):
        torch.manual_seed(seed)
        for piece in model.losses(*batch()):
            piece["loss"].backward()
            assert piece["loss"].isfinite()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
    assert model.net.final_conv.bias.grad.abs() > 0


@pytest.mark.parametrize("steps", [T, 3])
def test_ccdms_states_have_the_distribution_of_their_levels(steps):
    """Where the net knows p(x_0 | x_t) of a mask whose pixels are 1 with probability 0.3."""
    model, p_1 = system("ccdm"), 0.3

    def answer(x_t, t, seen):
        kept = model.alpha_bar[t]
        ratio = (kept * x_t + (1 - kept) / 2) / (kept * (1 - x_t) + (1 - kept) / 2)  # p(x_t | 1) / p(x_t | 0)
        return math.log(p_1 / (1 - p_1)) + ratio.log()

    model.net = Known(answer)
    model.sample(torch.zeros(1, 1, 64, 64), 8, steps, seeded(), batch_size=8)
    levels = model.levels(steps)
    assert len(model.net.states) == steps
    for state, t in zip(model.net.states, levels):
        kept = model.alpha_bar[t].item()
        expected = kept * p_1 + (1 - kept) / 2
        assert set(state.unique().tolist()) == {0, 1}
        assert abs(state.mean().item() - expected) < 5 * math.sqrt(0.25 / state.numel()), t
