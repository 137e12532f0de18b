"""MMIS: volumes and 2-D files, three modalities scaled together, its own folders as the split."""

import h5py
import numpy as np
import pytest

import data
from data import mmis
from data.images import Fit
from metadata_manager import Metadata

COUNT = {"training": 3, "validation": 2, "testing": 2}
METADATA = Metadata("MMIS", reader="mmis", channels=3, split="file", grey=False)


def sample(seed, depth=4):
    """The arrays of a patient; the first slice is marked by nobody."""
    random = np.random.RandomState(seed)
    arrays = {name: random.rand(depth, 29, 36).astype(np.float32) * (100 + 50 * i) - 10
              for i, name in enumerate(mmis.MODALITIES)}
    marked = np.arange(depth)[:, None, None] > 0
    return arrays | {name: np.uint8(marked & (random.rand(depth, 29, 36) > 0.5)) for name in mmis.LABELS}


def write(path, arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
        file["voxel_spacing"] = [1.0, 1.0, 1.0]


@pytest.fixture
def folder(tmp_path):
    for number, (fold, count) in enumerate(COUNT.items()):
        for i in range(count):
            write(tmp_path / "MMIS" / fold / f"Sample_{i}.h5", sample(10 * number + i))
    return tmp_path / "MMIS"


def metadata(folder, **changes):
    return Metadata(**{**METADATA.__dict__, "data_path": str(folder), **changes})


def test_volumes_become_slices_split_by_their_folders(folder, capsys):
    parts = {split: data.load(metadata(folder), split) for split in ("train", "val", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 12, "val": 8, "test": 8}
    assert parts["train"].ids[:5] == ["train/Sample_0/000", "train/Sample_0/001", "train/Sample_0/002",
                                      "train/Sample_0/003", "train/Sample_1/000"]
    assert set(parts["val"].patients) == {"val/Sample_0", "val/Sample_1"}
    arrays, (image, masks) = sample(1), parts["train"][6]
    modalities = np.stack([arrays[name] for name in mmis.MODALITIES])
    low, high = modalities.min(), modalities.max()  # one of each for all three
    inner = image[:, 12:115]  # 29 x 36 become 103 x 128
    assert Fit(29, 36, 128, grow=True).inner == (103, 128) and image.shape == (3, 128, 128)
    means = (modalities[:, 2] - low) / (high - low)
    np.testing.assert_allclose(inner.mean((1, 2)), means.mean((1, 2)), atol=0.01)
    assert image[:, :12].max() == image[:, 115:].max() == 0 and masks.shape == (4, 128, 128)
    marked = np.stack([arrays[name][2] for name in mmis.LABELS]).mean((1, 2))
    np.testing.assert_allclose(masks[:, 12:115].mean((1, 2)), marked, atol=0.02)
    assert data.load(metadata(folder, split="file-val"), "test").ids == parts["val"].ids
    assert "tested on the validation images" in capsys.readouterr().out


def test_slices_that_nobody_marked_are_kept_unless_left_out(folder, capsys):
    assert len(data.load(metadata(folder, marked=True), "train")) == 9
    assert "3 of 12 images that no expert marked are left out" in capsys.readouterr().out


def test_two_dimensional_files_stand_in_for_a_fold_without_volumes(folder):
    for i in range(COUNT["training"]):
        arrays = sample(i)
        for z in (2, 3):
            path = folder / "training_2d" / f"Sample_{i}_slice_{z}.h5"
            write(path, {name: of[z] for name, of in arrays.items()})
    assert len(mmis.files_of(folder)) == 7  # volumes, where there are both
    volumes = data.load(metadata(folder), "train")
    masks = volumes[2][1]
    (folder / "training").rename(folder / "elsewhere")
    flat = data.load(metadata(folder), "train")
    assert flat.ids[:3] == ["train/Sample_0/002", "train/Sample_0/003", "train/Sample_1/002"]
    assert set(flat.patients) == set(volumes.patients)
    assert (flat[0][1] == masks).all()


@pytest.mark.parametrize("name, value, message", [
    ("t1c", None, "holds label_a1, .*, expected a dataset 't1c'"),
    ("t2", np.zeros((4, 29, 35), np.float32), r"t2 is float32 \(4, 29, 35\), expected numbers \(4, 29, 36\)"),
    ("t1", np.full((4, 29, 36), np.nan), "t1 has values that are NaN"),
    ("label_a3", np.full((4, 29, 36), 2), "label_a3 has values other than 0 and 1"),
])
def test_a_bad_file_is_named(folder, name, value, message):
    path = folder / "validation" / "Sample_1.h5"
    arrays = sample(11) | {name: value}
    write(path, {key: array for key, array in arrays.items() if array is not None})
    with pytest.raises(ValueError, match=f"validation/Sample_1.h5: {message}"):
        data.load(metadata(folder), "train")


def test_a_label_that_was_never_written_is_an_empty_mask(folder):
    path = folder / "training" / "Sample_1.h5"
    for chunks in (None, (1, 29, 36)):  # nothing of it, or all but one slice
        with h5py.File(path, "a") as file:
            del file["label_a4"]
            label = file.create_dataset("label_a4", (4, 29, 36), np.uint8, chunks=chunks, compression=chunks
                                        and "gzip")
            if chunks:
                label[2, 10:20, 10:20] = 1
        train = data.load(metadata(folder), "train")
        masks = np.stack([train[i][1][3] for i in range(4, 8)])
        assert masks.any((1, 2)).tolist() == [False, False, bool(chunks), False]


def test_a_label_that_claims_another_size_is_refused_before_it_is_read(folder):
    with h5py.File(folder / "training" / "Sample_1.h5", "a") as file:
        del file["label_a4"]
        file.create_dataset("label_a4", (10**6, 29 * 10**3, 36), np.uint8, chunks=True)
    with pytest.raises(ValueError, match=r"Sample_1.h5: label_a4 is uint8 .1000000, 29000, 36., "):
        data.load(metadata(folder), "train")


def test_two_files_of_one_slice_are_named(folder):
    for number in ("2", "02"):
        write(folder / "training_2d" / f"Sample_0_slice_{number}.h5",
              {name: of[0] for name, of in sample(3).items()})
    (folder / "training").rename(folder / "elsewhere")
    with pytest.raises(ValueError, match="id 'train/Sample_0/002' .*slice_02.h5 and .*slice_2.h5"):
        data.load(metadata(folder), "train")


def test_a_patient_in_two_folds_is_refused_and_a_folder_without_training_is_named(folder, tmp_path):
    write(folder / "testing" / "Sample_9.h5", sample(0))
    with pytest.raises(ValueError, match="Sample_9.h5: the same image as .*training/Sample_0.h5, in another"):
        data.load(metadata(folder), "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no training/Sample_<k>.h5"):
        data.load(metadata(tmp_path / "empty"), "train")
