"""The fair energy score: against plain loops, and its properties."""

import itertools

import pytest
import torch

from models import energy_score
from models.energy import soft_distance


def distance(a, c):
    """1 - IoU in the squared Tanimoto form, of two maps, as the docstring gives it."""
    overlap = float((a * c).sum())
    return 1 - (overlap + 1) / (float((a * a).sum()) + float((c * c).sum()) - overlap + 1)


def by_loops(samples, masks):
    """The score of one image."""
    m, k = len(samples), len(masks)
    across = sum(distance(s, y) for s in samples for y in masks)
    within = sum(distance(samples[i], samples[j]) for i in range(m) for j in range(m) if i != j)
    return 2 * across / (m * k) - within / (m * (m - 1))


def test_it_is_what_plain_loops_give():
    generator = torch.Generator().manual_seed(0)
    samples = torch.rand(3, 4, 5, 6, generator=generator)
    masks = (torch.rand(3, 2, 5, 6, generator=generator) > 0.5).float()
    masks[1, 0] = 0
    expected = sum(map(by_loops, samples, masks)) / 3
    assert energy_score(samples, masks).item() == pytest.approx(expected, abs=1e-6)


def test_a_soft_mask_has_no_distance_from_itself_and_the_empty_case_is_iou_s():
    soft, empty = torch.rand(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    full = torch.ones(1, 1, 4, 4)
    assert soft_distance(soft, soft)[0].diagonal().abs().max() < 1e-6
    assert soft_distance(empty, empty).item() == 0
    assert soft_distance(empty, full).item() == pytest.approx(16 / 17)  # 1 but for the ones that are added


LEFT = torch.tensor([[1.0, 1, 0, 0]] * 4)  # two experts, each half the time: left half and right half
EXPERTS = torch.stack([LEFT, 1 - LEFT])[None]


def expected_score(values, chances):
    """The expectation over two independent draws from a sampler of `values` with `chances`."""
    pairs = itertools.product(range(len(values)), repeat=2)
    return sum(chances[i] * chances[j] * energy_score(torch.stack([values[i], values[j]])[None], EXPERTS)
               for i, j in pairs).item()


def test_the_right_sampler_has_the_least_score():
    right = expected_score(list(EXPERTS[0]), [0.5, 0.5])
    others = [expected_score([torch.full((4, 4), grey)], [1.0]) for grey in (0.0, 0.1, 0.5, 0.9, 1.0)]
    others += [expected_score(list(EXPERTS[0]), [chance, 1 - chance]) for chance in (0.0, 0.2, 0.4, 0.8, 1.0)]
    assert all(right < other - 1e-3 for other in others)


def test_it_is_unbiased_for_every_number_of_samples():
    values, chances = [LEFT, 1 - LEFT, torch.zeros(4, 4)], torch.tensor([0.5, 0.2, 0.3])
    exact = expected_score(values, chances)
    torch.manual_seed(0)
    for m in (2, 3, 8):
        index = torch.multinomial(chances, 20_000 * m, replacement=True)
        samples = torch.stack(values)[index].view(-1, m, 4, 4)
        score = energy_score(samples, EXPERTS.expand(len(samples), -1, -1, -1)).item()
        assert score == pytest.approx(exact, abs=0.01)


def test_repeated_masks_weigh_as_one_expert_each():
    samples, masks = torch.rand(1, 4, 4, 4), EXPERTS
    torch.testing.assert_close(energy_score(samples, masks), energy_score(samples, masks.repeat(1, 2, 1, 1)))


def test_its_gradient_is_finite_for_saturated_and_empty_masks():
    logits = torch.tensor([-200.0, 200.0, 0.0])[None, :, None, None].repeat(2, 1, 4, 4).requires_grad_()
    masks = torch.stack([torch.zeros(2, 4, 4), torch.ones(2, 4, 4)])
    energy_score(logits.sigmoid(), masks).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("samples, masks", [((2, 1, 4, 4), (2, 3, 4, 4)), ((2, 4, 4, 4), (1, 3, 4, 4)),
                                            ((2, 4, 4, 4), (2, 3, 4, 5)), ((4, 4, 4), (4, 4, 4))])
def test_other_shapes_are_refused(samples, masks):
    with pytest.raises(ValueError, match=r"expected \(b, m, h, w\) with m >= 2"):
        energy_score(torch.zeros(samples), torch.zeros(masks))
