"""Released weights, loaded, give the outputs that the released code gave with them; others are refused."""

import pytest
import torch

from models import GTR, STNet, load_released
from models.flow import euler, linear_path
from tests.oracle import golden


def released(name):
    """The arrays of a golden file, and the released weights in it."""
    arrays = golden(name)
    return arrays, {key[2:]: value for key, value in arrays.items() if key.startswith("w:")}


def gtr_module():
    return GTR(1, (4, 8, 12, 16), convs=3, pool="avg", up="bilinear").requires_grad_(False)


def released_net(weight_standardization="released", time_scale=1.0):
    arrays, weights = released("st_net")
    net = STNet(16, weight_standardization=weight_standardization, time_scale=time_scale)
    load_released(net.requires_grad_(False), weights)
    return net, arrays


def assert_close(result, expected):
    """Equal to 1e-4 of the largest value."""
    assert result.shape == expected.shape and result.dtype == torch.float32
    assert (result - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("key, weight_standardization, time_scale", [
    ("velocity_released", "released", 1.0),
    ("velocity_standard_ws", "standard", 1.0),
    ("velocity_standard_ws_time1000", "standard", 1000.0),
])
def test_st_net_gives_the_released_velocity(key, weight_standardization, time_scale, device):
    net, arrays = released_net(weight_standardization, time_scale)
    inputs = (arrays[name].to(device) for name in ("x", "t", "image"))
    assert_close(net.to(device)(*inputs).cpu(), arrays[key])


def test_25_euler_steps_end_where_the_released_code_ends():
    net, arrays = released_net()
    x_0, image = arrays["euler_x0"], arrays["euler_image"]
    assert_close(euler(lambda x, t: net(x, torch.full((3,), t), image), x_0, 25), arrays["euler25_released"])


def test_the_flow_matching_loss_of_each_annotator_is_the_released_one():
    net, arrays = released_net()
    path = linear_path(arrays["euler_x0"], arrays["sfm_masks"], arrays["sfm_t"])
    for annotator, expected in enumerate(arrays["sfm_mse_per_annotator_released"].tolist()):
        v = net(path.x_t[:, annotator, None], arrays["sfm_t"], arrays["euler_image"])[:, 0]
        result = (v - path.u[:, annotator]).square().mean().item()
        assert result == pytest.approx(expected, rel=1e-4)


def test_gtr_gives_the_released_gaussian(device):
    arrays, weights = released("gtr")
    gtr = gtr_module()
    load_released(gtr, weights)
    result = gtr.to(device)(arrays["image"].to(device))
    assert_close(result.mean.cpu().flatten(1), arrays["mean"])
    assert_close(result.cov_diag.cpu().flatten(1), arrays["cov_diag"])
    factor = result.cov_factor.cpu().flatten(2).transpose(1, 2)
    assert_close(factor, arrays["cov_factor"])  # theirs: (b, pixels, r)


@pytest.mark.parametrize("name, changed, expected", [  # None: left out
    ("st_net", {"init_conv.weight": None}, r"stem\.weight: checkpoint missing, model \(16, 2, 1, 1\)"),
    ("st_net", {"ema.decay": torch.ones(1)}, r"ema\.decay: checkpoint \(1,\), model missing"),
    ("st_net", {"final_conv.bias": torch.ones(2)}, r"final_conv\.bias: checkpoint \(2,\), model \(1,\)"),
    ("st_net", {"mid_attn.fn.norm.bias": None, "mid_attn.norms.bias": torch.ones(64)},
     r"in 2 places.*middle\.attention\.norm\.bias: checkpoint missing"),
    ("st_net", {"stem.weight": torch.ones(16, 2, 1, 1)}, r"stem\.weight twice"),
    ("gtr", {"mean_l.bias": None}, r"mean\.bias: checkpoint missing, model \(1,\)"),
    ("gtr", {"unet.upsampling_path.2.conv_block.layers.7.bias": torch.ones(4)},
     r"unet\.up_blocks\.2\.6\.bias: checkpoint \(4,\), model missing"),
    ("gtr", {"cov_factor_l.bias": torch.ones(9)}, r"cov_factor\.bias: checkpoint \(9,\), model \(10,\)"),
    ("gtr", {"mean.bias": torch.ones(1)}, r"mean\.bias twice"),
])
def test_weights_that_do_not_fit_are_named_and_not_loaded(name, changed, expected):
    weights = {key: weight for key, weight in (released(name)[1] | changed).items() if weight is not None}
    module = gtr_module() if name == "gtr" else STNet(16)
    before = {key: weight.clone() for key, weight in module.state_dict().items()}
    with pytest.raises(ValueError, match=expected):
        load_released(module, weights)
    assert all(torch.equal(weight, before[key]) for key, weight in module.state_dict().items())


def test_the_paper_layout_of_gtr_is_refused():
    with pytest.raises(ValueError, match="do not fit this GTR in .* build it with the layout"):
        load_released(GTR(1, (4, 8, 12, 16)), released("gtr")[1])
