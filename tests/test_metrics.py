"""Scores against plain loops, literal examples and the numbers of the released code."""

import math
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

import metrics
from metrics import Overlaps
from tests import oracle

PAIRED = ("ged", "hm_iou", "mdm", "dice_of_means", "s_ncc", "calibration_error")
GOLDEN = np.load(Path(__file__).parent / "golden" / "metrics.npz")


def random_masks(number, seed=0, size=7, share=0.4):
    return torch.rand(number, size, size, generator=torch.Generator().manual_seed(seed)) < share


def sets():
    """(samples, masks) of one image: random, empty, full and identical, n not always a multiple of k."""
    empty, full = torch.zeros(3, 7, 7, dtype=torch.bool), torch.ones(2, 7, 7, dtype=torch.bool)
    some = random_masks(6, seed=1)
    return {
        "n = 8, k = 4": (random_masks(8), random_masks(4, seed=2)),
        "n = 5, k = 3": (random_masks(5), random_masks(3, seed=2)),
        "n = 2, k = 4": (random_masks(2), random_masks(4, seed=2)),
        "n = 1, k = 1": (random_masks(1), random_masks(1, seed=2)),
        "empty samples": (empty, some[:2]),
        "empty masks": (some, empty),
        "all empty": (empty, empty[:2]),
        "empty and full": (empty, full),
        "all full": (full, full),
        "some empty": (torch.cat((some[:3], empty)), torch.cat((some[3:5], empty[:2]))),
        "identical sets": (some, some),
        "identical samples": (some[:1].repeat(5, 1, 1), some[:2]),
        "half of n": (torch.cat((some[:2], empty[:2])), torch.cat((some[:1], empty[:1]))),
    }


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("case", sets())
def test_score_agrees_with_plain_loops(case, name):
    samples, masks = sets()[case]
    found = getattr(metrics, name)(samples[None], masks[None])
    assert found.shape == (1,) and found.dtype == torch.float32
    assert found.item() == pytest.approx(getattr(oracle, name)(samples, masks), abs=1e-6)


@pytest.mark.parametrize("case", sets())
def test_maps_and_diversity_agree_with_plain_loops(case):
    samples, _ = sets()[case]
    assert metrics.diversity(samples[None]).item() == pytest.approx(oracle.diversity(samples), abs=1e-6)
    variances, entropies = (
        of(samples[None]).flatten().tolist() for of in (metrics.variance_map, metrics.entropy_map)
    )
    assert variances == pytest.approx(oracle.variances(samples), abs=1e-6)
    assert entropies == pytest.approx(oracle.entropies(samples), abs=1e-6)


def test_probabilities_agree_with_plain_loops():
    samples = torch.rand(5, 7, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    masks = random_masks(3)
    for name in ("s_ncc", "calibration_error"):
        found = getattr(metrics, name)(samples[None], masks[None]).item()
        assert found == pytest.approx(getattr(oracle, name)(samples, masks), abs=1e-6)


@pytest.mark.parametrize("case", range(24))
def test_scores_agree_with_the_released_code(case):
    samples = torch.from_numpy(GOLDEN[f"case{case:02d}_samples"])[None]
    masks = torch.from_numpy(GOLDEN[f"case{case:02d}_masks"])[None]
    expected = GOLDEN[f"case{case:02d}_ged_hmiou_mdm"]
    found = [score(samples, masks).item() for score in (metrics.ged, metrics.hm_iou, metrics.mdm)]
    assert found == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)


def test_two_by_two_example():
    samples = torch.tensor([[[[1, 1], [0, 0]]]])
    masks = torch.tensor([[[[1, 0], [0, 0]], [[0, 0], [0, 0]]]])
    assert metrics.iou_matrix(samples, masks).tolist() == [[[1 / 2, 0]]]
    assert metrics.dice_matrix(samples, masks).tolist() == [[[2 / 3, 0]]]
    assert metrics.ged(samples, masks).item() == 1.0  # 2 (1/2 + 1)/2 - 0 - (0 + 1 + 1 + 0)/4
    assert metrics.hm_iou(samples, masks).item() == 0.25  # the sample, twice, with either mask: (1/2 + 0)/2
    assert metrics.mdm(samples, masks).item() == pytest.approx(1 / 3)  # (2/3 + 0)/2
    assert metrics.d_max(samples, masks).item() == pytest.approx(1 / 3)
    assert metrics.diversity(masks).item() == 0.5  # (0 + 1 + 1 + 0)/4


def test_two_by_two_example_of_the_means():
    samples = torch.tensor([[[[1, 1], [0, 0]], [[1, 0], [0, 0]]]])  # mean 1 1/2 0 0
    masks = torch.tensor([[[[1, 1], [0, 0]], [[0, 1], [0, 0]]]])  # mean 1/2 1 0 0
    assert metrics.dice_of_means(samples, masks).item() == 0.0  # a tie is background: pixel 1 against pixel 2
    assert metrics.calibration_error(samples, masks).item() == 0.25  # (|1 - 1/2| + |1/2 - 1| + 0)/4
    assert metrics.variance_map(samples).tolist() == [[[0, 0.25], [0, 0]]]
    assert metrics.entropy_map(samples).flatten().tolist() == pytest.approx([0, math.log(2), 0, 0])


