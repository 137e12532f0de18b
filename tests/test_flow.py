"""Path, losses and solvers of the flow against their formulas, 2 x 2 maps, and ODEs with closed forms."""

import math

import pytest
import torch

from metadata_manager import Objective
from models import flow, losses
from models.flow import SOLVERS
from models.losses import Prediction, dice

ORDERS = {"euler": 1, "midpoint": 2, "ab2": 2}


def semantic_loss(x_1t, target, all_masks, form, over, against):
    """L_SF of predicted masks, under a choice of its form."""
    choice = Objective(dice=form, dice_over=over, semantic_target=against)
    return losses.semantic_loss(Prediction(x_1t, x_1t, target, x_1t, all_masks), choice)


def case(b=3, k=4):
    random = torch.Generator().manual_seed(0)
    x_0 = torch.rand(b, 1, 5, 6, generator=random)
    x_1 = (torch.rand(b, k, 5, 6, generator=random) < 0.5).float()
    return x_0, x_1, torch.rand(b, generator=random)


def maps(*rows):
    """2 x 2 maps, one a row: (b = 1, k = rows, 2, 2)."""
    return torch.tensor(rows).float().view(1, -1, 2, 2)


def test_path_agrees_with_its_formulas_and_its_velocity_ends_at_the_mask(device):
    x_0, x_1, t = (tensor.to(device) for tensor in case())
    path = flow.linear_path(x_0, x_1, t)
    for i in range(3):
        for annotator in range(4):
            source, mask, time = x_0[i, 0], x_1[i, annotator], t[i].item()
            torch.testing.assert_close(path.x_t[i, annotator], time * mask + (1 - time) * source)
            assert torch.equal(path.u[i, annotator], mask - source)
    torch.testing.assert_close(flow.endpoint(path.x_t, path.u, t), x_1, rtol=0, atol=1e-6)


def test_time_is_drawn_from_all_thousandths_below_one():
    t = flow.draw_time(100_000, torch.device("cpu"))
    assert torch.equal(t.unique(), torch.arange(1000) / 1000)
    assert t.mean().item() == pytest.approx(0.4995, abs=5 * (1 / 12 / 100_000) ** 0.5)


def test_one_expert_is_drawn_for_each_image():
    b, k = 2000, 4
    masks = torch.arange(b * k).view(b, k, 1, 1).expand(b, k, 2, 2)  # each has a value of its own
    drawn = flow.one_expert(masks)
    assert drawn.shape == (b, 1, 2, 2) and torch.equal(drawn, drawn[:, :, :1, :1].expand_as(drawn))
    image, expert = drawn[:, 0, 0, 0] // k, drawn[:, 0, 0, 0] % k
    assert torch.equal(image, torch.arange(b))
    assert (expert.bincount(minlength=k) / b - 1 / k).abs().max() < 5 * math.sqrt(1 / k * (1 - 1 / k) / b)


@pytest.mark.parametrize("predicted, mask, expected", [
    ([1, 0, 0, 0], [1, 0, 0, 0], 1.0),
    ([1, 1, 0, 0], [1, 0, 0, 0], 3 / 4),  # (2 * 1 + 1) / (2 + 1 + 1)
    ([0.25, 0, 0, 0.5], [0, 0, 0, 1], 2 / 2.75),
    ([1, 1, 0, 0], [0, 0, 1, 1], 1 / 5),
    ([0, 0, 0, 0], [1, 1, 0, 0], 1 / 3),
    ([0, 0, 0, 0], [0, 0, 0, 0], 1.0),
])
def test_dice_of_two_maps(predicted, mask, expected):
    assert dice(maps(predicted), maps(mask), "image").item() == pytest.approx(expected)


