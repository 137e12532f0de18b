"""Evaluation over a dataset: what is drawn, from which seed, and how scores are averaged."""

import json

import numpy as np
import pytest
import torch

import metrics
from metrics import Evaluation, evaluate, image_seed, interleaved

SEEDS = (0, 7)


class ImageList(list):
    """A dataset: pairs of an image and its masks, with ids."""

    def __init__(self, ids, items):
        super().__init__(items)
        self.ids = ids


def dataset(number=5, k=3, size=8):
    generator = torch.Generator().manual_seed(5)
    items = [(torch.rand(1, size, size, generator=generator),
              (torch.rand(k, size, size, generator=generator) < 0.4).float()) for _ in range(number)]
    return ImageList([f"image {i}" for i in range(number)], items)


def noisy(image, n, generator):
    """Probabilities that depend on the image and on the generator."""
    return torch.rand(image.shape[0], n, *image.shape[2:], generator=generator) * image


def test_per_image_scores_are_those_of_the_thresholded_samples():
    images = dataset()
    evaluation = evaluate(noisy, images, samples=(2, 5), seeds=SEEDS)
    assert evaluation.ids == tuple(images.ids) and evaluation.seeds == SEEDS
    image, masks = images[2][0][None], images[2][1][None].bool()
    drawn = noisy(image, 5, torch.Generator().manual_seed(image_seed(7, "image 2"))) >= 0.5
    per_n = {"GED": metrics.ged, "HM-IoU": metrics.hm_iou, "MDM": metrics.mdm,
             "Diversity": lambda samples, _: metrics.diversity(samples)}
    expected = {f"{name}{n}": of(drawn[:, :n], masks) for name, of in per_n.items() for n in (2, 5)}
    expected |= {"S_NCC": metrics.s_ncc(drawn, masks), "ECE": metrics.calibration_error(drawn, masks),
                 "Dice of means": metrics.dice_of_means(drawn, masks)}
    expected |= {"Distance": 1 - metrics.iou_matrix(drawn, masks).mean(), "Size": masks.sum() / 3,
                 "Experts' diversity": 1 - metrics.iou_matrix(masks, masks).mean(),
                 "Empty": torch.zeros(()), "Experts empty": torch.zeros(()), "Experts": torch.tensor(3)}
    assert all(values.shape == (2, 5) and values.dtype == np.float64 for values in evaluation.scores.values())
    assert {name: values[1, 2] for name, values in evaluation.scores.items()} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, abs=1e-6)


def test_the_threshold_keeps_one_half():
    images = ImageList(["a"], [(torch.zeros(1, 2, 2), torch.ones(2, 2, 2))])
    evaluation = evaluate(lambda image, n, generator: torch.full((1, n, 2, 2), 0.5), images, samples=(3,))
    assert evaluation.scores["MDM3"].item() == 1.0


def test_splitting_images_over_processes_changes_nothing():
    images = dataset()
    whole = evaluate(noisy, images, samples=(2, 4), seeds=SEEDS)
    for processes in 1, 3, 6:  # the sixth has no image
        again = interleaved([evaluate(noisy, images, (2, 4), SEEDS, indices=range(5)[rank::processes])
                             for rank in range(processes)])
        assert (again.ids, again.seeds) == (whole.ids, whole.seeds)
        assert all(np.array_equal(values, again.scores[name]) for name, values in whole.scores.items())
    assert not np.array_equal(*whole.scores["GED4"])  # seeds do differ


def test_image_seed_is_the_same_in_every_process():
    assert image_seed(3, "a") == 11540360907039814225
    assert len({image_seed(seed, name) for seed in (0, 1, 11) for name in ("a", "1 a", "b")}) == 9


def test_mean_and_standard_deviation_are_over_seeds_of_means_over_images():
    scores = {"GED16": np.array([[0.1, 0.3], [0.2, 0.6]])}  # runs .2 and .4
    two = Evaluation(("a", "b"), (0, 1), scores)
    single = Evaluation(("a", "b"), (0,), {"GED16": scores["GED16"][:1]})
    assert two.mean_std()["GED16"] == pytest.approx((0.3, 0.1 * 2**0.5))
    assert single.mean_std()["GED16"] == (pytest.approx(0.2), None)
    assert two.means(16, "GED") == {"GED": pytest.approx(0.3)}
    assert json.loads(json.dumps(two.as_dict())) == {
        "ids": ["a", "b"], "seeds": [0, 1], "scores": {"GED16": [[0.1, 0.3], [0.2, 0.6]]},
        "mean_std": {"GED16": list(two.mean_std()["GED16"])}}


