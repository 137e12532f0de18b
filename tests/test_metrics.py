"""Scores against plain loops, literal examples and the numbers of the released code."""

from itertools import permutations

import numpy as np
import pytest
import torch

import metrics
from metrics import Overlaps
from metrics.catalogue import SCORES, Score, columns, score_blocks, score_names
from tests import oracle

PAIRED = ("ged", "hm_iou", "mdm", "dice_of_means", "s_ncc", "calibration_error")


def random_masks(number, seed=0, size=7):
    return torch.rand(number, size, size, generator=torch.Generator().manual_seed(seed)) < 0.4


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
        "some empty": (torch.cat((some[:3], empty)), torch.cat((some[3:5], empty[:2]))),
        "identical sets": (some, some),
        "identical samples": (some[:1].repeat(5, 1, 1), some[:2]),
        "half of n": (torch.cat((some[:2], empty[:2])), torch.cat((some[:1], empty[:1]))),
    }


@pytest.mark.parametrize("case", sets())
def test_scores_equal_those_of_plain_loops(case, device):
    samples, masks = sets()[case]
    ours, theirs = samples[None].to(device), masks[None].to(device)
    for name in PAIRED:
        value = getattr(metrics, name)(ours, theirs)
        assert value.device.type == device.type
        assert value.shape == (1,) and value.dtype == torch.float32
        assert value.item() == pytest.approx(getattr(oracle, name)(samples, masks), abs=1e-6), name
    assert metrics.diversity(ours).item() == pytest.approx(oracle.diversity(samples), abs=1e-6)


@pytest.mark.parametrize("case", sets())
@pytest.mark.parametrize("pixels", [1, 8])
def test_scores_of_blocks_are_those_of_the_whole(case, pixels):
    pair = [masks.flatten(1)[None, :, None] for masks in sets()[case]]
    blocks, counts = list(zip(*(masks.split(pixels, dim=3) for masks in pair))), sorted({1, pair[0].shape[1]})
    expected, of_blocks = metrics.score(*pair, counts), score_blocks(blocks, counts)
    assert list(of_blocks) == list(expected) == score_names(counts)
    for name, value in expected.items():
        assert of_blocks[name].item() == pytest.approx(value.item(), abs=1e-6), name


@pytest.mark.parametrize("case", range(24))
def test_scores_equal_those_of_the_released_code(case, device):
    samples, masks, expected = (oracle.golden("metrics")[f"case{case:02d}_{name}"]
                                for name in ("samples", "masks", "ged_hmiou_mdm"))
    pair = samples[None].to(device), masks[None].to(device)
    scores = [score(*pair).item() for score in (metrics.ged, metrics.hm_iou, metrics.mdm)]
    assert scores == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)


def test_two_by_two_example():
    samples = torch.tensor([[[[1, 1], [0, 0]]]])
    masks = torch.tensor([[[[1, 0], [0, 0]], [[0, 0], [0, 0]]]])
    assert metrics.iou_matrix(samples, masks).tolist() == [[[1 / 2, 0]]]
    assert metrics.dice_matrix(samples, masks).tolist() == [[[2 / 3, 0]]]
    assert metrics.ged(samples, masks).item() == 1.0  # 2 (1/2 + 1)/2 - 0 - (0 + 1 + 1 + 0)/4
    assert metrics.hm_iou(samples, masks).item() == 0.25  # the sample, twice, with either mask: (1/2 + 0)/2
    assert metrics.mdm(samples, masks).item() == pytest.approx(1 / 3)  # (2/3 + 0)/2
    assert metrics.diversity(masks).item() == 0.5  # (0 + 1 + 1 + 0)/4


def test_two_by_two_example_of_the_means():
    samples = torch.tensor([[[[1, 1], [0, 0]], [[1, 0], [0, 0]]]])  # mean 1 1/2 0 0
    masks = torch.tensor([[[[1, 1], [0, 0]], [[0, 1], [0, 0]]]])  # mean 1/2 1 0 0
    assert metrics.dice_of_means(samples, masks).item() == 0.0  # a tie is background: pixel 1 against pixel 2
    assert metrics.calibration_error(samples, masks).item() == 0.25  # (|1 - 1/2| + |1/2 - 1| + 0)/4
    # The samples vary at pixel 2, where the first expert alone disagrees with their mean.
    assert metrics.s_ncc(samples, masks[:, :1]).item() == pytest.approx(1)
    assert metrics.s_ncc(samples, masks[:, 1:]).item() < 0.5
    assert metrics.s_ncc(samples[:, :1], masks).item() == 0  # one sample: a constant map


