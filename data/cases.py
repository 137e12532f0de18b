"""Cases: a folder with one image and k numbered masks for each, of QUBIQ, CURVAS, REFUGE and many others.

<case>/image.nii.gz, <case>/task01_seg01.nii.gz, ...       a folder per case
<case>/<case>.jpg, <case>/<case>_seg_cup_1.png, ...        the image is called like its folder
images/<patient>/<name>_c0.png, gt/<patient>/<name>_l0.png  images and masks in folders of their own
<name>.png, <name>_1.png, <name>_2.png                     all in one folder

Files are told apart by patterns as in a shell: of a name or of a folder's name, and with a / of the whole
path. Where a folder has several images, a mask's name begins with its image's.
"""

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import takewhile
from pathlib import Path

import numpy as np

from data.convert import files_in
from data.splits import FOLDS, fold_of
from data.volumes import (
    axis_of,
    check_same_place,
    labels_of,
    read_scan,
    stem_of,
    suffix_of,
    unit_range,
    with_channels,
)

IMAGE = "image*"
CONTAINERS = ("image", "images*")  # folders of images, which name no patient


@dataclass(frozen=True)
class Case:
    """An image with its experts' masks. name: unique, and begins with its fold if all cases came split."""

    name: str
    patient: str
    image: Path
    masks: tuple[Path, ...]


def find(folder: Path, image: str | None = None, masks: str | None = None) -> list[Case]:
    """The cases below a folder by name, each with its patient, see `_patients`, and its fold, see `_split`.

    image, masks: patterns. Without: images are called image* or like their folder, masks are all other files.
    Raises ValueError for an image without masks, a mask without an image, and masks that are of several kinds
    and no pattern chooses among them."""
    files = [path for path in files_in(folder, deep=True) if suffix_of(path)]
    images = _named(files, folder, image or IMAGE)
    if image is None and not images:
        images = [path for path in files if stem_of(path) == path.parent.name]
    if not images:
        raise ValueError(f"{folder}: {len(files)} image files, none of them called {image or IMAGE}"
                         f"{'' if image else ' or like its folder'}; name them with --image, such as "
                         "--image '*_image.png'")
    chosen = set(images)
    others = [path for path in files if path not in chosen]
    masks_of = _by_image(images, _named(others, folder, masks) if masks else others, folder)
    if masks is None:
        for path, own in masks_of.items():
            _refuse_several_kinds(path, own)
    count = Counter(path.parent for path in images)
    patients = _patients(folder, images, count, image or IMAGE)
    cases = []
    for path, of_image in masks_of.items():
        place = path.parent.relative_to(folder)
        name = place / stem_of(path) if count[path.parent] > 1 or place == Path() else place
        of_image = sorted(of_image, key=lambda mask: _natural(mask.name))
        cases.append(Case(name.as_posix(), patients[path], path, tuple(of_image)))
    return _split(folder, cases)


def _patients(folder: Path, images: Sequence[Path], count: Counter[Path], pattern: str) -> dict[Path, str]:
    """The patient of each image: the first of its folders that may name one, see `_names`.

    Below a fold's folder it is the first after all above: brain/train/c1 is of patient brain/c1. Folders that
    all images share are left out. Where none is left, it is the folder that holds this image alone, else the
    image. A patient who is only a number is another one in each fold. count: images in each folder."""
    places = {path: path.parent.relative_to(folder).parts for path in images}
    folds = {path: _fold_at(parts) or 0 for path, parts in places.items()}
    containers = {path: CONTAINERS if fnmatch(path.name.lower(), pattern.lower()) else (*CONTAINERS, pattern)
                  for path in images}  # a pattern that no image is called by is of folders
    above = {path: _names(parts[:folds[path]], containers[path]) for path, parts in places.items()}
    names = {path: above[path] + _names(parts[folds[path]:], containers[path])
             for path, parts in places.items()}
    shared = len(list(takewhile(lambda column: len(set(column)) == 1, zip(*names.values()))))
    found: dict[Path, str] = {}
    for path, parts in places.items():
        patient = "/".join(names[path][shared:max(shared, len(above[path])) + 1])
        if not patient and count[path.parent] == 1 and parts and (
                fold_of(parts[-1]) is None or fnmatch(stem_of(path).lower(), IMAGE)):
            patient = parts[-1]
        patient = patient or stem_of(path)
        fold = _fold_in(parts)
        found[path] = f"{fold}/{patient}" if fold and patient.isdecimal() else patient
    return found