def sizes(evaluation):
    return [round(size) for size in evaluation.scores["Size"][0].tolist()]


def blocks(*numbers):
    """Images whose masks have so many pixels."""
    return [(torch.full((1, 4, 4), number / 16),
             (torch.arange(16) < number).float().view(1, 4, 4).repeat(2, 1, 1)) for number in numbers]


def test_images_with_the_same_id_have_separate_scores(tmp_path):
    images = ImageList(["P0", "P0", "P0 (2)", "P0", "P1"], blocks(3, 5, 7, 9, 11))
    evaluation = evaluate(noisy, images, samples=(2,))
    assert evaluation.ids == ("P0", "P0 (3)", "P0 (2)", "P0 (4)", "P1")
    assert sizes(evaluation) == [3, 5, 7, 9, 11]
    halves = [evaluate(noisy, images, samples=(2,), indices=range(5)[rank::2]) for rank in (0, 1)]
    assert interleaved(halves).as_dict() == evaluation.as_dict()


def test_an_image_that_is_listed_twice_is_one_image():
    images = ImageList(["a", "b", "a"], blocks(3, 5, 3))
    evaluation = evaluate(noisy, images, samples=(2,))
    assert evaluation.ids == ("a", "b", "a") and sizes(evaluation) == [3, 5, 3]
    assert evaluation.scores["GED2"][0, 0] == evaluation.scores["GED2"][0, 2]


def test_ids_that_differ_in_unicode_form_only_are_the_same():
    evaluation = evaluate(noisy, ImageList(["\u00e9", "e\u0301"], blocks(3, 5)), samples=(2,))
    assert evaluation.ids == ("\u00e9", "\u00e9 (2)") and sizes(evaluation) == [3, 5]
    assert image_seed(0, "\u00e9") == image_seed(0, "e\u0301")


def diverging(image, n, generator):
    probabilities = noisy(image, n, generator)
    if torch.equal(image[0], dataset()[1][0]):
        probabilities[0, 0, 3, 3] = torch.nan
        probabilities[0, 1, 3, 3] = torch.inf
    return probabilities


IMAGE, MASKS = dataset(1)[0]


@pytest.mark.parametrize("images, arguments, message", [
    (ImageList(["a"], [(IMAGE, 0.3 * MASKS)]), {}, "masks of image a: expected 0 and 1"),
    (ImageList(["a"], [(IMAGE, MASKS)] * 2), {}, "2 images with 1 ids"),
    (ImageList([], []), {}, "0 images"),
    (dataset(1), {"samples": ()}, "expected counts >= 1, and a seed"),
    (dataset(1), {"samples": (0, 2)}, "expected counts >= 1, and a seed"),
    (dataset(1), {"seeds": ()}, "expected counts >= 1, and a seed"),
    (dataset(1), {"seeds": (3, 1, 3)}, "seeds 3 1 3: the same seed twice is the same run twice"),
    (dataset(1), {"sample": lambda image, n, generator: noisy(image, n + 1, generator)},
     r"image 0: shape \(1, 3, 8, 8\), expected .* \(1, 2, 8, 8\)"),
    (dataset(), {"sample": diverging}, "image 1, seed 0: 2 of 128 probabilities are not finite"),
])
def test_bad_arguments_are_refused_with_their_values(images, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(**{"sample": noisy, "dataset": images, "samples": (2,), **arguments})


def test_images_may_differ_in_their_number_of_experts():
    images = dataset()
    images[1] = images[1][0], images[1][1][:2]
    scores = evaluate(noisy, images, samples=(4,)).scores
    drawn = noisy(images[1][0][None], 4, torch.Generator().manual_seed(image_seed(0, "image 1"))) >= 0.5
    assert scores["GED4"][0, 1] == pytest.approx(metrics.ged(drawn, images[1][1][None].bool()).item())
    assert scores["Experts"][0].tolist() == [3, 2, 3, 3, 3]