def test_s_ncc_rewards_variance_where_experts_disagree_with_the_mean():
    samples = torch.tensor([[[[1, 1], [0, 0]], [[1, 0], [0, 0]]]])  # varies at the second pixel
    disagrees_there = torch.tensor([[[[1, 1], [0, 0]]]])
    disagrees_elsewhere = torch.tensor([[[[1, 1], [1, 1]]]])
    assert metrics.s_ncc(samples, disagrees_there).item() == pytest.approx(1.0)
    assert metrics.s_ncc(samples, disagrees_elsewhere).item() < 0.1
    assert metrics.s_ncc(samples[:, :1], disagrees_there).item() == 0.0  # one sample: a constant map


def test_hm_iou_is_the_best_of_all_matchings():
    samples, masks = random_masks(3), random_masks(2, seed=2)
    pairs = [[oracle.iou(samples[i % 3], masks[j % 2]) for j in range(6)] for i in range(6)]
    best = max(sum(pairs[i][j] for i, j in enumerate(order)) for order in permutations(range(6))) / 6
    assert metrics.hm_iou(samples[None], masks[None]).item() == pytest.approx(best)


def test_calibration_bins_are_exact_at_their_edges():
    samples = torch.arange(10).view(1, 10, 1, 1) < torch.arange(11).view(1, 1, 1, 11)  # means 0, .1, ..., 1
    masks = torch.zeros(1, 1, 1, 11, dtype=torch.bool)
    masks[..., 9:] = True  # .9 and 1 share a bin; every other mean has one of its own
    assert metrics.calibration_error(samples, masks).item() == pytest.approx((3.6 + abs(0.9 + 1 - 2)) / 11)


@pytest.mark.parametrize("n", (1, 5, 7))
def test_a_prefix_scores_as_its_samples_do(n):
    samples, masks = random_masks(7)[None], random_masks(3, seed=2)[None]
    prefix, alone = Overlaps.of(samples, masks).prefix(n), Overlaps.of(samples[:, :n], masks)
    for name in ("iou_ss", "iou_sy", "iou_yy", "dice_sy"):
        assert torch.equal(getattr(prefix, name), getattr(alone, name))


@pytest.mark.parametrize("n", (0, 8))
def test_prefix_outside_the_samples_is_refused(n):
    with pytest.raises(ValueError, match="expected 1 to 7"):
        Overlaps.of(random_masks(7)[None], random_masks(3)[None]).prefix(n)


def test_images_of_a_batch_are_scored_apart():
    samples, masks = random_masks(10).view(2, 5, 7, 7), random_masks(6, seed=2).view(2, 3, 7, 7)
    samples[0] = False  # one image's empty pixels are not the other's
    for name in PAIRED:
        score = getattr(metrics, name)
        alone = torch.cat([score(samples[i : i + 1], masks[i : i + 1]) for i in range(2)])
        assert torch.equal(score(samples, masks), alone)


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int16, torch.int64))
def test_integers_score_as_bool_does(dtype):
    samples, masks = random_masks(5)[None], random_masks(3, seed=2)[None]
    for name in PAIRED:
        score = getattr(metrics, name)
        assert torch.equal(score(samples.to(dtype), masks), score(samples, masks))


def test_counts_stay_exact_under_autocast():
    samples, masks = random_masks(5, size=64)[None], random_masks(3, seed=2, size=64)[None]
    expected = metrics.ged(samples, masks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(metrics.ged(samples, masks), expected)


BAD = {
    "no batch axis": (random_masks(5), random_masks(3), r"\(5, 7, 7\) and masks \(3, 7, 7\).*batch axis"),
    "no samples": (random_masks(5)[None, :0], random_masks(3)[None], r"\(1, 0, 7, 7\).*none of them 0"),
    "other size": (random_masks(5)[None], random_masks(3, size=8)[None], r"\(1, 5, 7, 7\).*\(1, 3, 8, 8\)"),
    "other batch": (random_masks(4).view(2, 2, 7, 7), random_masks(3)[None], "b, h and w differ"),
    "probabilities": (random_masks(5)[None].float(), random_masks(3)[None], r"float32.*threshold"),
    "0/255": (random_masks(5)[None], 255 * random_masks(3)[None].to(torch.uint8), "masks.*from 0 to 255"),
    "negative": (-random_masks(5)[None].int(), random_masks(3)[None], "from -1 to 0"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("score", (metrics.ged, metrics.hm_iou, metrics.mdm))
def test_bad_masks_are_refused_with_what_was_found(score, case):
    samples, masks, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        score(samples, masks)


@pytest.mark.parametrize("score", (metrics.s_ncc, metrics.dice_of_means, metrics.calibration_error))
@pytest.mark.parametrize("samples, message", (
    (torch.zeros(5, 7, 7), r"samples \(5, 7, 7\)"),
    (torch.zeros(1, 5, 8, 8), r"\(1, 5, 8, 8\).*same size"),
    (torch.zeros(1, 0, 7, 7), "none of them 0"),
    (torch.full((1, 5, 7, 7), 1.5), "1.5.*expected probabilities"),
    (torch.full((1, 5, 7, 7), torch.nan), "nan.*expected probabilities"),
))
def test_bad_probabilities_are_refused_with_what_was_found(score, samples, message):
    with pytest.raises(ValueError, match=message):
        score(samples, random_masks(3)[None])
