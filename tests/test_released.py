"""Released weights, loaded, give the outputs that the released code gave with them; others are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models import GTR, STNet, load_released
from models.flow import linear_path
from models.solvers import euler

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    """The arrays of a golden file, and the released weights in it."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    return arrays, {key[2:]: value for key, value in arrays.items() if key.startswith("w:")}


def released_gtr():
    arrays, weights = golden("gtr")
    gtr = GTR(1, (4, 8, 12, 16), convs=3, pool="avg", up="bilinear").requires_grad_(False)
    load_released(gtr, weights)
    return gtr, arrays


def released_net(weight_standardization="released", time_scale=1.0):
    arrays, weights = golden("st_net")
    net = STNet(16, weight_standardization=weight_standardization, time_scale=time_scale)
    load_released(net.requires_grad_(False), weights)
    return net, arrays


def assert_agree(found, expected, tolerance=1e-4):
    """Equal to `tolerance` of the largest value."""
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("key, weight_standardization, time_scale", [
    ("velocity_released", "released", 1.0),
    ("velocity_standard_ws", "standard", 1.0),
    ("velocity_standard_ws_time1000", "standard", 1000.0),
])
def test_st_net_gives_the_released_velocity(key, weight_standardization, time_scale):
    net, arrays = released_net(weight_standardization, time_scale)
    assert_agree(net(arrays["x"], arrays["t"], arrays["image"]), arrays[key])


def test_25_euler_steps_end_where_the_released_code_ends():
    net, arrays = released_net()
    x_0, image = arrays["euler_x0"], arrays["euler_image"]
    end = euler(lambda x, t: net(x, torch.full((3,), t), image), x_0, 25)
    assert_agree(end, arrays["euler25_released"])


def test_the_flow_matching_loss_of_each_annotator_is_the_released_one():
    net, arrays = released_net()
    masks, t = arrays["sfm_masks"], arrays["sfm_t"]
    path = linear_path(arrays["euler_x0"], masks, t)
    for annotator in range(4):
        v = net(path.x_t[:, annotator, None], t, arrays["euler_image"])[:, 0]
        found = (v - path.u[:, annotator]).square().mean().item()
        assert found == pytest.approx(arrays["sfm_mse_per_annotator_released"][annotator].item(), rel=1e-4)


def test_gtr_gives_the_released_gaussian():
    gtr, arrays = released_gtr()
    found = gtr(arrays["image"])
    assert_agree(found.mean.flatten(1), arrays["mean"])
    assert_agree(found.cov_diag.flatten(1), arrays["cov_diag"])
    theirs = arrays["cov_factor"]  # (b, pixels, r)
    assert_agree(found.cov_factor.flatten(2).transpose(1, 2), theirs)


def without(weights, name):
    return {key: value for key, value in weights.items() if key != name}


def refused_st_net():
    """What is wrong with released ST-Net weights, and what the message names."""
    _, weights = golden("st_net")
    return {
        "missing": (without(weights, "init_conv.weight"),
                    r"stem\.weight: checkpoint missing, model \(16, 2, 1, 1\)"),
        "extra": ({**weights, "ema.decay": torch.ones(1)}, r"ema\.decay: checkpoint \(1,\), model missing"),
        "shape": ({**weights, "final_conv.bias": torch.ones(2)},
                  r"final_conv\.bias: checkpoint \(2,\), model \(1,\)"),
        "renamed": ({**without(weights, "mid_attn.fn.norm.bias"), "mid_attn.norms.bias": torch.ones(64)},
                    r"in 2 places.*middle\.attention\.norm\.bias: checkpoint missing"),
        "twice": ({**weights, "stem.weight": torch.ones(16, 2, 1, 1)}, r"stem\.weight twice"),
    }


def refused_gtr():
    _, weights = golden("gtr")
    block = "unet.upsampling_path.2.conv_block.layers"
    return {
        "missing": (without(weights, "mean_l.bias"), r"mean\.bias: checkpoint missing, model \(1,\)"),
        "extra": ({**weights, f"{block}.7.bias": torch.ones(4)},
                  r"unet\.up_blocks\.2\.6\.bias: checkpoint \(4,\), model missing"),
        "shape": ({**weights, "cov_factor_l.bias": torch.ones(9)},
                  r"cov_factor\.bias: checkpoint \(9,\), model \(10,\)"),
        "twice": ({**weights, "mean.bias": torch.ones(1)}, r"mean\.bias twice"),
    }


@pytest.mark.parametrize("build, refused, case", [
    *((released_net, refused_st_net, case) for case in refused_st_net()),
    *((released_gtr, refused_gtr, case) for case in refused_gtr()),
])
def test_weights_that_do_not_fit_are_named_and_not_loaded(build, refused, case):
    weights, expected = refused()[case]
    module, _ = build()
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    with pytest.raises(ValueError, match=expected):
        load_released(module, {name: weight + 1 for name, weight in weights.items()})
    assert all(torch.equal(weight, before[name]) for name, weight in module.state_dict().items())


def test_the_paper_layout_of_gtr_is_refused():
    with pytest.raises(ValueError, match="do not fit this GTR in .* build it with the layout"):
        load_released(GTR(1, (4, 8, 12, 16)), golden("gtr")[1])
