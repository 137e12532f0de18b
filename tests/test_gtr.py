"""GTR: its layout, its low-rank Gaussian and its Monte Carlo likelihood."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import GTR, LowRankGaussian, monte_carlo_nll
from models.flags import experiment
from tests.oracle import golden
from tests.tiny import seeded


def gaussian(b=2, rank=2, h=2, w=3):
    random = seeded(3)
    return LowRankGaussian(torch.randn(b, h, w, generator=random),
                           torch.randn(b, rank, h, w, generator=random),
                           torch.rand(b, h, w, generator=random) + 0.1)


def dense_covariance(of, image):
    """D D^T + L of one image over its pixels."""
    factor = of.cov_factor[image].flatten(1).T  # (h * w, r)
    return factor @ factor.T + of.cov_diag[image].flatten().diag()


def test_both_layouts_are_those_of_the_sources():
    with torch.device("meta"):
        paper, released = (GTR.of(experiment("LIDC", preset).gtr, channels=1)
                           for preset in ("paper", "released"))
    convs = [module.out_channels for module in paper.unet.modules() if isinstance(module, nn.Conv2d)]
    ups = [module.out_channels for module in paper.unet.modules() if isinstance(module, nn.ConvTranspose2d)]
    assert convs == [32, 32, 64, 64, 128, 128, 192, 192, 128, 128, 64, 64, 32, 32] and ups == [128, 64, 32]
    assert paper.unet.pool is F.max_pool2d and paper.cov_factor.out_channels == 10
    assert str(GTR()) == str(paper)
    assert sum(weight.numel() for weight in released.parameters()) == 2_260_524


@pytest.mark.parametrize("layout", [{}, {"convs": 3, "pool": "avg", "up": "bilinear"}])
def test_an_image_gives_a_gaussian_over_its_pixels_in_float32(layout):
    gtr = GTR(3, (4, 8, 12), rank=5, **layout)
    nn.init.constant_(gtr.log_cov_diag.bias, -100)
    with torch.autocast("cpu", torch.bfloat16):
        result = gtr(torch.rand(2, 3, 8, 12))
    assert result.mean.shape == result.cov_diag.shape == (2, 8, 12)
    assert result.cov_factor.shape == (2, 5, 8, 12)
    assert {result.mean.dtype, result.cov_factor.dtype, result.cov_diag.dtype} == {torch.float32}
    torch.testing.assert_close(result.cov_diag, torch.full((2, 8, 12), 2e-5))  # never less


def test_a_sample_is_the_sigmoid_of_a_logit_map():
    gtr, image = GTR(1, (4, 8), rank=2), torch.rand(2, 1, 8, 8)
    x_0 = gtr.sample(image, 5, seeded(3))
    assert x_0.shape == (2, 5, 8, 8) and not x_0.requires_grad
    assert torch.equal(x_0, torch.sigmoid(gtr(image).sample(5, seeded(3))))


def test_test_time_augmentation_draws_from_the_gaussians_of_all_eight_positions():
    gtr, image = GTR(1, (4, 8), rank=2, tta=True), torch.rand(1, 1, 8, 12)
    with torch.no_grad():
        gtr.cov_factor.weight.zero_(), gtr.cov_factor.bias.zero_()
        gtr.log_cov_diag.weight.zero_(), gtr.log_cov_diag.bias.fill_(-30.0)  # a sample is nearly the mean,
        gtr.mean.weight.mul_(300)  # which differs from pixel to pixel
    samples = gtr.sample(image, 200, seeded(0))[0]
    means = []
    for flips, turns in product(([], [-1]), range(4)):
        mean = gtr(torch.rot90(image.flip(flips), turns, (-2, -1))).mean
        means.append(torch.rot90(mean, -turns, (-2, -1)).flip(flips)[0].sigmoid())
    distance, position = (samples[:, None] - torch.stack(means)).flatten(2).abs().amax(2).min(1)
    assert distance.max() < 0.01
    assert position.bincount(minlength=8).min() >= 10  # of 25 expected


@pytest.mark.parametrize("shape, expected", [
    ((2, 3, 16, 16), r"\(2, 3, 16, 16\): expected \(b, 1, h, w\)"),
    ((1, 16, 16), r"\(1, 16, 16\): expected \(b, 1, h, w\)"),
    ((2, 1, 16, 18), r"\(16, 18\).*multiple of 4"),
    ((2, 1, 18, 16), r"\(18, 16\).*multiple of 4"),
])
def test_an_image_of_another_shape_is_refused(shape, expected):
    with pytest.raises(ValueError, match=expected):
        GTR(1, (4, 4, 4), rank=2)(torch.rand(shape))


@pytest.mark.parametrize("antithetic", [False, True])
def test_samples_have_the_stated_mean_and_covariance(antithetic, device):
    of, n = gaussian(), 50_000
    there = LowRankGaussian(of.mean.to(device), of.cov_factor.to(device), of.cov_diag.to(device))
    samples = there.rsample(n, antithetic, seeded(device=device)).flatten(2).cpu()
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
    residuals = of.rsample(6, antithetic=True, generator=seeded()) - of.mean[:, None]
    torch.testing.assert_close(residuals[:, 3:], -residuals[:, :3])
    assert len({tuple(residual.flatten().tolist()) for residual in residuals[0, :3]}) == 3


@pytest.mark.parametrize("n, antithetic", [(5, True), (0, True), (0, False)])
def test_no_samples_and_an_odd_number_of_antithetic_ones_are_refused(n, antithetic):
    with pytest.raises(ValueError, match=f"{n} samples: expected at least one, and an even number"):
        gaussian().rsample(n, antithetic)


def test_rsample_is_differentiable_and_sample_is_not():
    of = gaussian()
    parameters = [of.mean.requires_grad_(), of.cov_factor.requires_grad_(), of.cov_diag.requires_grad_()]
    samples = of.rsample(5, generator=seeded())
    to_mean, to_factor, to_diag = torch.autograd.grad(samples.sum(), parameters)
    assert torch.equal(to_mean, torch.full_like(to_mean, 5))  # d sum / d mu: one from each of the samples
    assert (to_factor != 0).all() and (to_diag != 0).all()
    assert torch.equal(of.sample(5, seeded()), samples) and not of.sample(5).requires_grad


def test_a_covariance_that_cannot_be_factorised_still_gives_samples():
    columns = torch.full((1, 10, 8, 8), 1e3)  # ten equal ones: the capacitance matrix is 1 + 3e12 everywhere
    of = LowRankGaussian(torch.zeros(1, 8, 8), columns, torch.full((1, 8, 8), 2e-5))
    factor = columns.flatten(2).transpose(1, 2)
    with pytest.raises(torch.linalg.LinAlgError):
        torch.distributions.LowRankMultivariateNormal(of.mean.flatten(1), factor, of.cov_diag.flatten(1))
    samples = of.sample(2000, seeded())
    assert samples.isfinite().all()
    assert samples.std().item() == pytest.approx(1e3 * math.sqrt(10), rel=0.1)


def likelihood_case():
    logits = torch.randn(2, 5, 3, 4, generator=seeded()) * 3
    return logits, (torch.rand(2, 3, 3, 4, generator=seeded(1)) < 0.4).float()


def test_likelihood_of_one_mask_and_of_all_agrees_with_plain_loops():
    logits, masks = likelihood_case()
    logs = torch.zeros(2, 3)
    for i, annotator in product(range(2), range(3)):
        likelihoods = []
        for p in torch.sigmoid(logits[i].double()):
            factors = [p[y, x] if masks[i, annotator, y, x] else 1 - p[y, x]
                       for y, x in product(range(3), range(4))]
            likelihoods.append(math.prod(factors).item())
        logs[i, annotator] = math.log(sum(likelihoods) / 5)
    assert monte_carlo_nll(logits, masks[:, 0]).item() == pytest.approx(-logs[:, 0].mean().item(), rel=1e-5)
    assert monte_carlo_nll(logits, masks).item() == pytest.approx(-logs.mean().item(), rel=1e-5)


@pytest.mark.parametrize("logits, y, expected", [
    ([0.0, 0.0, 0.0], 0, math.log(2)),
    ([math.log(3), -math.log(3)], 1, math.log(2)),  # probabilities 3/4 and 1/4: on average 1/2
    ([math.log(3), math.log(3)], 0, math.log(4)),
    ([1000.0], 1, 0.0),
    ([-1000.0], 1, 1000.0),
    ([1000.0, -1000.0], 1, math.log(2)),
])
def test_likelihood_of_one_pixel(logits, y, expected):
    result = monte_carlo_nll(torch.tensor(logits).view(1, -1, 1, 1), torch.full((1, 1, 1), float(y)))
    assert result.item() == pytest.approx(expected, abs=1e-6)


def test_likelihood_agrees_with_the_released_code():
    theirs = golden("mc_loss")
    logits = theirs["logit_samples"][:, :, 0].transpose(0, 1)  # theirs is (m, b, 1, h, w)
    result = monte_carlo_nll(logits, theirs["target"][:, 0])
    assert result.item() == pytest.approx(theirs["loss"].item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(3, 4), (3, 3, 4), (2, 4, 3), (1, 3, 3, 4), (2, 1, 1, 3, 4)])
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"mask of shape .* does not fit logits of shape \(2, 5, 3, 4\)"):
        monte_carlo_nll(likelihood_case()[0], torch.zeros(shape))