def _names(parts: Sequence[str], containers: Sequence[str]) -> list[str]:
    """Of folders those that may name a patient: not a fold's, and none of patterns."""
    return [part for part in parts
            if not fold_of(part) and not any(fnmatch(part.lower(), one.lower()) for one in containers)]


def _fold_at(parts: Sequence[str]) -> int | None:
    """The place of the first of some folders that is called after a fold."""
    return next((number for number, part in enumerate(parts) if fold_of(part)), None)


def _fold_in(parts: Sequence[str]) -> str:
    """The fold that the first of some folders is called after, or ""."""
    return next(filter(None, map(fold_of, parts)), "")


def _named(files: Sequence[Path], folder: Path, pattern: str) -> list[Path]:
    """The files that are called so; if none is, those in folders that are."""
    pattern = pattern.lower()
    below = {path: path.relative_to(folder) for path in files}
    if "/" in pattern:
        return [path for path in files if fnmatch(below[path].as_posix().lower(), pattern)]
    return ([path for path in files if fnmatch(path.name.lower(), pattern)]
            or [path for path in files
                if any(fnmatch(part.lower(), pattern) for part in below[path].parts[:-1])])


def _words(path: Path) -> list[str]:
    return re.findall(r"[^\W_]+", stem_of(path))


def _natural(name: str) -> list:
    """Sorts seg2 before seg10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _by_image(images: Sequence[Path], masks: Sequence[Path], folder: Path) -> dict[Path, list[Path]]:
    """The masks of each image: of its folder or, if none has both, of one that differs in one name."""
    places = {path.parent for path in images}
    together = any(mask.parent in places for mask in masks)
    in_place: dict[tuple, list[Path]] = defaultdict(list)
    for image in images:
        for key in _keys(image.parent.relative_to(folder).parts, together):
            in_place[key].append(image)
    last = {tuple(_words(image)[-1:]) for image in images}
    tag = len(images) > 1 and len(last) == 1  # such as c0, which masks have not
    found: dict[Path, list[Path]] = {image: [] for image in images}
    for mask in masks:
        keys = _keys(mask.parent.relative_to(folder).parts, together)
        near = list(dict.fromkeys(image for key in keys for image in in_place[key]))
        inside = len(near) == 1 and near[0].parent in (mask.parent, mask.parent.parent)
        owners = near if inside else _called(mask, near, tag)
        if len(owners) != 1:
            raise ValueError(f"{mask}: a mask of {'several images' if owners else 'no image'}; expected the "
                             "one in its folder, or one whose name its own begins with. Choose with --image "
                             "and --masks, such as --masks '*seg*'")
        found[owners[0]].append(mask)
    for image, own in found.items():
        if not own:
            raise ValueError(f"{image}: an image without masks; add them, move it away, or choose with "
                             "--image and --masks, such as --masks '*seg*'")
    return found


def _keys(parts: tuple[str, ...], together: bool) -> list[tuple]:
    """What two folders have in common that belong together: all their names, or all but one and its place."""
    if together:
        return [parts]
    return [(number, *parts[:number], *parts[number + 1:]) for number in range(len(parts) + 1)]


def _called(mask: Path, images: Sequence[Path], tag: bool) -> list[Path]:
    """The images of the longest name with which the mask's begins; tag: or of that less its last word."""
    words = _words(mask)
    for end in (None, -1) if tag else (None,):
        names = {image: _words(image)[:end] for image in images}
        fitting = [image for image, name in names.items() if words[:len(name)] == name]
        if fitting:
            longest = max(len(names[image]) for image in fitting)
            return [image for image in fitting if len(names[image]) == longest]
    return []


def _refuse_several_kinds(image: Path, masks: Sequence[Path]) -> None:
    """Raises ValueError if names of an image's masks differ in more than their last number."""
    kinds = {re.sub(r"\d+(?=\D*$)", "#", stem_of(mask)): mask for mask in masks}
    if len(kinds) > 1:
        names = ", ".join(sorted(path.name for path in kinds.values())[:4])
        raise ValueError(f"{image.parent}: masks of several kinds, {names}; choose with --masks, such as "
                         "--masks '*seg*', or --masks '*' for all")


