"""SSN, Prob. U-Net, PHiSeg, MoSE, c-SSN, c-Prob. U-Net: their losses against formulas, and their samples."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch.distributions import Independent, Normal, kl_divergence

from metadata_manager import FlowConfig
from models.baselines import CLASSES
from models.baselines.conditioned import ConditionedProbUNet, ConditionedSSN, random_styles
from models.baselines.latent import DiagonalGaussian
from models.baselines.mose import MoSE, greedy_coupling, soft_iou
from models.baselines.phiseg import PHiSeg
from models.baselines.prob_unet import EnergyProbUNet, ProbUNet
from models.baselines.ssn import SSN
from models.energy import energy_score
from tests.tiny import SIZE, batch, seeded

B, K = 2, 3
ONE_SHOT = ("ssn", "prob-unet", "prob-unet-energy", "phiseg", "mose", "c-ssn", "c-prob-unet")
STYLE = torch.tensor([[0, 1, 2], [2, 2, 0]])


def system(kind, channels=1, experts="all", dim_mults=(1, 2), **options):
    torch.manual_seed(0)
    return kind(channels, FlowConfig(dim=4, dim_mults=dim_mults, experts=experts), **options)


def terms(model, seed=3, style=STYLE):
    torch.manual_seed(seed)
    (values,) = model.losses(*batch(), *([style] if model.needs_style else []))
    return values


def cross_entropy(logits, y):
    """Of one mask, summed over pixels."""
    p = logits.detach().double().sigmoid()
    return -sum(math.log(p[i, j] if y[i, j] else 1 - p[i, j]) for i, j in product(*map(range, y.shape)))


def kl(q, p):
    """Of one row."""
    q, p = (Independent(Normal(normal.mean.flatten().double(), normal.std.flatten().double()), 1)
            for normal in (q, p))
    return kl_divergence(q, p).item()


def planes(style, size=SIZE):
    return torch.eye(3)[style][None, :, None, None].expand(1, 3, size, size)


@pytest.mark.parametrize("kind", [SSN, ConditionedSSN])
def test_ssn_is_the_likelihood_of_the_mean_over_antithetic_draws(kind):
    model, (image, masks) = system(kind, rank=2, mc_samples=4), batch()
    loss = terms(model)["loss"].item()

    torch.manual_seed(3)
    if kind is SSN:
        logits = model.net(image).rsample(4, antithetic=True)[:, None].expand(B, K, 4, SIZE, SIZE)
    else:
        features = model.net.unet(image)
        of = model.net.heads(model.fuse(torch.cat([
            torch.cat([features[i, None], planes(STYLE[i, j])], 1) for i, j in product(range(B), range(K))])))
        logits = of.rsample(4, antithetic=True).unflatten(0, (B, K))
    expected = 0.0
    for i, j in product(range(B), range(K)):
        mean = sum(math.exp(-cross_entropy(draw, masks[i, j])) for draw in logits[i, j]) / 4
        expected -= math.log(mean) / (B * K)
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", [ProbUNet, ConditionedProbUNet])
def test_prob_unet_is_the_negative_evidence_bound(kind):
    model, (image, masks) = system(kind, latents=3, beta=7.0), batch()
    values = terms(model)

    torch.manual_seed(3)
    noise = torch.randn(B, K, 3)
    reconstruction, divergence = 0.0, 0.0
    for i, j in product(range(B), range(K)):
        seen = image[i, None]
        if kind is ConditionedProbUNet:
            seen = torch.cat([seen, planes(STYLE[i, j])], 1)
        q, p = model.posterior(torch.cat([seen, masks[i, j][None, None]], 1)), model.prior(seen)
        z = q.mean + q.std * noise[i, j]
        stacked = torch.cat([model.unet(image[i, None]), z.view(1, 3, 1, 1).expand(1, 3, SIZE, SIZE)], 1)
        reconstruction += cross_entropy(model.combine(stacked)[0, 0], masks[i, j]) / (B * K)
        divergence += kl(q, p) / (B * K)
    assert values["cross_entropy"].item() == pytest.approx(reconstruction, rel=1e-5)
    assert values["KL"].item() == pytest.approx(divergence, rel=1e-4) and divergence > 0.01
    assert values["loss"].item() == pytest.approx(reconstruction + 7 * divergence, rel=1e-5)


def test_the_prob_unet_by_the_energy_score_takes_it_of_samples_from_its_prior():
    model, (image, masks) = system(EnergyProbUNet, mc_samples=3), batch()
    loss = terms(model)["loss"]

    torch.manual_seed(3)
    samples = model.draw(image, 3, lambda net, *states: net(*states), None).sigmoid().view(B, 3, SIZE, SIZE)
    assert loss.item() == pytest.approx(energy_score(samples, masks).item(), rel=1e-6)


@pytest.mark.parametrize("mults, levels, sides", [((1, 2), 5, [4, 8]), ((1, 1, 2), 2, [2, 4])])
def test_phiseg_adds_a_cross_entropy_and_a_weighted_divergence_per_level(mults, levels, sides):
    model, (image, masks) = system(PHiSeg, dim_mults=mults, latent_levels=levels), batch()
    values = terms(model)

    torch.manual_seed(3)
    noise = [torch.randn(B, K, 2, side, side) for side in sides]  # the coarsest first
    reconstruction, divergence = 0.0, 0.0
    for i, j in product(range(B), range(K)):
        of_p = model.prior.maps(image[i, None])
        of_q = model.posterior.maps(torch.cat([image[i, None], masks[i, j][None, None]], 1))
        q_1, p_1 = model.posterior.gaussian(0, of_q, []), model.prior.gaussian(0, of_p, [])
        z_1 = q_1.mean + q_1.std * noise[0][i, j]
        q_0, p_0 = model.posterior.gaussian(1, of_q, [z_1]), model.prior.gaussian(1, of_p, [z_1])
        z_0 = q_0.mean + q_0.std * noise[1][i, j]
        divergence += (4 * kl(q_1, p_1) + kl(q_0, p_0)) / (B * K)
        a = model.likelihood([z_1, z_0])[0]
        reconstruction += sum(cross_entropy(logits, masks[i, j]) for logits in a) / (B * K)
    assert values["cross_entropy"].item() == pytest.approx(reconstruction, rel=1e-4)
    assert values["KL"].item() == pytest.approx(divergence, rel=1e-4)
    assert values["loss"].item() == pytest.approx(reconstruction + divergence, rel=1e-4)


def test_a_level_of_phiseg_adds_its_logits_to_those_of_the_coarser_ones():
    model = system(PHiSeg, dim_mults=(1, 2, 2))
    latents = [torch.randn(1, 2, side, side, generator=seeded(side)) for side in (2, 4, 8)]
    before = model.likelihood(latents)
    torch.nn.init.constant_(model.likelihood.heads[1].bias, model.likelihood.heads[1].bias.item() + 1)
    torch.testing.assert_close(model.likelihood(latents) - before,
                               torch.tensor([0.0, 1.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8))


def test_mose_is_the_cost_of_the_coupling_and_the_divergence_of_the_gate_from_it():
    model = system(MoSE, components=3, component_samples=2, gamma=0.25, gate_weight=0.5)
    image, masks = batch()
    values = terms(model)

    torch.manual_seed(3)
    noise = torch.randn(B, 6)
    transport, divergence = 0.0, 0.0
    for i in range(B):
        features, log_gate = model.features(image[i, None])
        samples = [model.decode(features, torch.tensor([s // 2]), noise[i, s, None])[0].sigmoid()
                   for s in range(6)]
        cost = torch.zeros(6, K)
        for s, j in product(range(6), range(K)):
            both = (samples[s] * masks[i, j]).sum()
            cost[s, j] = 1 - (both + 1) / (samples[s].sum() + masks[i, j].sum() - both + 1)
        left, mass = [0.25] * 6, [1 / K] * K
        shares = [0.0] * 3
        for s, j in sorted(product(range(6), range(K)), key=lambda pair: cost[pair].item()):
            moved = min(left[s], mass[j])
            left[s], mass[j] = left[s] - moved, mass[j] - moved
            transport += moved * cost[s, j].item() / B
            shares[s // 2] += moved
        divergence += sum(share * (math.log(share) - log_gate[0, c].item())
                          for c, share in enumerate(shares) if share > 1e-9) / B
    assert values["transport"].item() == pytest.approx(transport, rel=1e-5)
    assert values["KL"].item() == pytest.approx(divergence, rel=1e-4)
    assert values["loss"].item() == pytest.approx(transport + 0.5 * divergence, rel=1e-5)


def optimal_cost(cost, gamma):
    """Of the best coupling, by linear programming over all of them."""
    m, j = cost.shape
    rows, columns = np.repeat(np.eye(m), j, axis=1), np.tile(np.eye(j), m)
    return linprog(cost.numpy().ravel(), rows, np.full(m, gamma), columns, np.full(j, 1 / j)).fun


@pytest.mark.parametrize("gamma", [0.25, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("m, j", [(4, 1), (4, 3), (6, 4), (5, 7)])
def test_the_greedy_coupling_is_feasible_and_not_far_from_the_best(gamma, m, j):
    cost = torch.rand(8, m, j, generator=seeded())
    coupling = greedy_coupling(cost, gamma)
    torch.testing.assert_close(coupling.sum(1), torch.full((8, j), 1 / j))
    assert (coupling >= 0).all() and (coupling.sum(2) <= gamma + 1e-6).all()
    for matrix, total in zip(cost, (coupling * cost).sum((1, 2))):
        best = optimal_cost(matrix, gamma)
        assert best - 1e-5 <= total.item() <= (best + 1e-5 if gamma == 1 else 2.5 * best)


def test_the_greedy_coupling_takes_the_cheapest_pair_first():
    cost = torch.tensor([[[0.1, 0.2], [0.3, 0.9]]])
    # At .5, .2 and .3 together would cost less than .1 and .9.
    assert torch.equal(greedy_coupling(cost, 0.5), torch.tensor([[[0.5, 0.0], [0.0, 0.5]]]))
    assert torch.equal(greedy_coupling(cost, 1.0), torch.tensor([[[0.5, 0.5], [0.0, 0.0]]]))
    with pytest.raises(ValueError, match="gamma=0.4 for 2 samples: expected gamma .* at least 1"):
        greedy_coupling(cost, 0.4)


def test_soft_iou_of_binary_masks():
    a, b = torch.tensor([[1.0, 1], [0, 0]]), torch.tensor([[1.0, 0], [1, 0]])
    assert soft_iou(a, b).item() == 2 / 4  # (1 + 1) / (3 + 1)
    assert soft_iou(0 * a, 0 * a).item() == soft_iou(a, a).item() == 1


def test_the_divergence_of_gaussians_is_that_of_torch_and_finite_for_extreme_outputs():
    q, p = (DiagonalGaussian.of(torch.randn(3, 8, 2, 2, generator=seeded(i)) * 3) for i in range(2))
    expected = [kl(q.rows(torch.tensor([i])), p.rows(torch.tensor([i]))) for i in range(3)]
    assert q.kl(p).tolist() == pytest.approx(expected, rel=1e-4)
    narrow = DiagonalGaussian.of(torch.tensor([[5.0, -1000.0]]))
    assert narrow.kl(narrow).item() == 0 and q.mean.shape == (3, 4, 2, 2)
    assert DiagonalGaussian.of(torch.tensor([[0.0, 1000.0]])).kl(narrow).isfinite().all()


@pytest.mark.parametrize("experts", ["all", "one"])
@pytest.mark.parametrize("name", ONE_SHOT)
def test_every_weight_learns_and_only_the_loss_has_a_gradient(name, experts):
    model = system(CLASSES[name], experts=experts)
    values = terms(model)
    values["loss"].backward()
    gradients = {weight: value.grad for weight, value in model.named_parameters()}
    assert not [weight for weight, gradient in gradients.items() if gradient is None or not gradient.any()]
    assert [term for term, value in values.items() if value.requires_grad] == ["loss"]


@pytest.mark.parametrize("name", [name for name in ONE_SHOT if name != "prob-unet-energy"])
def test_a_random_expert_per_step_has_the_loss_of_its_mask_and_style(name):
    model, every, (image, masks) = system(CLASSES[name], experts="one"), system(CLASSES[name]), batch()
    loss = terms(model)["loss"].item()

    torch.manual_seed(3)
    each, chosen = torch.arange(B), torch.randint(K, (B,))
    style = [STYLE[each, chosen][:, None]] if model.needs_style else []
    (expected,) = every.losses(image, masks[each, chosen][:, None], *style)
    assert loss == pytest.approx(expected["loss"].item(), rel=1e-6)


@pytest.mark.parametrize("name", ONE_SHOT)
def test_samples_are_probabilities_that_the_generator_decides(name):
    model, image = system(CLASSES[name], channels=3), batch(channels=3)[0]
    samples = model.sample(image, 5, generator=seeded(5))
    assert samples.shape == (B, 5, SIZE, SIZE) and not samples.requires_grad
    assert 0 <= samples.min() < samples.max() <= 1 and model.nfe() == 1
    torch.manual_seed(9)
    assert torch.equal(model.sample(image, 5, steps=1, generator=seeded(5)), samples)
    assert not torch.equal(model.sample(image, 5, generator=seeded(6)), samples)
    assert (samples[:, 0] != samples[:, 1]).any()
    for batch_size in (1, 3, 100):
        torch.testing.assert_close(model.sample(image, 5, None, seeded(5), batch_size), samples)


@pytest.mark.parametrize("name", ONE_SHOT)
def test_a_sample_is_of_its_own_image(name):
    model, image = system(CLASSES[name]), batch()[0]
    samples = model.sample(image, 4, generator=seeded())
    for i in range(2):
        other = image.clone()
        other[i] *= 5
        changed = model.sample(other, 4, generator=seeded())
        assert torch.equal(samples[1 - i], changed[1 - i])
        assert all((a != b).any() for a, b in zip(samples[i], changed[i]))


@pytest.mark.parametrize("kind", [ConditionedSSN, ConditionedProbUNet])
def test_every_style_is_sampled_equally_often(kind):
    model, asked = system(kind), []
    place = model.prior if kind is ConditionedProbUNet else model.fuse
    place.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0][:, -3:, 0, 0]))
    image = torch.zeros(2, 1, SIZE, SIZE)
    styles, rows = random_styles(image, 600, seeded())
    model.sample(image, 1)
    assert torch.equal(asked[0], torch.eye(3).repeat(2, 1)) and styles.tolist() == [0, 1, 2, 0, 1, 2]
    assert (rows[:600] < 3).all() and (rows[600:] >= 3).all()
    counts = rows.bincount(minlength=6)
    assert ((counts - 200).abs() < 5 * math.sqrt(600 * 2 / 9)).all()


@pytest.mark.parametrize("style, message", [
    (STYLE[:, :2], r"shape \(2, 2\)"), (STYLE + 1, r"values \[1, 2, 3\]"), (STYLE[0], r"shape \(3,\)")])
def test_styles_that_are_none_are_refused(style, message):
    for kind in (ConditionedSSN, ConditionedProbUNet):
        with pytest.raises(ValueError, match=rf"style of .*{message}.*expected \(2, 3\) of 0 to 2"):
            terms(system(kind), style=style)


@pytest.mark.parametrize("name", ONE_SHOT)
def test_what_does_not_fit_is_refused(name):
    model, (image, masks) = system(CLASSES[name]), batch()
    extra = [STYLE] if model.needs_style else []
    with pytest.raises(ValueError, match=r"masks of shape .* for image of shape"):
        next(model.losses(image, masks[:, :, :4], *extra))
    for asked in ({"steps": 2}, {"n": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="expected one step .* at least 1"):
            model.sample(**{"image": image, "n": 1, **asked})
    with pytest.raises(ValueError, match=r"\(8, 9\) pixels: .* multiple of 2"):
        model.sample(torch.zeros(1, 1, 8, 9), 1)
