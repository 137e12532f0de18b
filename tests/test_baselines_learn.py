"""Every system learns an image that two experts mark in different places: it draws either, hardly ever both.

`python -m pytest -m slow -s tests/test_baselines_learn.py` prints the shares of its samples: half a minute
of one core for each system."""

import pytest
import torch

from metadata_manager import FlowConfig
from models.baselines import BASELINES

# Training steps of 8 images; options of the system; steps of its sampler.
TRAINING = {"ccdm": (250, {}, 10), "ab": (200, {}, 10), "cimd": (400, {"T": 50}, 10),
            "flow-ssn": (250, {}, 10)}
SAMPLES = 64


def toy():
    """An image (1, 1, 16, 16) with two blobs, and its masks (1, 2, 16, 16), a blob each."""
    masks = torch.zeros(1, 2, 16, 16)
    masks[0, 0, 5:11, 2:6] = 1
    masks[0, 1, 5:11, 10:14] = 1
    return masks.sum(1, keepdim=True) / 2, masks


def trained(name, steps, options):
    torch.manual_seed(0)
    config = FlowConfig(dim=8, dim_mults=(1, 2), experts="one", weight_standardization="none")
    model = BASELINES[name](1, config, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    image, masks = (one.expand(8, -1, -1, -1) for one in toy())
    for _ in range(steps):
        for piece in model.losses(image, masks):
            piece["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


def shares(samples):
    """Of samples (n, 16, 16), shares like the left blob, the right one, both, and none (IoU < 0.6)."""
    left, right = toy()[1][0].bool()
    each = torch.stack([left, right, left | right])
    iou = (samples[:, None] & each).sum((2, 3)) / (samples[:, None] | each).sum((2, 3))  # (n, 3)
    best, which = iou.max(dim=1)
    return [((which == i) & (best >= 0.6)).float().mean().item() for i in range(3)] + [
        (best < 0.6).float().mean().item()]


def test_shares_count_each_kind_of_sample():
    left, right = toy()[1][0].bool()
    most = left.clone()
    most[5] = False
    samples = torch.stack([left, most, right, left | right, left & ~left, left | ~right, ~left, left])
    assert shares(samples) == [3 / 8, 1 / 8, 1 / 8, 3 / 8]


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_a_system_draws_each_of_two_masks_and_not_their_union(name):
    steps, options, sampler_steps = TRAINING[name]
    model = trained(name, steps, options)
    probabilities = model.sample(toy()[0], SAMPLES, sampler_steps, torch.Generator().manual_seed(0))
    left, right, both, none = shares(probabilities[0] >= 0.5)
    print(f"\n{name}: left {left:.2f}, right {right:.2f}, both {both:.2f}, none {none:.2f}")
    assert min(left, right) > 0.25 and both < 0.1 and none < 0.2
