"""ATFM: the objective of a batch, in one pass or several, and samples, on networks of a few weights."""

import copy
import functools
import math

import pytest
import torch
from torch import nn

from models import ATFM, GTR, STNet
from models.atfm import grey, ready

SIZE = 8


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(b=2, k=3, channels=1):
    image = torch.rand(b, channels, SIZE, SIZE, generator=seeded(1))
    return image, (torch.rand(b, k, SIZE, SIZE, generator=seeded(2)) < 0.4).float()


def system(channels=1, recompute=False, **choices):
    torch.manual_seed(0)
    return ATFM(GTR(channels, (4, 8), rank=2), STNet(4, (1, 2), recompute=recompute), **choices)


class Listening(nn.Module):
    """A velocity field of zeros that remembers the x_t, t and image it was asked for."""

    def forward(self, x_t, t, image):
        self.x_t, self.t, self.image = x_t, t, image
        return torch.zeros_like(x_t)


class Leading(nn.Module):
    """A velocity field that leads straight to the masks x_1 (b, 1, h, w)."""

    def __init__(self, x_1):
        super().__init__()
        self.x_1 = x_1

    def forward(self, x_t, t, image):
        return (self.x_1 - x_t) / (1 - t)[:, None, None, None]

    def standardized(self):
        return iter(())


def single_pass(atfm, image, masks, seed=0):
    """The terms of a batch whose annotators go through the net at once."""
    torch.manual_seed(seed)
    (terms,) = atfm.losses(image, masks)
    return terms


def step(atfm, masks_of=3, seed=0):
    """A training step's gradient and its terms summed over parts; the same seed draws the same numbers."""
    torch.manual_seed(seed)
    atfm.zero_grad()
    sums, parts = {}, 0
    for part in atfm.losses(*batch(k=masks_of)):
        part["loss"].backward()
        parts += 1
        for name, value in part.items():
            sums[name] = sums.get(name, 0) + value.item()
    return torch.cat([weight.grad.flatten() for weight in atfm.net.parameters()]), sums, parts


def assert_same(gradient, expected):
    """Equal up to the rounding of float32."""
    assert expected.norm() > 0
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("choices", [
    {}, {"semantic_target": "all"}, {"dice_over": "batch"}, {"dice": "thresholded"},
    {"source": "normal", "signed": True, "condition_dropout": 0.5},
])
@pytest.mark.parametrize("annotators_per_pass, expected_parts", [(1, 3), (2, 2), (3, 1)])
def test_parts_add_up_to_a_single_pass(choices, annotators_per_pass, expected_parts):
    gradient, terms, parts = step(system(alpha=0.5, annotators_per_pass=annotators_per_pass, **choices))
    whole_gradient, whole_terms, one = step(system(alpha=0.5, **choices))
    assert (parts, one) == (expected_parts, 1)
    assert terms == pytest.approx(whole_terms, rel=1e-5)
    assert_same(gradient, whole_gradient)


def test_parts_do_not_add_up_if_the_net_draws_random_numbers():
    """That the test above would notice a dropout in the net."""
    atfm = system(annotators_per_pass=1)
    atfm.net.final_conv = nn.Sequential(nn.Dropout(0.1), atfm.net.final_conv)
    whole = copy.deepcopy(atfm)
    whole.annotators_per_pass = None
    with pytest.raises(AssertionError):
        assert_same(step(atfm)[0], step(whole)[0])


@pytest.mark.parametrize("annotators_per_pass", [1, None])
def test_recomputing_does_not_change_the_gradient(annotators_per_pass):
    recomputing = system(recompute=True, annotators_per_pass=annotators_per_pass)
    assert_same(step(recomputing)[0], step(system(annotators_per_pass=annotators_per_pass))[0])


def test_the_loss_is_the_sum_of_its_weighted_terms():
    terms = single_pass(system(alpha=0.25), *batch())
    assert terms["loss"].item() == pytest.approx(terms["L_FM"].item() + 0.25 * terms["L_SF"].item())
    assert terms["loss"].requires_grad and not terms["L_FM"].requires_grad and not terms["L_SF"].requires_grad


