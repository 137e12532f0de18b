"""The path of the flow and its losses, re-derived from the formulas and on 2 x 2 examples."""

import pytest
import torch

from models.flow import dice, draw_time, endpoint, linear_path, semantic_loss


def case(b=3, k=4):
    random = torch.Generator().manual_seed(0)
    x_0 = torch.rand(b, 1, 5, 6, generator=random)
    x_1 = (torch.rand(b, k, 5, 6, generator=random) < 0.5).float()
    return x_0, x_1, torch.rand(b, generator=random)


def maps(*rows):
    """2 x 2 maps, one a row: (b = 1, k = rows, 2, 2)."""
    return torch.tensor(rows).float().view(1, -1, 2, 2)


def test_path_agrees_with_its_formulas():
    x_0, x_1, t = case()
    path = linear_path(x_0, x_1, t)
    for i in range(3):
        for annotator in range(4):
            source, mask, time = x_0[i, 0], x_1[i, annotator], t[i].item()
            torch.testing.assert_close(path.x_t[i, annotator], time * mask + (1 - time) * source)
            assert torch.equal(path.u[i, annotator], mask - source)


def test_path_leads_from_the_source_to_the_mask():
    x_0, x_1, _ = case()
    assert torch.equal(linear_path(x_0, x_1, torch.zeros(3)).x_t, x_0.expand_as(x_1))
    assert torch.equal(linear_path(x_0, x_1, torch.ones(3)).x_t, x_1)


def test_the_true_velocity_ends_at_the_mask():
    x_0, x_1, t = case()
    path = linear_path(x_0, x_1, t)
    torch.testing.assert_close(endpoint(path.x_t, path.u, t), x_1, rtol=0, atol=1e-6)


def test_time_is_drawn_from_all_thousandths_below_one():
    t = draw_time(100_000, torch.device("cpu"))
    assert torch.equal(t.unique(), torch.arange(1000) / 1000)
    assert t.mean().item() == pytest.approx(0.4995, abs=5 * (1 / 12 / 100_000) ** 0.5)


@pytest.mark.parametrize("predicted, mask, expected", [
    ([1, 0, 0, 0], [1, 0, 0, 0], 1.0),
    ([1, 1, 0, 0], [1, 0, 0, 0], 3 / 4),  # (2 * 1 + 1) / (2 + 1 + 1)
    ([1, 0.5, 0, 0], [1, 0, 0, 0], 3 / 3.5),
    ([0.25, 0, 0, 0.5], [0, 0, 0, 1], 2 / 2.75),
    ([1, 1, 0, 0], [0, 0, 1, 1], 1 / 5),
    ([0, 0, 0, 0], [1, 1, 0, 0], 1 / 3),
    ([0, 0, 0, 0], [0, 0, 0, 0], 1.0),
])
def test_dice_of_two_maps(predicted, mask, expected):
    assert dice(maps(predicted), maps(mask), "image").item() == pytest.approx(expected)


def test_dice_is_of_each_image_and_annotator_or_of_the_batch():
    predicted = torch.cat([maps([1, 1, 0, 0], [0, 0, 0, 0]), maps([0, 0, 0, 1], [0, 0, 0, 0])])
    mask = torch.cat([maps([1, 0, 0, 0], [0, 0, 0, 0]), maps([0, 0, 0, 1], [1, 1, 1, 1])])
    by_image = torch.tensor([[3 / 4, 1], [1, 1 / 5]])
    by_batch = torch.tensor([5 / 6, 1 / 5])  # 2 pixels shared of 3 and 2; none of 0 and 4
    torch.testing.assert_close(dice(predicted, mask, "image"), by_image)
    torch.testing.assert_close(dice(predicted, mask, "batch"), by_batch)
    for over, expected in ("image", by_image), ("batch", by_batch):
        loss = semantic_loss(predicted, mask, mask, "soft", over, "own")
        assert loss.item() == pytest.approx(1 - expected.mean().item())


def test_semantic_loss_compares_with_the_own_mask_or_with_all():
    every = maps([1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0])
    own = every[:, :2]
    assert semantic_loss(own, own, every, "soft", "image", "own").item() == pytest.approx(0)
    # Dice of a prediction with its own mask is 1, with the other expert's 1 / 5, with the empty one 1 / 3.
    expected = 1 - (1 + 1 / 5 + 1 / 3) / 3
    assert semantic_loss(own, own, every, "soft", "image", "all").item() == pytest.approx(expected)


def test_semantic_loss_takes_predictions_as_probabilities():
    mask = maps([1, 0, 0, 1])
    outside = maps([1.5, -0.5, 0, 1])
    assert semantic_loss(outside, mask, mask, "soft", "image", "own").item() == pytest.approx(0)


def test_thresholded_dice_counts_one_half_as_inside():
    mask = maps([1, 1, 0, 0])
    predicted = maps([0.5, 0.9, 0.49, 0.1])
    assert semantic_loss(predicted, mask, mask, "thresholded", "image", "own").item() == pytest.approx(0)
    soft = semantic_loss(predicted, mask, mask, "soft", "image", "own").item()
    assert soft == pytest.approx(1 - 3.8 / 4.99)


@pytest.mark.parametrize("over", ["image", "batch"])
@pytest.mark.parametrize("target", ["own", "all"])
def test_only_the_soft_dice_has_a_gradient(over, target):
    _, masks, _ = case()
    x_1t = torch.rand(masks.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for method, expected in ("soft", True), ("thresholded", False):
        loss = semantic_loss(x_1t, masks, masks, method, over, target) + 0 * x_1t.sum()
        (gradient,) = torch.autograd.grad(loss, x_1t)
        assert (gradient != 0).all().item() == expected
        assert (gradient == 0).all().item() == (not expected)


def test_the_soft_dice_draws_predictions_towards_the_mask():
    _, masks, _ = case()
    x_1t = torch.full_like(masks, 0.5).requires_grad_()
    (gradient,) = torch.autograd.grad(semantic_loss(x_1t, masks, masks, "soft", "image", "own"), x_1t)
    assert torch.equal(gradient < 0, masks == 1)
