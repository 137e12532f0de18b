"""Evaluation over a dataset: what is drawn, from which seed, and how scores are averaged and compared."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import metrics
from metadata_manager import PAPER_TABLES
from metrics import Evaluation, evaluate, paired_bootstrap
from metrics.evaluation import image_seed


@dataclass
class Memory:
    """A dataset in memory."""

    ids: list[str]
    items: list[tuple[Tensor, Tensor]]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def dataset(number=4, k=3, size=8):
    generator = torch.Generator().manual_seed(5)
    items = [(torch.rand(1, size, size, generator=generator),
              (torch.rand(k, size, size, generator=generator) < 0.4).float()) for _ in range(number)]
    return Memory([f"image {i}" for i in range(number)], items)


def noisy(image, n, generator):
    """Probabilities that depend on the image and on the generator."""
    return torch.rand(image.shape[0], n, *image.shape[2:], generator=generator) * image


def test_per_image_scores_are_those_of_the_thresholded_samples():
    images = dataset()
    found = evaluate(noisy, images, samples=(2, 5), seeds=(0, 7))
    assert found.ids == tuple(images.ids) and found.seeds == (0, 7)
    per_n = {f"{name}{n}" for name in ("GED", "HM-IoU", "MDM", "Diversity") for n in (2, 5)}
    assert set(found.scores) == per_n | {"S_NCC", "Dice of means", "ECE"}
    image, masks = images[2][0][None], images[2][1][None].bool()
    drawn = noisy(image, 5, torch.Generator().manual_seed(image_seed(7, "image 2"))) >= 0.5
    expected = {
        "GED2": metrics.ged(drawn[:, :2], masks), "GED5": metrics.ged(drawn, masks),
        "HM-IoU2": metrics.hm_iou(drawn[:, :2], masks), "HM-IoU5": metrics.hm_iou(drawn, masks),
        "MDM2": metrics.mdm(drawn[:, :2], masks), "MDM5": metrics.mdm(drawn, masks),
        "Diversity2": metrics.diversity(drawn[:, :2]), "Diversity5": metrics.diversity(drawn),
        "S_NCC": metrics.s_ncc(drawn, masks), "Dice of means": metrics.dice_of_means(drawn, masks),
        "ECE": metrics.calibration_error(drawn, masks),
    }
    for name, values in found.scores.items():
        assert values.shape == (2, 4) and values.dtype == np.float64
        assert values[1, 2] == pytest.approx(expected[name].item(), abs=1e-6), name


def test_the_threshold_keeps_one_half():
    images = Memory(["a"], [(torch.zeros(1, 2, 2), torch.ones(2, 2, 2))])
    found = evaluate(lambda image, n, generator: torch.full((1, n, 2, 2), 0.5), images, samples=(3,))
    assert found.scores["MDM3"].item() == 1.0


def test_the_paper_s_columns_are_among_the_scores():
    found = evaluate(noisy, dataset(1), samples=(16, 32, 100))
    for table in PAPER_TABLES.values():
        assert set().union(*table.values()) <= set(found.scores)


def test_splitting_images_over_processes_changes_nothing():
    images = dataset()
    whole = evaluate(noisy, images, samples=(2, 4), seeds=(0, 1))
    again = evaluate(noisy, images, samples=(2, 4), seeds=(0, 1))
    shards = [evaluate(noisy, Memory(images.ids[part], images.items[part]), samples=(2, 4), seeds=(0, 1))
              for part in (slice(2, None), slice(0, 2))]
    for name, values in whole.scores.items():
        assert np.array_equal(values, again.scores[name])
        assert np.array_equal(values, np.concatenate([shards[1].scores[name], shards[0].scores[name]], 1))
    assert not np.array_equal(whole.scores["GED4"][0], whole.scores["GED4"][1])  # seeds do differ


@pytest.mark.parametrize("together", [2, 3, 100])
def test_scoring_several_sets_together_changes_nothing_beyond_rounding(together):
    images = dataset()
    one_by_one = evaluate(noisy, images, samples=(2, 4), seeds=(0, 1))
    found = evaluate(noisy, images, samples=(2, 4), seeds=(0, 1), together=together)
    for name, values in one_by_one.scores.items():
        np.testing.assert_allclose(found.scores[name], values, rtol=0, atol=1e-6)


def test_image_seed_is_the_same_in_every_process():
    command = "from metrics.evaluation import image_seed; print(image_seed(3, 'a'))"
    root = Path(__file__).parent.parent
    elsewhere = subprocess.check_output([sys.executable, "-c", command], cwd=root, text=True)
    assert int(elsewhere) == image_seed(3, "a")
    assert len({image_seed(seed, name) for seed in (0, 1, 11) for name in ("a", "1 a", "b")}) == 9


def test_progress_wraps_the_images():
    seen = []

    def progress(images):
        for index in images:
            seen.append(index)
            yield index

    evaluate(noisy, dataset(3), samples=(1,), seeds=(0, 1), progress=progress)
    assert seen == [0, 1, 2]


def test_mean_and_deviation_are_over_seeds_of_means_over_images():
    scores = {"GED16": np.array([[0.1, 0.3], [0.2, 0.6]])}  # runs .2 and .4
    two = Evaluation(("a", "b"), (0, 1), scores)
    one = Evaluation(("a", "b"), (0,), {"GED16": scores["GED16"][:1]})
    assert two.mean_std()["GED16"] == pytest.approx((0.3, 0.1 * 2**0.5))
    assert one.mean_std()["GED16"] == (pytest.approx(0.2), None)


def test_an_evaluation_survives_json():
    found = evaluate(noisy, dataset(2), samples=(2,), seeds=(0, 1))
    read = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert read["ids"] == list(found.ids) and read["seeds"] == [0, 1]
    assert np.array_equal(np.array(read["scores"]["GED2"]), found.scores["GED2"])
    assert read["mean_std"]["GED2"] == list(found.mean_std()["GED2"])


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_samples_that_are_not_finite_name_their_image(bad):
    def diverges(image, n, generator):
        probabilities = noisy(image, n, generator)
        if torch.equal(image[0], images[1][0]):
            probabilities[0, 0, 3, 3] = bad
        return probabilities

    images = dataset()
    with pytest.raises(ValueError, match="image 1, seed 0: 1 of 128 probabilities are not finite"):
        evaluate(diverges, images, samples=(2,))


def test_bad_arguments_are_refused_with_what_was_found():
    images = dataset(2)
    with pytest.raises(ValueError, match=r"image 0: shape \(1, 3, 8, 8\), expected .* \(1, 2, 8, 8\)"):
        evaluate(lambda image, n, generator: noisy(image, n + 1, generator), images, samples=(2,))
    with pytest.raises(ValueError, match="masks of image image 0: expected 0 and 1"):
        evaluate(noisy, Memory(["image 0"], [(images[0][0], 0.3 * images[0][1])]), samples=(2,))
    with pytest.raises(ValueError, match="2 images with 1 ids"):
        evaluate(noisy, Memory(["image 0"], images.items), samples=(2,))
    with pytest.raises(ValueError, match="0 images"):
        evaluate(noisy, Memory([], []), samples=(2,))
    for samples, seeds in (((), (0,)), ((0, 2), (0,)), ((2,), ())):
        with pytest.raises(ValueError, match="expected counts >= 1, and a seed"):
            evaluate(noisy, images, samples=samples, seeds=seeds)


def test_bootstrap_of_a_constant_difference_has_no_width():
    scores = np.random.default_rng(0).random((3, 20))
    assert paired_bootstrap(scores + 0.25, scores, draws=100) == pytest.approx((0.25, 0.25, 0.25))


def test_bootstrap_interval_has_the_width_of_the_normal_one():
    difference = np.random.default_rng(0).normal(0.1, 1, 400)
    mean, low, high = paired_bootstrap(difference, np.zeros(400), draws=4000)
    half = 1.96 * difference.std() / 20
    assert mean == pytest.approx(difference.mean())
    assert (low, high) == (pytest.approx(mean - half, abs=0.006), pytest.approx(mean + half, abs=0.006))
    assert (mean, low, high) == paired_bootstrap(difference, np.zeros(400), draws=4000)


def test_bootstrap_resamples_whole_groups():
    difference = np.repeat(np.random.default_rng(0).normal(0, 1, 100), 4)  # four equal slices of each patient
    patients = np.repeat([f"patient {i}" for i in range(100)], 4)
    _, low, high = paired_bootstrap(difference, np.zeros(400), draws=2000)
    _, group_low, group_high = paired_bootstrap(difference, np.zeros(400), draws=2000, groups=patients)
    assert (group_high - group_low) / (high - low) == pytest.approx(2, rel=0.1)  # the root of 4 slices each


def test_bootstrap_averages_seeds_and_refuses_other_images():
    a, b = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([1.0, 1.0])
    assert paired_bootstrap(a, b, draws=10)[0] == 1.5  # (2 - 1 + 3 - 1)/2
    with pytest.raises(ValueError, match="2 and 3 images"):
        paired_bootstrap(a, np.zeros(3))
    with pytest.raises(ValueError, match="image 1 are not finite"):
        paired_bootstrap(np.array([0.0, np.nan]), b)