def test_flow_matching_loss_agrees_with_plain_loops():
    image, masks = batch()
    atfm = ATFM(system().gtr, Listening())
    found = single_pass(atfm, image, masks)["L_FM"].item()
    torch.manual_seed(0)
    x_0 = atfm.source(image, 1)
    errors = [(0 - (y - source)) ** 2  # v = 0 against u = x_1 - x_0
              for i in range(2) for annotator in range(3)
              for y, source in zip(masks[i, annotator].flatten().tolist(), x_0[i, 0].flatten().tolist())]
    assert found == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_only_a_soft_semantic_term_changes_the_gradient():
    without = step(system(alpha=0.0))[0]
    assert torch.equal(step(system(alpha=1.0, dice="thresholded"))[0], without)
    assert (step(system(alpha=1.0))[0] - without).norm() > 1e-2 * without.norm()


@pytest.mark.parametrize("signed", [False, True])
def test_the_true_velocity_has_no_loss(signed):
    image, masks = batch()
    x_1 = masks.flatten(0, 1)[:, None]
    atfm = ATFM(None, Leading(2 * x_1 - 1 if signed else x_1), source="normal", signed=signed)
    terms = single_pass(atfm, image, masks)
    assert terms["L_FM"].item() == pytest.approx(0, abs=1e-6)
    assert terms["L_SF"].item() == pytest.approx(0, abs=1e-5)


def test_annotators_share_the_source_and_the_time():
    image, masks = batch(b=4)
    listening = Listening()
    atfm = ATFM(system().gtr, listening)
    single_pass(atfm, image, masks)
    t, x_t = listening.t.view(4, 3), listening.x_t.view(4, 3, SIZE, SIZE)
    assert torch.equal(t, t[:, :1].expand(4, 3)) and len(t[:, 0].unique()) == 4
    time = t[:, :, None, None]
    x_0 = (x_t - time * masks) / (1 - time)
    torch.testing.assert_close(x_0, x_0[:, :1].expand_as(x_0), rtol=0, atol=1e-3)
    assert torch.equal(listening.image, image.repeat_interleave(3, dim=0))


def test_one_expert_is_drawn_for_each_image():
    b, k = 200, 4
    masks = torch.arange(k).float().view(1, k, 1, 1).expand(b, k, 2, 2)  # annotator i has the value i
    listening = Listening()
    single_pass(ATFM(None, listening, source="normal", experts="one"), torch.ones(b, 1, 2, 2), masks)
    torch.manual_seed(0)
    x_0, t = torch.randn(b, 1, 2, 2), listening.t[:, None, None, None]
    drawn = ((listening.x_t - (1 - t) * x_0) / t)[t.flatten() > 0.1]  # x_1
    torch.testing.assert_close(drawn, drawn.round()[:, :, :1, :1].expand_as(drawn), rtol=0, atol=1e-4)
    shares = drawn[:, 0, 0, 0].round().long().bincount(minlength=k) / len(drawn)
    assert (shares - 1 / k).abs().max() < 5 * math.sqrt(1 / k * (1 - 1 / k) / len(drawn))


def test_gtr_is_not_trained():
    atfm = system()
    before = copy.deepcopy(atfm.gtr.state_dict())
    optimizer = torch.optim.Adam(atfm.parameters(), lr=0.1, weight_decay=0.1)
    net_before = copy.deepcopy(atfm.net.state_dict())
    for seed in range(3):
        step(atfm, seed=seed)
        optimizer.step()
    assert all(weight.grad is None for weight in atfm.gtr.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in atfm.gtr.state_dict().items())
    assert all((weight != net_before[name]).any() for name, weight in atfm.net.state_dict().items())


def test_whole_images_are_dropped_at_the_stated_rate():
    b, rate = 2000, 0.3
    listening = Listening()
    atfm = ATFM(None, listening, source="normal", condition_dropout=rate)
    single_pass(atfm, torch.ones(b, 1, 2, 2), torch.zeros(b, 2, 2, 2))
    kept = listening.image.flatten(1)
    assert torch.equal(kept, kept[:, :1].expand_as(kept))  # all pixels of an image or none
    assert torch.equal(kept[0::2], kept[1::2])  # for all of its annotators
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert (kept == 0).float().mean().item() == pytest.approx(rate, abs=5 * math.sqrt(rate * (1 - rate) / b))


