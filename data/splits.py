"""Which rows train, validate and test.

`by_patient` is ours: no patient (LIDC) or image (ISIC3) on two sides. `released` and `released_isic` are the
authors' lists, whose test images are mostly in their training lists; they repeat the paper's protocol.
NumPy's legacy generator is used throughout: its stream is frozen, so a split is the same everywhere.
"""

import re
from collections.abc import Sequence

import numpy as np

FOLDS = ("train", "val", "test")
SPLITS = ("train", "val", "test", "train_prior")
VALIDATED = 0.2  # of the training patients, where data came split into training and test only


def by_patient(patient: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """64 / 16 / 20 % of the patients, (N,) one per row; rows shuffled, so that the first N are of many.

    `train_prior`, for the flow, is `train`. Raises ValueError for fewer than three patients."""
    unique, number = np.unique(patient, return_inverse=True)
    count = len(unique)
    if count < 3:
        raise ValueError(f"{count} patients (LIDC) or images (ISIC3): too few to split; expected at least 3, "
                         "one each for training, validation and test. If your file of cases has more, "
                         "name them: python -m data.prepare ... --patients")
    # 20 % are tested on; of the other 80 % a fifth validates.
    test, val = max(1, round(0.20 * count)), max(1, round(0.16 * count))
    random = np.random.RandomState(seed)
    order = random.permutation(count)  # of patients, so that all images of one lie on one side
    parts = dict(zip(("test", "val", "train"), np.split(order, (test, test + val))))
    rows = {name: random.permutation(np.flatnonzero(np.isin(number, members)))
            for name, members in parts.items()}
    return rows | {"train_prior": rows["train"]}


def by_fold(ids: Sequence[str], patient: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Rows of each split of a data set that came split, whose ids begin with their fold, such as 'train/0'.

    Where none is for validation, the images of 20 % of the training patients, (N,) one per row, are.
    `train_prior`, for the flow, is `train`. Raises ValueError for other ids, or too few patients for that."""
    fold_of_row = np.array([name.partition("/")[0] for name in ids])
    rows = {fold: np.flatnonzero(fold_of_row == fold) for fold in FOLDS}
    # Some row belongs to none of the three.
    if sum(map(len, rows.values())) < len(ids):
        raise ValueError(f"id {ids[0]!r}: names no fold; expected ids like 'train/0', as of PHiSeg's file, "
                         "of MMIS or of cases in folders train, val and test; use --split group")
    if not len(rows["val"]):
        unique = np.unique(patient[rows["train"]])
        if len(unique) < 2:
            raise ValueError(f"no images for validation, and {len(unique)} patients for training, of whom "
                             "none can be spared for it; put some into a folder val")
        chosen = np.random.RandomState(seed).permutation(unique)[:max(1, round(VALIDATED * len(unique)))]
        spared = np.isin(patient[rows["train"]], chosen)
        rows |= {"val": rows["train"][spared], "train": rows["train"][~spared]}
    return rows | {"train_prior": rows["train"]}


def fold_of(folder: str) -> str | None:
    """train, val or test of the name of a folder such as Training, validation_2d or test_set; else None."""
    # As in training_2d of MMIS.
    name = re.sub(r"[ _-](2d|set|data|images)$", "", folder.lower())
    return {"training": "train", "validation": "val", "valid": "val", "testing": "test"}.get(
        name, name if name in FOLDS else None)


def released(count: int) -> dict[str, np.ndarray]:
    """The authors' LIDC lists: training shuffled, validation and test the *unshuffled* 60-80 % and 80-100 %.

    For 15,096 slices 2,398 of the 3,020 test slices (79.4 %) are in the flow's training list."""
    # The authors' seed.
    shuffled = np.random.RandomState(42).permutation(count)
    first, second = int(0.6 * count), int(0.8 * count)
    if first == 0 or second == first or second == count:
        raise ValueError(f"{count} images: too few for the released split; expected at least 3")
    return {"train": shuffled[:first], "val": np.arange(first, second),
            "train_prior": shuffled[:second], "test": np.arange(second, count)}


def released_isic(style: np.ndarray) -> dict[str, np.ndarray]:
    """The authors' ISIC3 lists, from the style (N, k) of each image's masks.

    Every mask puts its image into the list of its style; the three lists, one after the other, are split like
    LIDC's. So an image occurs k times, and about 99 % of test images are in training under another mask."""
    # An image with two masks of a style is twice in that style's list.
    lists = [np.repeat(np.arange(len(style)), (style == number).sum(1)) for number in range(3)]
    rows = np.concatenate(lists)
    return {name: rows[entries] for name, entries in released(len(rows)).items()}


def overlap(train: np.ndarray, test: np.ndarray) -> tuple[int, int]:
    """How many distinct test images are also training images, and how many distinct test images there are."""
    distinct = np.unique(test)
    return int(np.isin(distinct, train).sum()), len(distinct)
