"""Analog Bits and CIMD: schedules, steps between levels, losses, latents."""

import math
from itertools import product

import pytest
import torch

from models.baselines import stepwise
from tests.stepwise import Known, T, one_piece, replay, system
from tests.tiny import SIZE, batch, seeded


def test_schedules_are_those_of_their_papers():
    of_1000, cosine = stepwise.linear(1000).double(), stepwise.cosine(250).double()
    betas = 1 - of_1000[1:] / of_1000[:-1]
    assert (betas[0].item(), betas[-1].item()) == pytest.approx((1e-4, 0.02), rel=1e-2)
    assert betas[499].item() == pytest.approx(1e-4 + 499 / 999 * 0.0199, rel=1e-3)

    def f(t):
        return math.cos((t / 250 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 1, 100, 249):
        assert cosine[t].item() == pytest.approx(f(t) / f(0), rel=1e-5)
    assert (cosine[250] / cosine[249]).item() == pytest.approx(1e-3, rel=1e-3)  # beta is at most 0.999
    for alpha_bar in (of_1000, cosine, stepwise.linear(4).double()):
        assert alpha_bar[0] == 1 and (alpha_bar.diff() < 0).all() and alpha_bar[-1] > 0


@pytest.mark.parametrize("t, s", [(8, 7), (8, 2), (5, 3), (1, 0), (6, 0)])
def test_a_gaussian_step_is_bayes_rule(t, s):
    alpha_bar = stepwise.linear(8).double()
    x_t, x_0, to_t, to_s = torch.tensor(0.7).double(), torch.tensor(-1.0).double(), alpha_bar[t], alpha_bar[s]
    mean, moved = (stepwise.gaussian_step(x_t, x_0, to_t, to_s, torch.tensor(z)).item() for z in (0.0, 1.0))
    if s == 0:
        assert (mean, moved) == pytest.approx((-1, -1), abs=1e-6)
        return
    # x_s ~ N(sqrt(to_s) x_0, 1 - to_s), and x_t = sqrt(kept) x_s + noise: precisions add.
    kept = (to_t / to_s).item()
    precision = 1 / (1 - to_s.item()) + kept / (1 - kept)
    expected = (math.sqrt(to_s) * -1 / (1 - to_s.item()) + math.sqrt(kept) * 0.7 / (1 - kept)) / precision
    assert (mean, moved - mean) == pytest.approx((expected, precision**-0.5), rel=1e-5)


@pytest.mark.parametrize("steps", [T, 3])
@pytest.mark.parametrize("name", ["ab", "cimd"])
def test_states_have_the_distribution_of_their_levels(name, steps):
    """Where the net knows the mask."""
    model, y = system(name), (torch.arange(64) < 20).float().expand(64, 64)
    x_0 = 2 * y - 1

    def answer(x_t, t, seen):
        kept = model.alpha_bar[t]
        return x_0.expand_as(x_t) if name == "ab" else (x_t - kept.sqrt() * x_0) / (1 - kept).sqrt()

    model.net = Known(answer)
    samples = model.sample(torch.zeros(1, 1, 64, 64), 8, steps, seeded(), batch_size=8)
    torch.testing.assert_close(samples, y.expand_as(samples), rtol=0, atol=1e-4)
    for state, t in zip(model.net.states, model.levels(steps), strict=False):
        kept = model.alpha_bar[t]
        z = (state - kept.sqrt() * x_0) / (1 - kept).sqrt()
        if t == T:
            z = state  # the start is noise, whatever little is left of x_0 at T
        assert abs(z.mean().item()) < 5 / math.sqrt(z.numel()), t
        assert z.std().item() == pytest.approx(1, abs=0.02), t


def test_analog_bits_learns_x_0_with_and_without_its_own_guess():
    model, guessed = system("ab"), []
    for seed in range(3):
        terms = one_piece(model, seed)
        image, y, t = replay(seed)
        kept, x_0 = model.alpha_bar[t][:, None, None, None], 2 * y - 1
        x_t = kept.sqrt() * x_0 + (1 - kept).sqrt() * torch.randn(x_0.shape)
        guess = torch.zeros_like(x_0)
        guessed.append(torch.rand(()).item() < 0.5)
        if guessed[-1]:
            guess = model.net(x_t, t / T, torch.cat([image, guess], 1))
        error = model.net(x_t, t / T, torch.cat([image, guess], 1)) - x_0
        expected = sum(value**2 for value in error.flatten().tolist()) / error.numel()
        assert terms == pytest.approx({"loss": expected, "MSE": expected}, rel=1e-5)
    assert set(guessed) == {True, False}


def test_analog_bits_sees_in_sampling_what_it_said_before():
    model = system("ab")
    model.net = Known(lambda x_t, t, seen: torch.full_like(x_t, t / 10 - 0.3 if t < T else 7.0))
    image = batch()[0]
    samples = model.sample(image, 1, generator=seeded())
    guesses = [0, 1, *(t / 10 - 0.3 for t in range(T - 1, 1, -1))]  # 7 is clipped to 1
    for seen, guess in zip(model.net.seen, guesses, strict=True):
        assert torch.equal(seen[:, :1], image)
        torch.testing.assert_close(seen[:, 1], torch.full((2, SIZE, SIZE), float(guess)))
    torch.testing.assert_close(samples, torch.full((2, 1, SIZE, SIZE), (0.1 - 0.3 + 1) / 2))


@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_cimds_terms_agree_with_their_formulas(beta):
    model = system("cimd", beta=beta)
    terms = one_piece(model, 3)
    image, y, t = replay(3)
    z = torch.randn(y.shape)
    p, q = model.prior(image), model.posterior(torch.cat([image, 2 * y - 1], 1))
    e = q.mean + q.std * torch.randn(2, 2)
    kl = 0.0
    for i, latent in product(range(2), range(2)):
        m_p, s_p, m_q, s_q = (tensor[i, latent].item() for tensor in (p.mean, p.std, q.mean, q.std))
        kl += (math.log(s_p / s_q) + (s_q**2 + (m_q - m_p) ** 2) / (2 * s_p**2) - 0.5) / 2  # of two images
    errors = []
    for i in range(2):
        kept = model.alpha_bar[t[i]].item()
        x_t = math.sqrt(kept) * (2 * y[i] - 1) + math.sqrt(1 - kept) * z[i]
        planes = torch.stack([torch.full((SIZE, SIZE), value) for value in e[i].tolist()])
        predicted = model.net(x_t[None], t[i, None] / T, torch.cat([image[i], planes])[None])[0]
        errors.append((predicted - z[i]).square().mean().item())
    mse = sum(errors) / 2
    assert terms == pytest.approx({"loss": mse + beta * kl, "MSE": mse, "KL": kl}, rel=1e-4)


def test_cimd_draws_a_latent_per_sample_from_the_prior_and_keeps_it():
    model, (image, _) = system("cimd"), batch()
    model.net = Known(lambda x_t, t, seen: torch.zeros_like(x_t))
    model.sample(image, 2000, 2, seeded(), batch_size=4000)
    first, second = model.net.seen
    assert torch.equal(first, second) and torch.equal(first[:, :1], image.repeat_interleave(2000, dim=0))
    e = first[:, 1:].unflatten(0, (2, 2000))  # (b, n, latents, h, w)
    assert (e == e[..., :1, :1]).all()
    prior = model.prior(image)
    for i, latent in product(range(2), range(2)):
        draws, mean, std = e[i, :, latent, 0, 0], prior.mean[i, latent].item(), prior.std[i, latent].item()
        assert abs(draws.mean().item() - mean) < 5 * std / math.sqrt(2000)
        assert draws.std().item() == pytest.approx(std, rel=0.1)
