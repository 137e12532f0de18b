"""The floor of GED against a simulation of a perfect sampler in plain loops."""

import itertools
import random
import statistics

import numpy as np
import pytest
import torch

from metrics import evaluate
from metrics.floor import floor, floor_of
from tests import oracle
from tests.test_evaluation import dataset, noisy

# Masks that experts and a perfect sampler draw from, each as likely as the others; one is empty.
MASKS = [torch.tensor(pixels, dtype=torch.bool).view(2, 2)
         for pixels in ([0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1])]
DISTANCE = {(i, j): 1 - oracle.iou(MASKS[i], MASKS[j]) for i, j in itertools.product(range(4), repeat=2)}


def mean_distance(a, c):
    """Over all ordered pairs, those of a mask with itself included."""
    return statistics.mean(DISTANCE[i, j] for i in a for j in c)


@pytest.mark.parametrize("k, n", [(4, 16), (2, 3), (3, 1), (3, 24)])
def test_a_perfect_sampler_has_the_floor_on_average(k, n):
    chance, ged, floors = random.Random(0), [], []
    for _ in range(2500):
        experts, samples = ([chance.randrange(4) for _ in range(count)] for count in (k, n))
        diversity = mean_distance(experts, experts)
        ged.append(2 * mean_distance(samples, experts) - mean_distance(samples, samples) - diversity)
        floors.append(floor(np.array([diversity]), np.array([k]), n)[0])
    error = 4 * statistics.stdev(a - c for a, c in zip(ged, floors)) / len(ged) ** 0.5
    assert statistics.mean(ged) == pytest.approx(statistics.mean(floors), abs=error)
    exact = statistics.mean(DISTANCE.values()) * (1 / k + 1 / n)  # D of the distribution itself
    assert statistics.mean(floors) == pytest.approx(exact, abs=4 * statistics.stdev(floors) / len(ged) ** 0.5)
    assert error < 0.1 * exact  # so that a wrong factor would fail


def test_images_may_differ_in_their_number_of_experts_and_one_expert_has_no_floor():
    values = floor(np.array([0.375, 0.5, 0.0]), np.array([4, 2, 1]), 16)
    assert values[:2] == pytest.approx([0.5 * (1 / 4 + 1 / 16), 1.0 * (1 / 2 + 1 / 16)])
    assert np.isnan(values[2])


def test_the_floor_of_a_test_is_that_of_its_masks():
    images = dataset()
    images[1] = images[1][0], images[1][1][:2]
    scores = evaluate(noisy, images, samples=(2,), seeds=(0, 1)).scores
    for index, (_, masks) in enumerate(images):
        pairs = [1 - oracle.iou(a.bool(), c.bool()) for a, c in itertools.combinations(masks, 2)]
        expected = statistics.mean(pairs) * (1 / len(masks) + 1 / 2)
        assert floor_of(scores, 2)[index] == pytest.approx(expected)