def test_colour_images_reach_the_net_in_grey_and_gtr_in_colour():
    image, masks = batch(channels=3)
    listening = Listening()
    atfm = ATFM(GTR(3, (4, 8), rank=2), listening)
    single_pass(atfm, image, masks[:, :1])
    expected = 0.299 * image[:, 0] + 0.587 * image[:, 1] + 0.114 * image[:, 2]
    torch.testing.assert_close(listening.image[:, 0], expected)
    assert grey(image[:, :1]) is not None and torch.equal(grey(image[:, :1]), image[:, :1])


def test_source_is_a_sample_of_gtr_as_probabilities():
    atfm, (image, _) = system(), batch()
    expected = torch.sigmoid(atfm.gtr(image).sample(5, seeded(3)))
    assert torch.equal(atfm.source(image, 5, seeded(3)), expected)


def test_normal_source_needs_no_gtr():
    atfm = ATFM(None, STNet(4, (1, 2)), source="normal")
    x_0 = atfm.source(torch.zeros(2, 1, SIZE, SIZE), 200, seeded())
    assert x_0.shape == (2, 200, SIZE, SIZE)
    assert (x_0.mean().item(), x_0.std().item()) == pytest.approx((0, 1), abs=0.03)
    assert atfm.sample(batch()[0], 2, steps=1).shape == (2, 2, SIZE, SIZE)
    assert system(source="normal").gtr is None


def test_samples_are_probabilities():
    probabilities = system(source="normal").sample(batch()[0], 3, steps=2, generator=seeded())
    assert probabilities.shape == (2, 3, SIZE, SIZE) and probabilities.dtype == torch.float32
    assert (probabilities.min().item(), probabilities.max().item()) == (0, 1)  # some of x_1 lies outside
    assert not probabilities.requires_grad


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("solver", ["euler", "midpoint", "ab2"])
def test_samples_end_where_the_velocity_leads(signed, solver):
    image, masks = batch(k=2)
    x_1 = masks.flatten(0, 1)[:, None]
    atfm = ATFM(None, Leading(2 * x_1 - 1 if signed else x_1), source="normal", signed=signed)
    torch.testing.assert_close(atfm.sample(image, 2, 4, solver), masks, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 5, 100])
def test_samples_drawn_in_batches_are_those_drawn_at_once(batch_size):
    atfm, (image, _) = system(), batch()
    at_once = atfm.sample(image, 5, steps=3, generator=seeded())
    in_batches = atfm.sample(image, 5, steps=3, generator=seeded(), batch_size=batch_size)
    torch.testing.assert_close(in_batches, at_once, rtol=0, atol=1e-5)


def test_batches_of_states_are_even():
    atfm, (image, _), sizes = system(), batch(), []
    atfm.net.register_forward_pre_hook(lambda net, inputs: sizes.append(len(inputs[0])))
    atfm.sample(image, 5, steps=1, batch_size=8, net=atfm.net)
    assert sizes == [5, 5]


def test_the_same_generator_gives_the_same_samples():
    atfm, (image, _) = system(), batch()
    samples = atfm.sample(image, 3, steps=2, generator=seeded(5))
    assert torch.equal(atfm.sample(image, 3, steps=2, generator=seeded(5)), samples)
    assert not torch.equal(atfm.sample(image, 3, steps=2, generator=seeded(6)), samples)
    assert (samples[:, 0] != samples[:, 1]).any()


@pytest.mark.parametrize("guidance", [0.0, 0.3, 2.0])
def test_guidance_extrapolates_from_the_field_without_image(guidance):
    atfm, (image, _) = system(guidance=guidance), batch()
    found = atfm.sample(image, 1, steps=1, generator=seeded())
    with torch.no_grad():
        x_0, start = atfm.source(image, 1, seeded()), torch.zeros(2)
        conditional, null = atfm.net(x_0, start, image), atfm.net(x_0, start, torch.zeros_like(image))
    assert (conditional - null).abs().max() > 0.01
    expected = (x_0 + (1 + guidance) * conditional - guidance * null).clamp(0, 1)
    assert ((expected > 0) & (expected < 1)).float().mean() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["standard", "released", "none"])
