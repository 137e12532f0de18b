"""Splits against the released index lists and against what they promise."""

from pathlib import Path

import numpy as np
import pytest

from data import splits

GOLDEN = np.load(Path(__file__).parent / "golden" / "released_splits.npz")
NAMES = {"train": "gtr_train", "val": "gtr_val", "train_prior": "prior_train", "test": "test"}


@pytest.mark.parametrize("count", [15096, 100])
def test_released_lists(count):
    ours = splits.released(count)
    for name, released in NAMES.items():
        np.testing.assert_array_equal(ours[name], GOLDEN[f"n{count}_{released}"])


def test_released_overlap_of_lidc():
    lists = splits.released(15096)
    assert splits.overlap(lists["train_prior"], lists["test"]) == (2398, 3020)
    assert splits.overlap(np.array([3, 3, 4]), np.array([4, 4, 5])) == (1, 2)


def test_released_isic_lists_each_image_once_per_mask():
    style = np.array([[0, 2, 0], [1, 1, 1], [2, 0, 1]])
    # Style f: image 0 twice, image 2; style m: image 1 three times, image 2; style p: images 0 and 2.
    entries = np.array([0, 0, 2, 1, 1, 1, 2, 0, 2])
    lists = splits.released_isic(style)
    shuffled = entries[np.random.RandomState(42).permutation(9)]
    np.testing.assert_array_equal(lists["train"], shuffled[:5])
    np.testing.assert_array_equal(lists["val"], [1, 2])
    np.testing.assert_array_equal(lists["train_prior"], shuffled[:7])
    np.testing.assert_array_equal(lists["test"], [0, 2])


def test_released_isic_overlap_is_about_99_percent():
    style = np.random.RandomState(0).randint(0, 3, (2000, 3))
    lists = splits.released_isic(style)
    both, total = splits.overlap(lists["train_prior"], lists["test"])
    assert 0.98 < both / total < 1


@pytest.mark.parametrize("patient", [
    np.arange(40).repeat(3), np.array([f"p{i % 50}" for i in range(300)], object),
])
def test_no_patient_is_on_two_sides_and_no_row_is_lost(patient):
    parts = splits.by_patient(patient, seed=0)
    rows = [parts[name] for name in ("train", "val", "test")]
    assert sum(len(set(patient[part])) for part in rows) == len(set(patient))
    assert sorted(np.concatenate(rows)) == list(range(len(patient)))
    np.testing.assert_array_equal(parts["train_prior"], parts["train"])


@pytest.mark.parametrize(("count", "sizes"), [
    (100, (64, 16, 20)), (235, (150, 38, 47)), (3, (1, 1, 1)),
])
def test_sizes(count, sizes):
    parts = splits.by_patient(np.arange(count), seed=3)
    assert tuple(len(parts[name]) for name in ("train", "val", "test")) == sizes


def test_a_split_is_a_fixed_function_of_patients_and_seed():
    patient = np.array(list("abcdefgh"))
    assert {name: "".join(patient[rows]) for name, rows in splits.by_patient(patient, seed=0).items()} == {
        "train": "dfhae", "val": "b", "test": "cg", "train_prior": "dfhae"}
    assert set(splits.by_patient(patient, 0)["test"]) != set(splits.by_patient(patient, 1)["test"])
    order = np.random.RandomState(1).permutation(8)  # of rows: it moves no patient
    assert set(patient[order][splits.by_patient(patient[order], seed=0)["test"]]) == {"c", "g"}


def test_too_few_are_refused():
    with pytest.raises(ValueError, match="2 patients .*too few"):
        splits.by_patient(np.array([1, 1, 2]), seed=0)
    with pytest.raises(ValueError, match="2 images: too few"):
        splits.released(2)


@pytest.mark.parametrize("name, fold", [("training", "train"), ("Validation_2d", "val"), ("TEST", "test"),
                                        ("val", "val"), ("images", None), ("train2", None)])
def test_folders_that_name_a_fold(name, fold):
    assert splits.fold_of(name) == fold
