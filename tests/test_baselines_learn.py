"""Every system learns an image of which two experts have different masks: it draws either, hardly ever both.

`ATFM_LEARN=all python -m pytest -m slow -s tests/test_baselines_learn.py` prints the shares of the samples of
all systems, of three runs of training: half a minute of one idle core for each. Without ATFM_LEARN it is one
run of a few, which may be named."""

import os

import pytest
import torch

from metadata_manager import BASELINES, FlowConfig
from models.baselines import CLASSES

# Training steps of 8 images, their learning rate; options of the system; steps of its sampler.
TRAINING = {"ssn": (700, 1e-3, {}, None), "prob-unet": (1100, 3e-3, {"beta": 1.0}, None),
            "prob-unet-energy": (400, 1e-3, {}, None), "phiseg": (700, 2e-3, {}, None),
            "mose": (500, 1e-3, {}, None),
            "c-ssn": (700, 1e-3, {}, None), "c-prob-unet": (700, 1e-3, {"beta": 0.1}, None),
            "ccdm": (500, 1e-3, {}, 10), "ab": (400, 1e-3, {}, 10), "cimd": (600, 1e-3, {"T": 50}, 10),
            "flow-ssn": (250, 3e-3, {}, 10)}
STEPWISE = {"dim_mults": (1, 2), "weight_standardization": "none"}  # of ST-Net
LEARN = os.environ.get("ATFM_LEARN", "mose ccdm flow-ssn").split()
SEEDS = (0, 1, 2) if LEARN == ["all"] else (0,)
GAUSSIAN = {"ssn", "c-ssn"}  # between two masks a Gaussian over logits passes through parts of them
# Between two places a loss of soft IoU can stay at their union.
EMPTY_OR_RIGHT = {"mose", "prob-unet-energy"}
STYLE = [0, 1, 2, 2]  # of left, right, left, right: the first two styles are sure, the third is not
SAMPLES = 64


def toy(name=""):
    """An image (1, 1, 16, 16) with two objects, and its masks (1, 2, 16, 16): left and right.

    Their shapes differ, since a global average does not see places. Left may be empty, see EMPTY_OR_RIGHT."""
    masks = torch.zeros(1, 2, 16, 16)
    masks[0, 0, 2:14, 2:5] = name not in EMPTY_OR_RIGHT
    masks[0, 1, 5:11, 8:14] = 1
    return masks.sum(1, keepdim=True) / 2, masks


def trained(name, steps, lr, options, seed):
    torch.manual_seed(seed)
    more = STEPWISE if TRAINING[name][3] else {}
    config = FlowConfig(dim=8, experts=BASELINES[name][1]["experts"], **more)
    model = CLASSES[name](1, config, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    image, masks = (tensor.expand(8, -1, -1, -1) for tensor in toy(name))
    style = []
    if model.needs_style:
        masks, style = masks.repeat(1, 2, 1, 1), [torch.tensor(STYLE).expand(8, 4)]
    for _ in range(steps):
        for piece in model.losses(image, masks, *style):
            piece["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


def shares(samples, masks):
    """Of samples (n, 16, 16): like the left mask, the right one, both, and none of them (IoU < 0.6)."""
    left, right = masks[0].bool()
    each = torch.stack([left, right, left | right])
    union = (samples[:, None] | each).sum((2, 3))
    iou = ((samples[:, None] & each).sum((2, 3)) / union).where(union > 0, 1.0)  # (n, 3)
    best, which = iou.max(dim=1)  # the first, if left is empty and so right is both
    return [((which == i) & (best >= 0.6)).float().mean().item() for i in range(3)] + [
        (best < 0.6).float().mean().item()]


def test_shares_count_each_kind_of_sample():
    left, right = toy()[1][0].bool()
    nearly = left.clone()
    nearly[2] = False
    samples = torch.stack([left, nearly, right, left | right, left & ~left, left | ~right, ~left, left])
    assert shares(samples, toy()[1]) == [3 / 8, 1 / 8, 1 / 8, 3 / 8]
    assert shares(samples, toy("mose")[1]) == [1 / 8, 1 / 8, 0, 6 / 8]


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING if LEARN == ["all"] else LEARN)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_system_draws_each_of_two_masks_and_not_their_union(name, seed):
    steps, lr, options, sampler_steps = TRAINING[name]
    model, (image, masks) = trained(name, steps, lr, options, seed), toy(name)
    probabilities = model.sample(image, SAMPLES, sampler_steps, torch.Generator().manual_seed(0))
    left, right, both, none = shares(probabilities[0] >= 0.5, masks)
    print(f"\n{name}, seed {seed}: left {left:.2f}, right {right:.2f}, both {both:.2f}, none {none:.2f}")
    assert min(left, right) > 0.2 and both < 0.2 and none < (0.6 if name in GAUSSIAN else 0.35)