def test_hm_iou_is_the_best_of_all_matchings():
    samples, masks = random_masks(3), random_masks(2, seed=2)
    pairs = [[oracle.iou(samples[i % 3], masks[j % 2]) for j in range(6)] for i in range(6)]
    best = max(sum(pairs[i][j] for i, j in enumerate(order)) for order in permutations(range(6))) / 6
    assert metrics.hm_iou(samples[None], masks[None]).item() == pytest.approx(best)


def test_calibration_bins_are_exact_at_their_edges():
    samples = torch.arange(10).view(1, 10, 1, 1) < torch.arange(11).view(1, 1, 1, 11)  # means 0, .1, ..., 1
    masks = torch.zeros(1, 1, 1, 11, dtype=torch.bool)
    masks[..., 9:] = True  # .9 and 1 fall into the same bin; each other mean is alone in its bin
    assert metrics.calibration_error(samples, masks).item() == pytest.approx((3.6 + abs(0.9 + 1 - 2)) / 11)


@pytest.mark.parametrize("n", (1, 5, 7))
def test_a_prefix_scores_as_its_samples_do(n):
    samples, masks = random_masks(7)[None], random_masks(3, seed=2)[None]
    prefix, alone = Overlaps.of(samples, masks).prefix(n), Overlaps.of(samples[:, :n], masks)
    for name in ("iou_ss", "iou_sy", "iou_yy", "dice_sy"):
        assert torch.equal(getattr(prefix, name), getattr(alone, name))
    for outside in (0, 8):
        with pytest.raises(ValueError, match="expected 1 to 7"):
            Overlaps.of(samples, masks).prefix(outside)


@pytest.mark.parametrize("name", PAIRED)
def test_each_image_of_a_batch_is_scored_alone_and_integers_as_bool(name):
    score = getattr(metrics, name)
    samples, masks = random_masks(10).view(2, 5, 7, 7), random_masks(6, seed=2).view(2, 3, 7, 7)
    samples[0] = False  # one image's empty pixels are not the other's
    together = score(samples, masks)
    assert torch.equal(together, torch.cat([score(samples[i, None], masks[i, None]) for i in range(2)]))
    for dtype in (torch.uint8, torch.int64):
        assert torch.equal(score(samples.to(dtype), masks), together)


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.uint16, np.uint32, np.int64])
def test_arrays_of_numpy_and_all_integers_are_scored_alike(dtype):
    random = np.random.default_rng(0)
    samples, masks = (random.integers(0, 2, (2, n, 4, 4)) for n in (6, 4))
    for score in (metrics.ged, metrics.hm_iou, metrics.mdm, metrics.dice_of_means, metrics.s_ncc):
        expected = score(torch.from_numpy(samples), torch.from_numpy(masks))
        assert torch.equal(score(samples.astype(dtype), masks.astype(dtype)), expected)
        assert torch.equal(score(torch.from_numpy(samples.astype(dtype)), masks.astype(dtype)), expected)
    with pytest.raises(ValueError, match="hold values from 0 to 2"):
        metrics.ged((2 * samples).astype(np.uint16), masks)


def test_counts_stay_exact_under_autocast():
    samples, masks = random_masks(5, size=64)[None], random_masks(3, seed=2, size=64)[None]
    expected = metrics.ged(samples, masks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(metrics.ged(samples, masks), expected)


def test_a_new_score_is_one_entry(monkeypatch):
    largest = Score(lambda overlaps: overlaps.size_s.amax(1), per_n=True, columns="each", better="higher")
    monkeypatch.setitem(SCORES, "Largest", largest)
    samples, masks = random_masks(4)[None], random_masks(3)[None]
    scores = metrics.score(samples, masks, (1, 4))
    assert scores["Largest4"].item() == samples.sum((2, 3)).max() and "Largest1" in scores
    assert columns((1, 4))[-2:] == ["Largest1", "Largest4"] == score_names((1, 4))[-2:]


SOME, MASKS = random_masks(5)[None], random_masks(3)[None]


@pytest.mark.parametrize("samples, masks, message", [
    (SOME[0], MASKS[0], r"\(5, 7, 7\) and masks \(3, 7, 7\).*batch axis"),
    (SOME[:, :0], MASKS, r"\(1, 0, 7, 7\).*none of them 0"),
    (SOME, random_masks(3, size=8)[None], r"\(1, 5, 7, 7\).*\(1, 3, 8, 8\).*same size"),
    (torch.cat((SOME, SOME)), MASKS, "b, h and w differ"),
    (SOME.float(), MASKS, r"float32.*threshold"),
    (SOME, 255 * MASKS.to(torch.uint8), "masks.*from 0 to 255"),
    (-SOME.int(), MASKS, "from -1 to 0"),
])
@pytest.mark.parametrize("name", PAIRED)
def test_bad_sets_are_refused_with_what_they_are(name, samples, masks, message):
    with pytest.raises(ValueError, match=message):
        getattr(metrics, name)(samples, masks)
