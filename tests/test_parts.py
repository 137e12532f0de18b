"""Parts of GED, empty masks and the controls, against counts by hand."""

import numpy as np
import pytest
import torch

from metrics import evaluate
from metrics.controls import emptied
from metrics.parts import empty_table, parts_of, parts_table, thirds
from tests.test_evaluation import ImageList


def block(size):
    """A mask whose first `size` of 16 pixels are marked."""
    return (torch.arange(16) < size).float().view(4, 4)


# Experts' and samples' sizes of four images; two samples each.
EXPERTS = [(0, 0), (0, 4), (8, 8), (16, 16)]
SAMPLES = [(0, 0), (0, 4), (8, 4), (16, 16)]
IMAGES = ImageList([f"image {i}" for i in range(4)],
                [(torch.full((1, 4, 4), i / 4), torch.stack([block(size) for size in sizes]))
                 for i, sizes in enumerate(EXPERTS)])


def sample(image, n, generator=None):
    sizes = SAMPLES[round(4 * image[0, 0, 0, 0].item())]
    return torch.stack([block(size) for size in sizes]).repeat(1, n // 2, 1, 1)


SCORES = evaluate(sample, IMAGES, samples=(2,)).scores


def test_ged_is_the_sum_of_its_parts():
    for images in (np.arange(4), np.array([2])):
        parts = parts_of(SCORES, 2, images)
        assert parts["GED2"] == pytest.approx(
            2 * parts["Distance"] - parts["Diversity"] - parts["Experts' diversity"])
    # Image 2: distances 0, 0, 1/2, 1/2; of samples 0, 1/2, 1/2, 0; of experts none.
    assert list(parts.values()) == pytest.approx([0.25, 0.25, 0.25, 0])


def test_images_are_divided_by_the_mean_size_of_the_experts_masks():
    assert {name: images.tolist() for name, images in thirds(SCORES["Size"].mean(0)).items()} == {
        "smallest third": [0, 1], "middle third": [2], "largest third": [3]}
    lines = parts_table({"ours": SCORES}, 2).splitlines()
    assert lines[0] == "| parts of GED | images | GED2 | Distance | Diversity | Experts' diversity |"
    assert lines[2].startswith("| ours, all, 0 to 16 px | 4 | 0.062 | 0.188 | 0.188 | 0.125 |")
    assert lines[3].startswith("| ours, smallest third, 0 to 2 px | 2 | 0.000 |")


def test_the_fractions_of_empty_masks_and_their_correlation():
    assert SCORES["Empty"][0].tolist() == SCORES["Experts empty"][0].tolist() == [1, 0.5, 0, 0]
    assert empty_table({"ours": SCORES}).splitlines()[2] == "| ours | 0.375 | 0.375 | +1.00 |"
    constant = {"Empty": np.zeros((1, 4)), "Experts empty": SCORES["Experts empty"]}
    assert empty_table({"ours": constant}).splitlines()[2] == "| ours | 0.000 | 0.375 | - |"


def test_the_threshold_of_the_control_is_that_of_the_least_ged(capsys):
    """Experts never mark fewer than 8 pixels, so samples of 4 should become empty."""
    images = ImageList(["a", "b"], [(torch.zeros(1, 4, 4), torch.stack([block(0), block(8)]))] * 2)
    noisy = lambda image, n, generator=None: torch.stack([block(4), block(8)]).repeat(1, n // 2, 1, 1)  # noqa: E731
    control = emptied(noisy, images)
    assert control(images[0][0][None], 2).sum((2, 3)).tolist() == [[0, 8]]
    assert "act-gtr-emptied: samples of fewer than" in capsys.readouterr().out
    perfect = lambda image, n, generator=None: images[0][1][None].repeat(1, n // 2, 1, 1)  # noqa: E731
    assert emptied(perfect, images)(images[0][0][None], 2).sum((2, 3)).tolist() == [[0, 8]]