def _split(folder: Path, cases: list[Case]) -> list[Case]:
    """The cases by name, beginning with their fold if all lie in folders such as train and test.

    Of training and validation alone, validation is what is tested on."""
    places = [case.image.parent.relative_to(folder).parts for case in cases]
    folds = [_fold_in(parts) for parts in places]
    if all(folds) and len(set(folds)) > 1 and "train" in folds:
        tested = {} if "test" in folds else {"val": "test"}
        cases = [replace(case, name="/".join([tested.get(fold, fold),
                                              *(_without_fold(case.name) or [stem_of(case.image)])]))
                 for case, fold in zip(cases, folds)]
    names: dict[str, Path] = {}
    for case in cases:
        if case.name in names:
            raise ValueError(f"{case.image}: case {case.name} is also {names[case.name]}; rename one")
        names[case.name] = case.image
    return sorted(cases, key=lambda case: _natural(case.name))


def _without_fold(name: str) -> list[str]:
    """The parts of a case's name but the first that names a fold."""
    parts = name.split("/")
    del parts[_fold_at(parts) or 0]
    return parts


def with_patients(cases: Sequence[Case], table: Path, column: str = "patient") -> list[Case]:
    """The cases with the patients of a CSV file, whose first column has the cases' names.

    Raises ValueError, naming the file, for a column or a case that is not there."""
    with open(table, newline="", encoding="utf-8-sig") as file:
        header, *rows = [row for row in csv.reader(file) if row] or [[]]
    if column not in header[1:]:
        raise ValueError(f"--patients {table}: columns {', '.join(header)}; expected the case in the first "
                         f"and another '{column}', see --column")
    patients = {row[0]: row[header.index(column)] for row in rows if len(row) == len(header)}
    missing = [case.name for case in cases if not patients.get(case.name)]
    if missing:
        raise ValueError(f"--patients {table}: no patient of {len(missing)} of {len(cases)} cases, such as "
                         f"{missing[0]}")
    return [replace(case, patient=patients[case.name]) for case in cases]


def refuse_divided(cases: Sequence[Case]) -> None:
    """Raises ValueError if a patient is in two of the folds that the cases came in."""
    fold_of_patient: dict[str, str] = {}
    for case in cases:
        fold = case.name.partition("/")[0]
        if fold in FOLDS and fold_of_patient.setdefault(case.patient, fold) != fold:
            raise ValueError(f"{case.image}: patient {case.patient} is in {fold} and in "
                             f"{fold_of_patient[case.patient]}; put all of a patient into one, or name "
                             "patients with --patients")


def read(case: Case, window: Sequence[float] = (), labels: Sequence[int] = ()
         ) -> tuple[np.ndarray, np.ndarray, set[int]]:
    """Image (h, w, c) or (z, h, w, c) float in [0, 1], masks (k, ...) bool, and the labels that are marked.

    labels: which count as marked; without, whatever is not 0. Raises ValueError naming the file whose size or
    place in the scanner is not the others', or that cannot be read."""
    scans = [read_scan(path, mask=True) for path in case.masks]
    image = read_scan(case.image)
    shape = scans[0].values.shape
    values = with_channels(image, shape)
    for scan in scans:
        if scan.values.shape != shape or scan.values.ndim > 3:
            raise ValueError(f"{scan.path}: a mask of {scan.values.shape}, expected {shape} as "
                             f"{scans[0].path}, and 2 or 3 dimensions")
    check_same_place([image, *scans])
    found = np.stack([labels_of(scan) for scan in scans])
    masks = np.isin(found, labels) if labels else found != 0
    return unit_range(values, window), masks, set(np.unique(found[masks]).tolist())


def slices(image: np.ndarray, masks: np.ndarray, axis: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each slice's image (h, w, c) and masks (k, h, w) across an axis, see `axis_of`; 2-D ones themselves."""
    if image.ndim == 3:
        image, masks, number = image[None], masks[:, None], 0
    else:
        number = axis_of(image.shape, axis)
    for z in range(image.shape[number]):
        yield image.take(z, number), masks.take(z, number + 1)
