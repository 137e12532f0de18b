"""GTR: its layout, its low-rank Gaussian and its Monte Carlo likelihood."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models import GTR, LowRankGaussian, monte_carlo_nll

GOLDEN = np.load(Path(__file__).parent / "golden" / "mc_loss.npz")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(b=2, rank=2, h=2, w=3):
    random = seeded(3)
    return LowRankGaussian(torch.randn(b, h, w, generator=random),
                           torch.randn(b, rank, h, w, generator=random),
                           torch.rand(b, h, w, generator=random) + 0.1)


def dense_covariance(of, image):
    """D D^T + L of one image over its pixels."""
    factor = of.cov_factor[image].flatten(1).T  # (h * w, r)
    return factor @ factor.T + of.cov_diag[image].flatten().diag()


def test_released_layout_has_the_released_number_of_parameters():
    with torch.device("meta"):
        gtr = GTR(convs=3, pool="avg", up="bilinear")
    assert sum(weight.numel() for weight in gtr.parameters()) == 2_260_524


def test_paper_layout_is_the_default():
    with torch.device("meta"):
        gtr = GTR()
    convs = [module for module in gtr.unet.modules() if isinstance(module, nn.Conv2d)]
    ups = [module for module in gtr.unet.modules() if isinstance(module, nn.ConvTranspose2d)]
    assert [conv.out_channels for conv in convs] == [
        32, 32, 64, 64, 128, 128, 192, 192, 128, 128, 64, 64, 32, 32]
    assert [up.out_channels for up in ups] == [128, 64, 32]
    assert gtr.unet.pool is torch.nn.functional.max_pool2d
    assert gtr.cov_factor.out_channels == 10


@pytest.mark.parametrize("layout", [{}, {"convs": 3, "pool": "avg", "up": "bilinear"}])
def test_an_image_gives_a_gaussian_over_its_pixels(layout):
    found = GTR(3, (4, 8, 12), rank=5, **layout)(torch.rand(2, 3, 8, 12))
    assert found.mean.shape == found.cov_diag.shape == (2, 8, 12)
    assert found.cov_factor.shape == (2, 5, 8, 12)
    assert (found.cov_diag > 0).all()


def test_the_variance_never_vanishes():
    gtr = GTR(1, (4,), rank=2)
    nn.init.constant_(gtr.log_cov_diag.bias, -100)
    assert gtr(torch.rand(1, 1, 4, 4)).cov_diag.min().item() == pytest.approx(2e-5)


def test_the_gaussian_stays_in_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        found = GTR(1, (4, 8), rank=2)(torch.rand(1, 1, 8, 8))
    assert {found.mean.dtype, found.cov_factor.dtype, found.cov_diag.dtype} == {torch.float32}


@pytest.mark.parametrize("shape, expected", [
    ((2, 3, 16, 16), r"\(2, 3, 16, 16\): expected \(b, 1, h, w\)"),
    ((1, 16, 16), r"\(1, 16, 16\): expected \(b, 1, h, w\)"),
    ((2, 1, 16, 18), r"\(16, 18\).*multiple of 4"),
    ((2, 1, 18, 16), r"\(18, 16\).*multiple of 4"),
])
def test_an_image_of_another_shape_is_refused(shape, expected):
    with pytest.raises(ValueError, match=expected):
        GTR(1, (4, 4, 4), rank=2)(torch.rand(shape))


@pytest.mark.parametrize("layout, expected", [({"pool": "mean"}, "pool='mean'.*max, avg"),
                                              ({"up": "nearest"}, "up='nearest'.*transposed or bilinear")])
def test_an_unknown_layout_is_refused(layout, expected):
    with pytest.raises(ValueError, match=expected):
        GTR(**layout)


@pytest.mark.parametrize("antithetic", [False, True])
def test_samples_have_the_stated_mean_and_covariance(antithetic):
    of, n = gaussian(), 50_000
    samples = of.rsample(n, antithetic, seeded()).flatten(2)
    for image in range(2):
        covariance = dense_covariance(of, image)
        variance = covariance.diagonal()
        # Standard errors of the mean and of each entry of the covariance of n draws; pairs count as one draw.
        draws = n / 2 if antithetic else n
        of_mean = (variance / draws).sqrt()
        of_covariance = ((variance[:, None] * variance + covariance.square()) / draws).sqrt()
        assert ((samples[image].mean(0) - of.mean[image].flatten()).abs() < 5 * of_mean).all()
        assert ((samples[image].T.cov() - covariance).abs() < 5 * of_covariance).all()


def test_antithetic_samples_come_in_pairs_about_the_mean():
    of = gaussian()
    samples = of.rsample(6, antithetic=True, generator=seeded())
    assert samples.shape == (2, 6, 2, 3)
    for m in range(3):
        torch.testing.assert_close(samples[:, m] - of.mean, of.mean - samples[:, m + 3])
        assert not torch.equal(samples[:, m], samples[:, (m + 1) % 3])


@pytest.mark.parametrize("n, antithetic", [(5, True), (0, True), (0, False)])
def test_no_samples_and_an_odd_number_of_antithetic_ones_are_refused(n, antithetic):
    with pytest.raises(ValueError, match=f"{n} samples: expected at least one, and an even number"):
        gaussian().rsample(n, antithetic)


def test_the_same_generator_gives_the_same_samples():
    of = gaussian()
    samples = of.sample(4, seeded(7))
    assert torch.equal(samples, of.sample(4, seeded(7)))
    assert torch.equal(samples, of.rsample(4, generator=seeded(7)))
    assert not torch.equal(samples, of.sample(4, seeded(8)))


def test_rsample_is_differentiable_and_sample_is_not():
    of = gaussian()
    parameters = [of.mean.requires_grad_(), of.cov_factor.requires_grad_(), of.cov_diag.requires_grad_()]
    to_mean, to_factor, to_diag = torch.autograd.grad(of.rsample(5, generator=seeded()).sum(), parameters)
    assert torch.equal(to_mean, torch.full_like(to_mean, 5))  # d sum / d mu: one from each of the samples
    assert (to_factor != 0).all() and (to_diag != 0).all()
    assert not of.sample(5).requires_grad


def test_a_covariance_that_cannot_be_factorised_still_gives_samples():
    columns = torch.full((1, 10, 8, 8), 1e3)  # ten equal ones: the capacitance matrix is 1 + 3e12 everywhere
    of = LowRankGaussian(torch.zeros(1, 8, 8), columns, torch.full((1, 8, 8), 2e-5))
    with pytest.raises(torch.linalg.LinAlgError):
        of.distribution()
    samples = of.sample(2000, seeded())
    assert samples.isfinite().all()
    assert samples.std().item() == pytest.approx(1e3 * math.sqrt(10), rel=0.1)


def test_log_prob_agrees_with_the_dense_gaussian():
    of, x = gaussian(), torch.randn(2, 6, generator=seeded(1))
    found = of.distribution().log_prob(x)
    for image in range(2):
        dense = torch.distributions.MultivariateNormal(of.mean[image].flatten(), dense_covariance(of, image))
        assert found[image].item() == pytest.approx(dense.log_prob(x[image]).item(), rel=1e-4)


def nll_of_loops(logits, masks):
    """Eq. 5 for logits (b, m, h, w) and masks (b, h, w), in double precision."""
    total = 0.0
    for samples, mask in zip(logits.double(), masks):
        likelihood = 0.0
        for sample in samples:
            of_sample = 1.0
            for logit, y in zip(sample.flatten().tolist(), mask.flatten().tolist()):
                probability = 1 / (1 + math.exp(-logit))
                of_sample *= probability if y else 1 - probability
            likelihood += of_sample / len(samples)
        total -= math.log(likelihood)
    return total / len(logits)


def likelihood_case():
    logits = torch.randn(2, 5, 3, 4, generator=seeded()) * 3
    return logits, (torch.rand(2, 3, 3, 4, generator=seeded(1)) < 0.4).float()


def test_likelihood_agrees_with_plain_loops():
    logits, masks = likelihood_case()
    found, expected = monte_carlo_nll(logits, masks[:, 0]).item(), nll_of_loops(logits, masks[:, 0])
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("logits, y, expected", [
    ([0.0], 1, math.log(2)),
    ([0.0, 0.0, 0.0], 0, math.log(2)),
    ([math.log(3), -math.log(3)], 1, math.log(2)),  # probabilities 3/4 and 1/4: on average 1/2
    ([1000.0], 1, 0.0),
    ([-1000.0], 1, 1000.0),
    ([1000.0, -1000.0], 1, math.log(2)),
])
def test_likelihood_of_one_pixel(logits, y, expected):
    found = monte_carlo_nll(torch.tensor(logits).view(1, -1, 1, 1), torch.full((1, 1, 1), float(y)))
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_likelihood_agrees_with_the_released_code():
    logits = torch.from_numpy(GOLDEN["logit_samples"])[:, :, 0].transpose(0, 1)  # theirs is (m, b, 1, h, w)
    found = monte_carlo_nll(logits, torch.from_numpy(GOLDEN["target"])[:, 0])
    assert found.item() == pytest.approx(float(GOLDEN["loss"]), rel=1e-5)


def test_likelihood_of_all_annotators_is_the_mean_over_them():
    logits, masks = likelihood_case()
    each = [monte_carlo_nll(logits, masks[:, annotator]).item() for annotator in range(3)]
    assert monte_carlo_nll(logits, masks).item() == pytest.approx(sum(each) / 3, rel=1e-5)


def test_likelihood_has_a_gradient_to_every_logit():
    logits, masks = likelihood_case()
    (gradient,) = torch.autograd.grad(monte_carlo_nll(logits.requires_grad_(), masks), logits)
    assert gradient.isfinite().all() and (gradient != 0).all()


@pytest.mark.parametrize("shape", [(3, 4), (3, 3, 4), (2, 4, 3), (2, 3, 5, 4), (1, 3, 3, 4), (2, 1, 1, 3, 4)])
def test_a_mask_of_another_shape_is_refused(shape):
    logits, _ = likelihood_case()
    with pytest.raises(ValueError, match=r"mask of shape .* does not fit logits of shape \(2, 5, 3, 4\)"):
        monte_carlo_nll(logits, torch.zeros(shape))