def test_folding_gives_the_same_field_and_leaves_the_net_alone(method):
    torch.manual_seed(0)
    net = STNet(4, (1, 2), weight_standardization=method)
    before = copy.deepcopy(net.state_dict())
    image, _ = batch()
    once = ready(net)
    torch.testing.assert_close(once(image, torch.ones(2), image), net(image, torch.ones(2), image))
    assert all(conv.method == "none" for conv in once.standardized())
    assert all(conv.method == method for conv in net.standardized())
    assert all(torch.equal(weight, before[name]) for name, weight in net.state_dict().items())
    assert all(weight.requires_grad for weight in net.parameters())


@pytest.mark.parametrize("options", [{"channels_last": True}, {"compiled": True}])
def test_ways_to_be_fast_change_samples_by_rounding_only(options, monkeypatch):
    compile_plainly = functools.partial(torch.compile, backend="eager")  # traces as by default, in seconds
    monkeypatch.setattr(torch, "compile", compile_plainly)
    atfm, (image, _) = system(), batch()
    plain = atfm.sample(image, 3, steps=2, generator=seeded())
    fast = atfm.sample(image, 3, steps=2, generator=seeded(), batch_size=2, net=ready(atfm.net, **options))
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-5)


def test_bfloat16_changes_results_by_its_rounding_only():
    image, masks = batch()
    samples, half = (system(amp=amp).sample(image, 2, steps=3, generator=seeded()) for amp in (False, True))
    assert half.dtype == torch.float32 and not torch.equal(half, samples)
    torch.testing.assert_close(half, samples, rtol=0, atol=0.05)
    terms, half_terms = (single_pass(system(amp=amp), image, masks) for amp in (False, True))
    assert half_terms["loss"].dtype == torch.float32
    assert half_terms["loss"].item() == pytest.approx(terms["loss"].item(), rel=0.02)


def test_gtr_is_needed_for_its_source():
    with pytest.raises(ValueError, match="source='gtr' needs a GTR"):
        ATFM(None, STNet(4, (1, 2)))


@pytest.mark.parametrize("choice", ["source", "dice", "dice_over", "semantic_target", "experts"])
def test_an_unknown_choice_is_refused(choice):
    with pytest.raises(ValueError, match=f"{choice}='other': expected one of "):
        system(**{choice: "other"})


@pytest.mark.parametrize("shape", [(2, SIZE, SIZE), (1, 3, SIZE, SIZE), (2, 3, SIZE, 4), (2, 3, 4, SIZE)])
def test_masks_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"masks of shape .* for image of shape .*: expected \(b, k, h, w\)"):
        next(system().losses(batch()[0], torch.zeros(shape)))


@pytest.mark.parametrize("shape", [(2, 2, SIZE, SIZE), (1, SIZE, SIZE), (2, 4, SIZE, SIZE)])
def test_an_image_of_other_channels_is_refused(shape):
    with pytest.raises(ValueError, match=r"image of shape .*: expected \(b, 1, h, w\) or \(b, 3, h, w\)"):
        system(source="normal").sample(torch.zeros(shape), 1)


def test_an_image_of_an_odd_size_is_refused():
    for source in "gtr", "normal":
        with pytest.raises(ValueError, match="multiple.* of 2"):
            system(source=source).sample(torch.zeros(1, 1, 9, 8), 1)


@pytest.mark.parametrize("asked", [{"solver": "rk5"}, {"steps": 0}, {"n": 0}, {"batch_size": 0}])
def test_an_impossible_way_of_sampling_is_refused(asked):
    with pytest.raises(ValueError, match="one of euler, midpoint.* and the numbers to be at least 1"):
        system().sample(batch()[0], **{"n": 1, **asked})
