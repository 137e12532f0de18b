"""Training batches: every image once per epoch, the same wherever a run resumes; and their augmentation."""

import numpy as np
import pytest
import torch

from data import Batches, Slices, Writer
from data.augment import augment
from data.cache import open_cache


@pytest.fixture
def dataset(tmp_path):
    """Ten images of 8 x 8; image i has brightness i."""
    with Writer(tmp_path / "set.h5", "a test") as writer:
        for i in range(10):
            image, masks = np.full((8, 8), i, np.uint8), np.eye(8)[None].repeat(3, 0)
            writer.append(image, masks, patient=i, id=f"image {i}")
    return Slices(open_cache(tmp_path / "set.h5"), np.arange(10))


def brightness(image):
    return (image[:, 0, 0, 0] * 255).round().int().tolist()


def test_an_epoch_shows_every_image_once(dataset):
    batches = Batches(dataset, 4, seed=0)
    assert len(batches) == 3
    first, second = ([brightness(batches(step)[0]) for step in steps] for steps in (range(3), range(3, 6)))
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(10)) and first != second


def test_a_batch_depends_on_seed_and_step_alone(dataset):
    straight = Batches(dataset, 4, seed=0)
    expected = [straight.rows(step).tolist() for step in range(9)]
    for step in (8, 0, 5, 4, 3):  # a fresh object at any step, as after resuming, and in any order
        resumed = Batches(dataset, 4, seed=0)
        assert resumed.rows(step).tolist() == straight.rows(step).tolist() == expected[step]
    assert [Batches(dataset, 4, seed=1).rows(step).tolist() for step in range(9)] != expected


def test_images_masks_and_names_of_a_batch_belong_together(dataset):
    batches = Batches(dataset, 4, seed=0)
    image, masks = batches(4)
    assert image.shape == (4, 1, 8, 8) and masks.shape == (4, 3, 8, 8)
    assert batches.ids(4) == [f"image {value}" for value in brightness(image)]
    assert torch.equal(masks[2, 1], torch.eye(8))


def test_an_empty_batch_is_refused(dataset):
    with pytest.raises(ValueError, match="batch size 0"):
        Batches(dataset, 0, seed=0)


def test_augmentation_is_applied_to_batches_and_follows_the_global_seed(dataset):
    batches = Batches(dataset, 4, seed=0, augment=augment)
    torch.manual_seed(5)
    first = batches(1)
    torch.manual_seed(5)
    again = batches(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[1], batches(1)[1])


def blobs(size=64):
    """Masks (4, 3, size, size): a smooth shape off the centre, at three thresholds."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    field = torch.exp(-((x - 0.2) ** 2 / 0.1 + (y + 0.1) ** 2 / 0.05))
    return torch.stack([(field > level).float() for level in (0.3, 0.5, 0.7)]).expand(4, 3, size, size)


def test_image_and_masks_move_together():
    """An image that equals its masks must still do so, but for interpolation at their edges."""
    masks = blobs()
    torch.manual_seed(0)
    image, moved = augment(masks.clone(), masks)
    assert image.shape == moved.shape == masks.shape
    assert set(moved.unique().tolist()) == {0.0, 1.0} and image.min() >= 0 and image.max() <= 1
    assert ((image > 0.5).float() - moved).abs().mean() < 0.01
    assert (masks - moved).abs().mean() > 0.03


def test_every_image_moves_differently_and_by_little():
    masks = blobs()
    torch.manual_seed(0)
    _, moved = augment(masks[:, :1].clone(), masks)
    assert not torch.equal(moved[0], moved[1])
    area = moved.sum((2, 3)) / masks.sum((2, 3))
    assert (area > 0.75).all() and (area < 1.25).all()  # scale 0.9 to 1.1, squared


def test_all_flips_occur():
    corner = torch.zeros(64, 1, 16, 16)
    corner[:, :, 3:7, 3:7] = 1
    torch.manual_seed(0)
    _, moved = augment(corner.clone(), corner)
    quarters = moved.reshape(64, 2, 8, 2, 8).sum((2, 4)).flatten(1).argmax(1)
    assert set(quarters.tolist()) == {0, 1, 2, 3}
