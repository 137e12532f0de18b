"""Items, batches and augmentation: every image once per epoch, the same wherever a run resumes."""

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

import data
from data import ExpertDataset, Loader, Writer, augment, augmentations, dihedral, prepare
from data.convert import Reader
from data.readers import READERS
from data.store import open_store
from metadata_manager import Metadata, Objective
from models import ATFM, STNet

RANDOM = np.random.RandomState(0)
IMAGES = RANDOM.randint(0, 65536, (10, 6, 4)).astype(np.uint16)
MASKS = RANDOM.randint(0, 2, (10, 3, 6, 4)).astype(np.uint8)
ROWS = np.array([9, 0, 9, 3, 8, 4])  # repeats, as the released ISIC3 lists do


def write(path):
    """IMAGES and MASKS; two slices of each patient."""
    with Writer(path, "a test") as writer:
        for row in range(10):
            writer.append(IMAGES[row], MASKS[row], patient=row // 2, id=f"image {row}")
    return open_store(path)


@pytest.fixture
def store(tmp_path):
    return write(tmp_path / "set.h5")


@pytest.fixture
def dataset(store):
    return ExpertDataset(store, np.arange(10))


@pytest.fixture
def square(tmp_path):
    """Metadata of a store of 5 images of 4 x 4 pixels, k = 3."""
    with Writer(tmp_path / "square.h5", "a test") as writer:
        for row in range(5):
            writer.append(IMAGES[row, :4], MASKS[row, :, :4], patient=row)
    return Metadata(data_path=str(tmp_path / "square.h5"), annotators=3, size=4)


def test_a_reader_is_one_entry(tmp_path, monkeypatch, capsys):
    """A new format, whose released split tests on its first row, is loaded, checked and split."""
    def append_all(files, writer):
        for row, file in enumerate(files):
            writer.append(np.full((8, 8), int(file.read_text()), np.uint8), np.ones((3, 8, 8)), patient=row)

    new = Reader("folder of numbers", lambda path: (path / "0.txt").is_file(),
                 lambda path: sorted(path.glob("*.txt")), append_all,
                 lambda store: {"train": np.arange(1, 4), "val": np.arange(1), "train_prior": np.arange(1, 4),
                                "test": np.arange(1)})
    monkeypatch.setattr("data.readers.READERS", {"numbers": new, **READERS})
    (tmp_path / "set").mkdir()
    for row in range(4):
        (tmp_path / "set" / f"{row}.txt").write_text(str(51 * row))
    described = Metadata("numbers", reader="numbers", annotators=3, size=8, data_path=str(tmp_path / "set"))
    assert len(data.load(described, "train")) == 2
    tested = data.load(replace(described, split="released"), "train")
    assert [image.mean().item() for image, _ in (tested[i] for i in range(3))] == pytest.approx([.2, .4, .6])
    prepare.main(["--check", str(tmp_path / "set")])
    assert "set: folder of numbers\n4 images of 8 x 8" in capsys.readouterr().out
    with pytest.raises(ValueError, match="reader 'number': unknown; expected one of numbers, phiseg, lidc"):
        data.load(replace(described, reader="number"), "train")


def test_the_released_split_of_a_store_is_that_of_its_reader(square):
    released = replace(square, split="released")
    assert data.load(released, "test").rows.tolist() == [4]  # the last fifth
    with pytest.raises(ValueError, match="square.h5: has no style; --split released needs it"):
        data.load(replace(released, reader="isic3"), "test")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_scaled_to_the_unit_range(tmp_path, dtype, channels):
    image = RANDOM.randint(0, np.iinfo(dtype).max + 1, (6, 4, channels)).astype(dtype)
    with Writer(tmp_path / "set.h5", "a test") as writer:
        writer.append(image if channels == 3 else image[..., 0], MASKS[0], patient=0)
    pixels, masks = ExpertDataset(open_store(tmp_path / "set.h5"), np.arange(1))[0]
    assert pixels.dtype == masks.dtype == torch.float32
    np.testing.assert_allclose(pixels, image.transpose(2, 0, 1) / np.iinfo(dtype).max, atol=1e-7)
    np.testing.assert_array_equal(masks, MASKS[0])


def test_rows_may_be_in_any_order_and_repeat(store):
    items = ExpertDataset(store, ROWS)
    image, masks = items.batch([5, 0, 2])
    for b, row in enumerate((4, 9, 9)):
        assert (np.rint(image[b, 0].numpy() * 65535) == IMAGES[row]).all()
        assert (masks[b].numpy() == MASKS[row]).all()
    assert items.ids == [f"image {row}" for row in ROWS]
    assert items.patients.tolist() == (ROWS // 2).tolist()
    assert items.subset([3, 0]).ids == ["image 3", "image 9"]


def test_a_crop_keeps_the_centre(store):
    whole, cropped = ExpertDataset(store, ROWS), ExpertDataset(store, ROWS, crop=2)
    for part in (0, 1):
        assert torch.equal(cropped[3][part], whole[3][part][:, 2:4, 1:3])
        assert torch.equal(cropped.subset([3])[0][part], cropped[3][part])
    assert ExpertDataset(store, ROWS, crop=3)[0][0].equal(whole[0][0][:, 1:4, :3])  # rounded down
    with pytest.raises(ValueError, match="--crop 5: .* 6 x 4"):
        ExpertDataset(store, ROWS, crop=5)
    with pytest.raises(ValueError, match="no image"):
        ExpertDataset(store, np.arange(0))


@pytest.mark.parametrize(("count", "chosen"), [(1, [0]), (3, [0, 4, 9]), (4, [0, 3, 6, 9]), (99, range(10))])
def test_items_are_spread_evenly(dataset, count, chosen):
    assert dataset.spread(count).rows.tolist() == list(chosen)  # 4.5 is rounded to the even number


def test_fingerprint_follows_content_and_rows_not_the_path(store, tmp_path, monkeypatch):
    other, loaded = write(tmp_path / "other.h5"), ExpertDataset(store, ROWS)
    expected = ExpertDataset(store, ROWS).fingerprint
    monkeypatch.setattr("data.dataset.BLOCK", 2)
    assert ExpertDataset(store, ROWS).fingerprint == expected == loaded.to("cpu").fingerprint
    assert ExpertDataset(other, ROWS).fingerprint == expected
    assert ExpertDataset(store, ROWS[::-1]).fingerprint != expected
    assert ExpertDataset(store, ROWS, crop=2).fingerprint != expected
    with h5py.File(other.path, "a") as file:
        file["masks_packed"][4, 0] ^= 1
    assert ExpertDataset(other, ROWS).fingerprint != expected


def test_what_checkpoints_of_earlier_versions_hold():
    """A run goes on only if the fingerprint and the order of images are what they were."""
    val = data.load("LIDC_demo", "val")
    assert val.fingerprint == "821b9e4951498727"
    loader = Loader(val, 8, seed=3)
    assert loader.indices(0).tolist() == [7, 15, 35, 50, 53, 31, 16, 54]
    assert loader.indices(15).tolist() == [100, 20, 71, 7, 11, 87, 91, 74]


def test_images_with_fewer_masks_show_theirs_alone_and_repeat_them_at_random_in_batches(tmp_path):
    """The expected loss of a batch is the mean over each image's k_i masks: mean_j l_j, see `batch`."""
    experts = np.array([1, 3, 2, 3])
    with Writer(tmp_path / "set.h5", "a test") as writer:
        for row, k in enumerate(experts):
            masks = MASKS[row] * (np.arange(3) < k)[:, None, None]
            writer.append(IMAGES[row], masks, patient=row, experts=k)
    items = ExpertDataset(open_store(tmp_path / "set.h5"), np.array([2, 0, 1, 3]))
    for index, row in enumerate(items.rows):
        np.testing.assert_array_equal(items[index][1], MASKS[row, :experts[row]])
    torch.manual_seed(0)
    batches = torch.stack([items.batch([0, 1, 2])[1] for _ in range(400)])
    for b, row in enumerate((2, 0, 1)):
        masks = torch.from_numpy(MASKS[row, :experts[row]]).float()
        assert torch.equal(batches[:, b, :experts[row]], masks.expand(400, *masks.shape))
        repeats = batches[:, b, experts[row]:].flatten(0, 1)
        which = (repeats[:, None] == masks).all((2, 3))
        assert (which.sum(1) == 1).all()
        assert experts[row] == 3 or (which.float().mean(0) - 1 / experts[row]).abs().max() < 0.07
    torch.manual_seed(3)
    first = items.batch([0, 1])[1]
    torch.manual_seed(3)
    assert torch.equal(first, items.batch([0, 1])[1])  # of the seed alone
    with h5py.File(items.store.path, "a") as file:
        before, file["experts"][2] = items.fingerprint, 3
    assert ExpertDataset(open_store(items.store.path), items.rows).fingerprint != before


def test_images_without_marks_are_left_out_if_asked_and_counted(tmp_path, capsys):
    with Writer(tmp_path / "set.h5", "a test") as writer:
        for row in range(10):
            writer.append(IMAGES[row, :4], MASKS[row, :, :4] * (row % 2), patient=row)
    metadata = Metadata(data_path=str(tmp_path / "set.h5"), annotators=3, size=4)
    whole = data.load(metadata, "train")
    marked = data.load(replace(metadata, marked=True), "train")
    assert marked.patients.tolist() == [patient for patient in whole.patients if patient % 2]
    left_out = len(whole) - len(marked)
    said = capsys.readouterr().out
    assert f"train: {left_out} of {len(whole)} images that no expert marked are left out" in said
    assert left_out > 0 and len(data.load(replace(metadata, marked=True, limit=1), "train")) == 1


def test_load_refuses_what_does_not_match_the_metadata(square):
    assert len(data.load(square, "train")) == 3
    for wrong, message in (
        ({"annotators": 4}, "3 annotators, expected 4"), ({"channels": 3}, "1 image channels"),
        ({"size": 5}, "pixels per side"), ({"crop": 5}, "--crop 5"), ({"limit": 0}, "--limit 0"),
        ({"data_path": "nowhere"}, "nowhere.*--data_path"), ({"data_path": ""}, "--data_path"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            data.load(replace(square, **wrong), "train")
    with pytest.raises(ValueError, match="split 'dev'"):
        data.load(square, "dev")


@pytest.mark.parametrize("name", ["SET.H5", "set.HDF5", "set.hdf", "set.he5", "set"])
def test_an_hdf5_file_is_known_by_its_content_under_any_name(square, name):
    Path(square.data_path).rename(path := Path(square.data_path).with_name(name))
    assert len(data.load(replace(square, data_path=str(path)), "train")) == 3


def test_limit_keeps_the_first_images_of_each_split(square):
    limited = replace(square, limit=2)
    assert data.load(limited, "train").ids == data.load(square, "train").ids[:2]
    assert len(data.load(limited, "test")) == 1


def test_a_test_on_validation_images_says_so(square, capsys):
    on_val = data.load(replace(square, split="group-val"), "test")
    assert on_val.ids == data.load(square, "val").ids
    assert "tested on the validation images" in capsys.readouterr().out
    data.load(square, "test")
    assert not capsys.readouterr().out


def test_an_epoch_shows_every_image_once(dataset):
    loader = Loader(dataset, 4, seed=0)
    assert len(loader) == 3 and [loader.size(step) for step in range(4)] == [4, 4, 2, 4]
    first, second = (np.concatenate([loader.indices(step) for step in steps]).tolist()
                     for steps in (range(3), range(3, 6)))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def test_a_batch_depends_on_seed_and_step_alone(dataset):
    straight = Loader(dataset, 4, seed=0)
    expected = [straight.indices(step).tolist() for step in range(9)]
    for step in (8, 0, 5, 4, 3):  # a fresh object at any step, as after resuming, and in any order
        assert Loader(dataset, 4, seed=0).indices(step).tolist() == expected[step]
        assert straight.indices(step).tolist() == expected[step]
    assert [Loader(dataset, 4, seed=1).indices(step).tolist() for step in range(9)] != expected


def test_images_masks_and_names_of_a_batch_belong_together(dataset):
    loader = Loader(dataset, 4, seed=0)
    image, masks = loader(4)
    for b, name in enumerate(loader.ids(4)):
        row = int(name.removeprefix("image "))
        assert (np.rint(image[b, 0].numpy() * 65535) == IMAGES[row]).all()
        assert (masks[b].numpy() == MASKS[row]).all()
    assert [tuple(part.shape) for part in dataset.batch([])] == [(0, 1, 6, 4), (0, 3, 6, 4)]
    with pytest.raises(ValueError, match="batch size 0"):
        Loader(dataset, 0, seed=0)


@pytest.mark.parametrize("ranks, divided, weights, annotators", [
    (2, True, [2 / 3, 1 / 3], [[0, 2], [1]]),
    (3, True, [1 / 3] * 3, [[0], [1], [2]]),
    (5, True, [1 / 6, 1 / 6, 1 / 3, 1 / 6, 1 / 6], [[0], [1], [2], [0], [1]]),
    (2, False, [1 / 2] * 2, [[0, 1, 2]] * 2)])
def test_processes_divide_the_annotators_of_one_image(dataset, ranks, divided, weights, annotators):
    """Two or more who have the same annotators split their weight."""
    _, masks = Loader(dataset, 1, seed=0)(0)
    loaders = [Loader(dataset, 1, seed=0, rank=rank, ranks=ranks, per_annotator_loss=divided)
               for rank in range(ranks)]
    assert [loader.weight(0) for loader in loaders] == pytest.approx(weights)
    for loader, indices in zip(loaders, annotators):
        assert torch.equal(loader(0)[1], masks[:, indices])
        assert loader.size(0) == 1 and loader.ids(0) == loaders[0].ids(0)


@pytest.mark.parametrize("choices", [
    {}, {"semantic_target": "all"}, {"experts": "one"},
    {"experts": "one", "semantic_target": "all"}])
@pytest.mark.parametrize("ranks, step", [(2, 0), (2, 1), (3, 1)])
def test_the_gradients_of_processes_add_up_to_those_of_one(square, choices, ranks, step, monkeypatch):
    """A flow without chance, or for one expert the mean over the possible ones; the last batch: one image."""
    torch.manual_seed(0)
    objective, train = Objective(source="normal", alpha=1.0, **choices), data.load(square, "train")
    atfm, noise = ATFM(None, STNet(4, (1,)), objective), torch.rand(1, 3, 4, 4)
    monkeypatch.setattr("models.atfm.draw_time", lambda b, *_: torch.full((b,), 0.5))
    monkeypatch.setattr(atfm, "sample_source", lambda image, n: noise[:, :n] + image)
    expert = []
    monkeypatch.setattr("models.atfm.one_expert", lambda masks: masks[:, expert])

    def gradient(*place):
        loader = Loader(train, 2, 0, "cpu", (), *place, objective.per_annotator_loss)
        image, masks = loader(step)
        atfm.zero_grad()
        chosen = range(masks.shape[1]) if "experts" in choices else [0]
        for expert[:] in ([j] for j in chosen):
            for piece in atfm.losses(image, masks):
                (loader.weight(step) / len(chosen) * piece["loss"]).backward()
        return torch.cat([weight.grad.flatten() for weight in atfm.net.parameters()])

    summed = sum(gradient(rank, ranks) for rank in range(ranks))
    torch.testing.assert_close(summed, gradient(0, 1), rtol=1e-4, atol=1e-6)


def test_augmentations_follow_each_other_and_the_global_seed(dataset):
    plain = Loader(dataset, 4, seed=0)(1)
    twice = Loader(dataset, 4, seed=0, augment=[lambda image, masks: (image + 1, masks),
                                                lambda image, masks: (2 * image, masks)])(1)
    assert torch.equal(twice[0], 2 * (plain[0] + 1)) and torch.equal(twice[1], plain[1])
    loader = Loader(dataset, 4, seed=0, augment=[augment])
    torch.manual_seed(5)
    first = loader(1)
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(first, loader(1)))
    assert not torch.equal(first[1], loader(1)[1])
    assert augmentations(Metadata()) == []
    assert augmentations(Metadata(augment=True, dihedral=True)) == [augment, dihedral]


def test_positions_are_a_flip_then_turns_of_the_numbers_drawn():
    masks = torch.rand(40, 2, 5, 5)
    torch.manual_seed(3)
    image, moved = dihedral(masks[:, :1], masks)
    torch.manual_seed(3)
    sides, quarters = torch.randint(2, (40,)).tolist(), torch.randint(4, (40,)).tolist()
    assert len(set(zip(sides, quarters))) == 8
    expected = [torch.rot90(mask.flip(-1) if side else mask, turns, (-2, -1))
                for mask, side, turns in zip(masks, sides, quarters)]
    assert torch.equal(moved, torch.stack(expected)) and torch.equal(image, moved[:, :1])


@pytest.mark.parametrize("shape", [(33, 33), (24, 40)])
def test_a_batch_is_moved_as_torchvision_moves_each_image(shape):
    image, masks = torch.rand(16, 3, *shape), (torch.rand(16, 2, *shape) < 0.5).float()
    torch.manual_seed(7)
    moved, its_masks = augment(image, masks)
    assert moved.min() >= 0 and moved.max() <= 1 and its_masks.unique().tolist() == [0, 1]
    torch.manual_seed(7)
    flips = set()
    for i in range(16):
        side, end, turn, grow, slant = torch.rand(5).tolist()
        flips.add((side < 0.5, end < 0.5))
        affine = {"angle": 15 * (2 * turn - 1), "translate": [0, 0], "scale": 0.9 + 0.2 * grow,
                  "shear": [5 * (2 * slant - 1), 0.0]}
        pixels, marked = (functional.vertical_flip(x) if end < 0.5 else x for x in (
            functional.horizontal_flip(x) if side < 0.5 else x for x in (image[i], masks[i])))
        pixels = functional.affine(pixels, interpolation=InterpolationMode.BILINEAR, **affine)
        marked = functional.affine(marked, interpolation=InterpolationMode.NEAREST, **affine)
        torch.testing.assert_close(moved[i], pixels, rtol=0, atol=1e-4)
        assert (its_masks[i] != marked).float().mean() < 0.002  # ties of the nearest pixel
    assert len(flips) == 4


@pytest.mark.parametrize("change", [augment, dihedral])
def test_operations_on_the_images_do_not_grow_with_the_batch(change):
    """On a GPU each is a launch."""
    counts = []

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counts[-1] += any(isinstance(leaf, torch.Tensor) and leaf.ndim > 3
                              for leaf in tree_leaves((args, kwargs)))
            return func(*args, **(kwargs or {}))

    for b in (2, 16):
        counts.append(0)
        with Counted():
            change(torch.rand(b, 3, 8, 8), torch.rand(b, 2, 8, 8))
    assert 0 < counts[0] == counts[1] < 30
