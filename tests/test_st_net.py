"""ST-Net: size, weight standardization, time embedding, recomputation; its outputs are in test_released."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from metadata_manager import FlowConfig
from models import STNet
from models.flags import experiment
from models.norm import Norm
from models.st_net import ResidualBlock, StandardizedConv2d, standardize, time_embedding


def inputs(b=2, size=8):
    random = torch.Generator().manual_seed(0)
    x_t, image = torch.rand(2, b, 1, size, size, generator=random)
    return x_t, torch.rand(b, generator=random), image


def convolutions(net):
    return [module for module in net.modules() if isinstance(module, StandardizedConv2d)]


@pytest.mark.parametrize("what, expected", [("LIDC", 38_547_585), ("isic3_style_concat", 152_133_889)])
def test_number_of_parameters(what, expected):
    with torch.device("meta"):
        net = STNet.of(experiment(what).flow)
    assert sum(weight.numel() for weight in net.parameters()) == expected


def test_a_config_reaches_all_15_residual_blocks():
    net = STNet.of(FlowConfig(dim=8, dim_mults=(1, 2, 2), weight_standardization="released", time_scale=7.0,
                              recompute=True))
    blocks = [module for module in net.modules() if isinstance(module, ResidualBlock)]
    assert len(blocks) == 15 and all(block.recompute for block in blocks)
    assert [conv.method for conv in convolutions(net)] == ["released"] * 30
    assert (net.dim, len(net.downs), net.time_scale) == (8, 3, 7.0)


@pytest.mark.parametrize("dim_mults, size", [((1,), 5), ((1, 2), 6), ((1, 2, 4, 4), 16)])
def test_other_widths_give_a_velocity_per_pixel(dim_mults, size):
    x_t, t, image = inputs(size=size)
    assert STNet(4, dim_mults)(x_t, t, image).shape == x_t.shape


def test_each_filter_is_standardized_alone():
    weight = torch.tensor([[1.0, 3.0] * 2, [2.0, 6.0] * 2]).view(2, 1, 2, 2)  # standard deviations 1 and 2
    signs = torch.tensor([-1.0, 1.0] * 2).view(1, 2, 2)
    for method, factors in ("standard", (1, 1)), ("released", (1, 4)):
        expected = torch.stack([factor * signs for factor in factors])
        torch.testing.assert_close(standardize(weight, method), expected, rtol=1e-5, atol=0)
    assert standardize(weight, "none") is weight


@pytest.mark.parametrize("method", ["standard", "released", "none"])
def test_fixed_weights_give_the_same_field_and_leave_the_net_alone(method):
    net = STNet(8, weight_standardization=method)
    before, fixed = copy.deepcopy(net.state_dict()), net.with_fixed_weights()
    torch.testing.assert_close(fixed(*inputs()), net(*inputs()))
    assert {conv.method for conv in convolutions(fixed)} == {"none"}
    assert {conv.method for conv in convolutions(net)} == {method}
    assert all(torch.equal(weight, before[name]) for name, weight in net.state_dict().items())
    assert all(weight.requires_grad for weight in net.parameters())


def test_the_norm_for_cuda_is_torch_s_with_its_gradients():
    """Called on a CPU; maps of a mean far from 0."""
    norm, random = Norm(6), torch.Generator().manual_seed(0)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x, weights = 3 * torch.randn(2, 2, 6, 5, 4, generator=random) + 5
    scale, shift = torch.randn(2, 2, 6, generator=random)
    for modulation in ((), (scale, shift)):
        results = []
        for normalize in (norm.forward, norm.split):
            inputs = [tensor.clone().requires_grad_() for tensor in (x, *modulation)]
            y = normalize(*inputs)
            (y * weights).sum().backward()
            results.append([y, *(tensor.grad for tensor in inputs), norm.weight.grad, norm.bias.grad])
            norm.zero_grad()
        with torch.no_grad():  # as in sampling, in one pass
            torch.testing.assert_close(norm.split(x, *modulation), results[0][0], rtol=1e-5, atol=1e-4)
        for split, plain in zip(*results, strict=True):
            torch.testing.assert_close(split, plain, rtol=1e-5, atol=1e-4)


def test_its_moments_are_of_float32_under_bfloat16():
    norm, x = Norm(4), (torch.randn(1, 4, 32, 32) + 30).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                result = norm.split(x)
            assert result.dtype == torch.float32
            torch.testing.assert_close(result, F.group_norm(x.float(), 1), rtol=1e-4, atol=1e-4)


def test_a_net_of_cuda_s_norms_has_the_same_gradients(device, monkeypatch):
    gradients = []
    assert Norm(1).splits(torch.empty(0, device=device)) == (device.type == "cuda")
    for splits in (False, True):
        torch.manual_seed(0)
        net = STNet(8).to(device)
        monkeypatch.setattr(Norm, "splits", lambda norm, x, splits=splits: splits)
        net(*(tensor.to(device) for tensor in inputs())).square().mean().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in net.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_time_embedding_agrees_with_its_formula():
    t = torch.tensor([0.0, 0.137, 860.0])
    for result, time in zip(time_embedding(t, 8), t.tolist()):
        angles = [time * 10000 ** (-j / 3) for j in range(4)]
        assert result.tolist() == pytest.approx([*map(math.sin, angles), *map(math.cos, angles)], abs=1e-4)


@pytest.mark.parametrize("x_t, t, image", [
    ((2, 1, 8, 8), (2,), (2, 1, 8, 4)),
    ((2, 1, 8, 8), (2,), (1, 1, 8, 8)),
    ((2, 3, 8, 8), (2,), (2, 3, 8, 8)),
    ((2, 1, 8, 8), (1,), (2, 1, 8, 8)),
    ((2, 1, 10, 8), (2,), (2, 1, 10, 8)),
    ((2, 1, 8, 10), (2,), (2, 1, 8, 10)),
    ((2, 8, 8), (2,), (2, 8, 8)),
])
def test_other_shapes_are_refused(x_t, t, image):
    with pytest.raises(ValueError, match=r"x_t \(.*\), t \(.*\), image \(.*\): expected .* multiples of 4"):
        STNet(4)(torch.zeros(x_t), torch.zeros(t), torch.zeros(image))


@pytest.mark.parametrize("choices, expected", [
    ({"weight_standardization": "weird"}, "weight_standardization='weird': expected standard, released or"),
    ({"dim": 7}, "dim=7: expected an even number"),
    ({"dim": 2}, "dim=2: expected an even number"),
])
def test_other_settings_are_refused(choices, expected):
    with pytest.raises(ValueError, match=expected):
        STNet(**choices)


def test_recomputing_gives_the_same_gradients_by_a_second_forward_pass():
    velocities, gradients, standardizations = [], [], []
    for recompute in False, True:
        torch.manual_seed(0)
        net, calls = STNet(8, recompute=recompute), []
        for conv in convolutions(net):
            conv.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        velocities.append(net(*inputs()))
        velocities[-1].square().mean().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in net.parameters()]))
        standardizations.append(len(calls))
    torch.testing.assert_close(*velocities)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)
    assert standardizations == [30, 60]