@pytest.mark.parametrize("over, expected", [
    ("image", [[3 / 4, 1], [1, 1 / 5]]),
    ("batch", [5 / 6, 1 / 5]),  # 2 pixels shared of 3 and 2; none of 0 and 4
])
def test_dice_is_of_each_image_and_annotator_or_of_the_batch(over, expected):
    predicted = torch.cat([maps([1, 1, 0, 0], [0, 0, 0, 0]), maps([0, 0, 0, 1], [0, 0, 0, 0])])
    mask = torch.cat([maps([1, 0, 0, 0], [0, 0, 0, 0]), maps([0, 0, 0, 1], [1, 1, 1, 1])])
    torch.testing.assert_close(dice(predicted, mask, over), torch.tensor(expected))
    loss = semantic_loss(predicted, mask, mask, "soft", over, "own").item()
    assert loss == pytest.approx(1 - torch.tensor(expected).mean().item())


def test_semantic_loss_compares_with_the_own_mask_or_with_all():
    every = maps([1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0])
    own = every[:, :2]
    assert semantic_loss(own, own, every, "soft", "image", "own").item() == pytest.approx(0)
    # Dice of a prediction with its own mask is 1, with the other expert's 1 / 5, with the empty one 1 / 3.
    expected = 1 - (1 + 1 / 5 + 1 / 3) / 3
    assert semantic_loss(own, own, every, "soft", "image", "all").item() == pytest.approx(expected)


@pytest.mark.parametrize("form, predicted, expected", [
    ("soft", [1.5, 1, -0.5, 0], 0),  # taken as probabilities
    ("soft", [0.5, 0.9, 0.49, 0.1], 1 - 3.8 / 4.99),
    ("thresholded", [0.5, 0.9, 0.49, 0.1], 0),  # one half is inside
])
def test_semantic_loss_of_a_soft_and_of_a_thresholded_prediction(form, predicted, expected):
    mask = maps([1, 1, 0, 0])
    result = semantic_loss(maps(predicted), mask, mask, form, "image", "own").item()
    assert result == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("over", ["image", "batch"])
@pytest.mark.parametrize("target", ["own", "all"])
def test_only_the_soft_dice_has_a_gradient_and_it_leads_towards_the_mask(over, target):
    _, masks, _ = case()
    x_1t = torch.full_like(masks, 0.5).requires_grad_()
    (gradient,) = torch.autograd.grad(semantic_loss(x_1t, masks, masks, "soft", over, target), x_1t)
    assert (gradient != 0).any() and (target == "all" or torch.equal(gradient < 0, masks == 1))
    assert not semantic_loss(x_1t, masks, masks, "thresholded", over, target).requires_grad


def logistic_error(solver, steps):
    """Logistic growth at rate 2 (1 + t): 1 / x - 1 falls by exp(-2 t - t^2), by exp(-3) from t = 0 to 1."""
    x_0 = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    exact = 1 / (1 + (1 / x_0 - 1) * math.exp(-3))
    result = SOLVERS[solver].solve(lambda x, t: 2 * (1 + t) * x * (1 - x), x_0, steps)
    return (result - exact).abs().max().item()


@pytest.mark.parametrize("solver", SOLVERS)
def test_error_falls_with_the_order_of_the_solver(solver):
    ratios = [logistic_error(solver, steps) / logistic_error(solver, 2 * steps) for steps in (32, 64)]
    assert [math.log2(ratio) for ratio in ratios] == pytest.approx([ORDERS[solver]] * 2, abs=0.1)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_constant_velocity_is_integrated_exactly_at_the_stated_cost(solver, steps):
    x_0, u = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    source, times = x_0.clone(), []

    def velocity(x, t):
        times.append(t)
        return u

    result = SOLVERS[solver].solve(velocity, x_0, steps)
    torch.testing.assert_close(result, source + u, rtol=1e-14, atol=1e-14)
    assert torch.equal(x_0, source)  # left as it was
    assert len(times) == SOLVERS[solver].nfe * steps
    assert all(type(t) is float and 0 <= t <= 1 for t in times)
