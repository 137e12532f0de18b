"""ST-Net: size, weight standardization, time embedding, recomputation; its outputs are in test_released."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models import STNet
from models.st_net import ResidualBlock, standardize, time_embedding


def inputs(b=2, size=8):
    random = torch.Generator().manual_seed(0)
    x_t, image = torch.rand(2, b, 1, size, size, generator=random)
    return x_t, torch.rand(b, generator=random), image


def small_net(**choices):
    torch.manual_seed(0)
    return STNet(8, **choices)


def gradients(net, v):
    found = torch.autograd.grad(v.square().mean(), list(net.parameters()))
    return torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize("dim, expected", [(128, 38_547_585), (256, 152_133_889)])
def test_number_of_parameters(dim, expected):
    with torch.device("meta"):
        net = STNet(dim)
    assert sum(weight.numel() for weight in net.parameters()) == expected


def test_there_are_15_residual_blocks():
    blocks = [module for module in small_net().modules() if isinstance(module, ResidualBlock)]
    assert len(blocks) == 15
    released = small_net(weight_standardization="released").standardized()
    assert [conv.method for conv in released] == ["released"] * 30


@pytest.mark.parametrize("groups, same", [(1, False), (2, True)])
def test_the_size_of_a_group_of_channels_is_normalized_away(groups, same):
    torch.manual_seed(0)
    block = ResidualBlock(4, 4, time_channels=3, method="none", groups=groups)
    x, time = torch.rand(2, 4, 5, 5), torch.rand(2, 3)
    before = block(time, x)
    with torch.no_grad():
        for weight in block.conv1.parameters():
            weight[2:] *= 10
    assert torch.allclose(block(time, x), before, atol=1e-2) == same


@pytest.mark.parametrize("dim_mults, size", [((1,), 5), ((1, 2), 6), ((1, 2, 4, 4), 16)])
def test_other_widths_give_a_velocity_per_pixel(dim_mults, size):
    x_t, t, image = inputs(size=size)
    assert STNet(4, dim_mults)(x_t, t, image).shape == x_t.shape


def test_standardized_weight_of_one_filter():
    weight = torch.tensor([1.0, 3.0] * 2).view(1, 1, 2, 2)  # mean 2, standard deviation 1
    expected = torch.tensor([-1.0, 1.0] * 2).view(1, 1, 2, 2)
    for method, factor in ("standard", 1 / math.sqrt(1 + 1e-5)), ("released", math.sqrt(1 + 1e-5)):
        torch.testing.assert_close(standardize(weight, method), factor * expected, rtol=1e-6, atol=0)
    assert standardize(weight, "none") is weight
    # Twice the weight: the standard one is the same, the released one has four times the size.
    torch.testing.assert_close(standardize(2 * weight, "standard"), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(standardize(2 * weight, "released"), 4 * expected, rtol=1e-5, atol=0)


def test_each_filter_is_standardized_alone():
    weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    weight *= torch.arange(1.0, 6).view(5, 1, 1, 1)
    found = standardize(weight, "standard").flatten(1)
    torch.testing.assert_close(found.mean(1), torch.zeros(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.std(1, correction=0), torch.ones(5), rtol=1e-4, atol=0)


def test_time_embedding_agrees_with_its_formula():
    t = torch.tensor([0.0, 0.137, 860.0])
    found = time_embedding(t, 8)
    for i, time in enumerate(t.tolist()):
        angles = [time * 10000 ** (-j / 3) for j in range(4)]
        expected = [*map(math.sin, angles), *map(math.cos, angles)]
        assert found[i].tolist() == pytest.approx(expected, abs=1e-4)


def test_time_is_scaled_before_its_embedding():
    x_t, t, image = inputs()
    scaled, plain = small_net(time_scale=1000.0), small_net(time_scale=1.0)
    assert torch.equal(scaled(x_t, t, image), plain(x_t, 1000 * t, image))
    assert not torch.equal(scaled(x_t, t, image), plain(x_t, t, image))
    assert small_net().time_scale == 1000


def test_the_velocity_depends_on_every_input_and_not_on_the_batch():
    net, (x_t, t, image) = small_net(), inputs()
    v = net(x_t, t, image)
    for changed in (x_t + 0.1, t, image), (x_t, t + 0.1, image), (x_t, t, image + 0.1):
        assert (net(*changed) - v).abs().max() > 1e-3
    torch.testing.assert_close(net(x_t[:1], t[:1], image[:1]), v[:1])


@pytest.mark.parametrize("x_t, t, image", [
    ((2, 1, 8, 8), (2,), (2, 1, 8, 4)),
    ((2, 1, 8, 8), (2,), (1, 1, 8, 8)),
    ((2, 1, 8, 8), (2,), (2, 3, 8, 8)),
    ((2, 3, 8, 8), (2,), (2, 3, 8, 8)),
    ((2, 1, 8, 8), (1,), (2, 1, 8, 8)),
    ((2, 1, 8, 8), (2, 1), (2, 1, 8, 8)),
    ((2, 1, 8, 8), (), (2, 1, 8, 8)),
    ((2, 1, 10, 8), (2,), (2, 1, 10, 8)),
    ((2, 1, 8, 10), (2,), (2, 1, 8, 10)),
    ((2, 8, 8), (2,), (2, 8, 8)),
])
def test_other_shapes_are_refused(x_t, t, image):
    with pytest.raises(ValueError, match=r"x_t \(.*\), t \(.*\), image \(.*\): expected .* multiples of 4"):
        small_net()(torch.zeros(x_t), torch.zeros(t), torch.zeros(image))


@pytest.mark.parametrize("choices, expected", [
    ({"weight_standardization": "weird"},
     "weight_standardization='weird': expected standard, released or none"),
    ({"dim": 7}, "dim=7: expected an even number"),
    ({"dim": 2}, "dim=2: expected an even number"),
    ({"dim": 8, "groups": 3}, "groups=3: expected a divisor of dim=8"),
    ({"groups": 0}, "groups=0: expected a divisor of dim=128"),
])
def test_other_settings_are_refused(choices, expected):
    with pytest.raises(ValueError, match=expected):
        STNet(**choices)


def is_deterministic(net):
    """Whether a training forward pass neither draws random numbers nor gives two different results."""
    arguments, state = inputs(), torch.get_rng_state()
    v, again = net.train()(*arguments), net(*arguments)
    return torch.equal(v, again) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_net_draws_no_random_numbers(recompute):
    """What lets a step be split over passes, or recomputed, without changing its gradients."""
    net = small_net(recompute=recompute)
    assert is_deterministic(net)
    with_dropout = copy.deepcopy(net)
    with_dropout.final_conv = nn.Sequential(nn.Dropout(0.1), with_dropout.final_conv)
    assert not is_deterministic(with_dropout)


def standardizations(net):
    """How often a training step standardizes a weight."""
    calls = []
    for block in net.standardized():
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients(net, net(*inputs()))
    return len(calls)


def test_recomputing_gives_the_same_gradients_by_a_second_forward_pass():
    keeping, recomputing = small_net(), small_net(recompute=True)
    v, again = keeping(*inputs()), recomputing(*inputs())
    torch.testing.assert_close(again, v)
    torch.testing.assert_close(gradients(recomputing, again), gradients(keeping, v), rtol=1e-5, atol=1e-8)
    assert standardizations(keeping) == 30
    assert standardizations(recomputing) == 60


@pytest.mark.parametrize("recompute", [False, True])
def test_the_whole_net_can_be_checkpointed(recompute):
    net, arguments = small_net(recompute=recompute), inputs()
    v, kept = checkpoint(net, *arguments, use_reentrant=False), net(*arguments)
    torch.testing.assert_close(v, kept)
    torch.testing.assert_close(gradients(net, v), gradients(net, kept), rtol=1e-5, atol=1e-8)
