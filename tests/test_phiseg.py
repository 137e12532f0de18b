"""The HDF5 file of PHiSeg and CCDM: its pixels and its split survive the conversion."""

import fcntl

import h5py
import numpy as np
import pytest

from data import phiseg, splits
from data.store import open_store
from data.writer import Writer

ROWS = {"train": 5, "val": 2, "test": 3}


def write_file(path, shift=0.0, uids=(b"1.2.3", b"1.2.4")):
    """A file of the layout with random content; returns it as {fold: (images, labels)}."""
    rng = np.random.RandomState(0)
    content = {}
    with h5py.File(path, "w") as file:
        for fold, count in ROWS.items():
            images, labels = rng.rand(count, 6, 8), rng.rand(count, 6, 8, 4) > 0.5
            images[0, 0, 0] = 0.0
            file[f"{fold}/images"] = (images + shift).astype(np.float32)
            file[f"{fold}/labels"] = labels.astype(np.uint8)
            file[f"{fold}/uids"] = [uids[row % 2] for row in range(count)]
            content[fold] = images, labels
    return content


def convert(path):
    with Writer(path.with_name("store.h5"), "test") as writer:
        phiseg.convert([path], writer)
    return open_store(path.with_name("store.h5"))


@pytest.mark.parametrize("shift, uids", [(0.0, (b"1.2.3", b"1.2.4")), (-0.5, (7, 9))])
def test_pixels_and_folds_are_kept_and_the_series_is_the_patient(tmp_path, shift, uids):
    content = write_file(tmp_path / "lidc.hdf5", shift, uids)
    store = convert(tmp_path / "lidc.hdf5")
    assert store.patient[:2].tolist() == (["7", "9"] if shift else ["1.2.3", "1.2.4"])
    folds = splits.by_fold(store.ids, store.patient, seed=0)
    assert {fold: len(folds[fold]) for fold in ROWS} == ROWS
    assert folds["train_prior"].tolist() == folds["train"].tolist() == [0, 1, 2, 3, 4]
    for fold, (images, labels) in content.items():
        pixels, packed = store.read(folds[fold])
        assert np.abs(pixels[..., 0] / 65535 - images).max() < 1e-5
        masks = np.unpackbits(packed, axis=-1).reshape(-1, 4, 6, 8)
        for k in range(4):
            assert (masks[:, k] == labels[..., k]).all()


def test_the_layouts_are_distinguished(tmp_path):
    write_file(tmp_path / "lidc.hdf5")
    convert(tmp_path / "lidc.hdf5")
    (tmp_path / "text.h5").write_text("not HDF5")
    names = ("lidc.hdf5", "store.h5", "text.h5")
    assert [phiseg.is_phiseg(tmp_path / name) for name in names] == [True, False, False]
    with open(tmp_path / "lidc.hdf5", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as of a process that writes to it
        assert phiseg.is_phiseg(tmp_path / "lidc.hdf5")


@pytest.mark.parametrize("name, value, message", [
    ("train/uids", None, "lidc.hdf5, train: holds images, labels, expected a dataset 'uids'"),
    ("val/labels", np.zeros((2, 6, 7, 4)), r"lidc.hdf5, val: .*labels \(2, 6, 7, 4\)"),
    ("test/images", np.full((3, 6, 8), 2.0), "lidc.hdf5, test, row 0: image ranges from 2 to 2"),
    ("val/labels", np.full((2, 6, 8, 4), 3), "lidc.hdf5, val, row 0: labels"),
])
def test_a_bad_array_is_named_and_nothing_is_written(tmp_path, name, value, message):
    write_file(tmp_path / "lidc.hdf5")
    with h5py.File(tmp_path / "lidc.hdf5", "a") as file:
        del file[name]
        if value is not None:
            file[name] = value
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "lidc.hdf5")
    assert [path.name for path in tmp_path.iterdir()] == ["lidc.hdf5"]


@pytest.mark.parametrize("k, message", [(4, ""), (10**9, r"labels .2, 6, 8, 1000000000.*, k up to 64")])
def test_labels_that_were_never_written_are_empty_masks_of_a_number_that_can_be(tmp_path, k, message):
    write_file(tmp_path / "lidc.hdf5")
    with h5py.File(tmp_path / "lidc.hdf5", "a") as file:
        del file["val/labels"]
        file.create_dataset("val/labels", (2, 6, 8, k), np.uint8, chunks=True)
    if message:
        with pytest.raises(ValueError, match=f"lidc.hdf5, val: .*{message}"):
            convert(tmp_path / "lidc.hdf5")
    else:
        store = convert(tmp_path / "lidc.hdf5")
        assert store.marked().tolist() == [True] * 5 + [False] * 2 + [True] * 3


def test_links_to_other_files_are_refused(tmp_path):
    path = tmp_path / "lidc.hdf5"
    write_file(path)
    write_file(tmp_path / "other.hdf5")
    with h5py.File(path, "a") as file:
        del file["val/images"]
        file["val/images"] = h5py.ExternalLink("other.hdf5", "/val/images")
    with pytest.raises(ValueError, match="lidc.hdf5, val: 'images' is a ExternalLink"):
        convert(path)
    with h5py.File(path, "a") as file:
        del file["val"]
        file["val"] = h5py.ExternalLink("other.hdf5", "/val")
    assert not phiseg.is_phiseg(path)


def test_ids_without_a_fold_are_refused():
    with pytest.raises(ValueError, match="LIDC-IDRI-0001_nodule00.*names no fold"):
        splits.by_fold(["LIDC-IDRI-0001_nodule00", "train/0"], np.array(["a", "b"]), seed=0)
