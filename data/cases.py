"""Cases: a folder with one image and k numbered masks for each, of QUBIQ, CURVAS, REFUGE and many others.

<case>/image.nii.gz, <case>/task01_seg01.nii.gz, ...       a folder per case
<case>/<case>.jpg, <case>/<case>_seg_cup_1.png, ...        the image is called like its folder
images/<patient>/<name>_c0.png, gt/<patient>/<name>_l0.png  images and masks in separate folders
<name>.png, <name>_1.png, <name>_2.png                     all in one folder

Patterns as in a shell say which files are images and which are masks. They are of the name of a file
or folder or, with a /, of the whole path. Where a folder has several images, a mask's name begins with that
of its image.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import takewhile
from pathlib import Path

import numpy as np

from data.convert import files_in
from data.splits import fold_of
from data.store import nfc
from data.volumes import (
    AXES,
    axis_of,
    check_same_place,
    labels_of,
    limits_of,
    read_scan,
    rescaled,
    stem_of,
    suffix_of,
    with_channels,
)

IMAGE = "image*"
CONTAINERS = ("image", "images*")  # folders of images, which name no patient
# Forms of images and masks that other programs write and `data.volumes` does not read.
UNREAD = (".nrrd", ".mha", ".mhd", ".mgz", ".mgh", ".img", ".gipl", ".npz", ".mat", ".gif", ".webp", ".jp2",
          ".svg", ".h5", ".hdf5")


@dataclass(frozen=True)
class Case:
    """An image with its experts' masks. name: begins with its fold if all cases came split."""

    name: str
    patient: str
    image: Path
    masks: tuple[Path, ...]


def find(folder: Path, image: str | None = None, masks: str | None = None) -> list[Case]:
    """The cases below a folder by name, each with its patient, see `_patients`, and its fold, see `_split`.

    image, masks: patterns. Without: images are called image* or like their folder, masks are all other files.
    Raises ValueError for an image without masks, a mask without an image, and masks of several kinds among
    which no pattern chooses."""
    everything = files_in(folder, deep=True)
    files = [path for path in everything if suffix_of(path)]
    images = _matching(files, folder, image or IMAGE)
    # As REFUGE has it: <case>/<case>.jpg.
    if image is None and not images:
        images = [path for path in files if stem_of(path) == nfc(path.parent.name)]
    if not images:
        raise ValueError(f"{folder}: {len(files)} image files, none of them called {image or IMAGE}"
                         f"{'' if image else ' or like its folder'}; name them with --image, such as "
                         "--image '*_image.png'")
    others = sorted(set(files) - set(images))
    unread = [path for path in everything if not suffix_of(path) and path.suffix.lower() in UNREAD]
    if unread:
        print(f"warning: {len(unread)} files are passed over, in a form that is not read, such as "
              f"{unread[0]}; if they are masks, convert them to NIfTI or NumPy", flush=True)
    masks_of = _masks_by_image(images, _matching(others, folder, masks) if masks else others, folder)
    for path, its_masks in masks_of.items():
        # The last number counts experts. What else differs is another task or structure.
        kinds = {re.sub(r"\d+(?=\D*$)", "#", stem_of(mask)): mask.name for mask in its_masks}
        if masks is None and len(kinds) > 1:  # names that differ in more than their last number
            names = ", ".join(sorted(kinds.values())[:4])
            raise ValueError(f"{path.parent}: masks of several kinds, {names}; choose with --masks, such as "
                             "--masks '*seg*', or --masks '*' for all")
    count = Counter(path.parent for path in images)
    patients = _patients(folder, images, image or IMAGE)
    cases = []
    for path, its_masks in masks_of.items():
        place = path.parent.relative_to(folder)
        # A folder with one image names the case; otherwise the image's name is needed.
        name = place / stem_of(path) if count[path.parent] > 1 or place == Path() else place
        # By number, so that mask i is of the same expert in each case.
        its_masks = sorted(its_masks, key=lambda mask: _natural_key(mask.name))
        cases.append(Case(nfc(name.as_posix()), patients[path], path, tuple(its_masks)))
    return _split(folder, cases)


def _matching(files: Sequence[Path], folder: Path, pattern: str) -> list[Path]:
    """The files whose name fits a pattern; if none does, those in a folder whose name does."""
    pattern = nfc(pattern).lower()
    if "/" in pattern:
        return [path for path in files
                if fnmatch(nfc(path.relative_to(folder).as_posix()).lower(), pattern)]
    # Folders count only where no file is called so: a pattern such as images* may mean either.
    return ([path for path in files if fnmatch(nfc(path.name).lower(), pattern)]
            or [path for path in files
                if any(fnmatch(part.lower(), pattern) for part in _folders(path, folder))])


def _folders(path: Path, folder: Path) -> tuple[str, ...]:
    """Names of the folders between `folder` and a file, in one Unicode form."""
    return tuple(map(nfc, path.parent.relative_to(folder).parts))


def _words(path: Path) -> list[str]:
    return re.findall(r"[^\W_]+", stem_of(path))


def _natural_key(name: str) -> list:
    """A key that sorts seg2 before seg10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _masks_by_image(images: Sequence[Path], masks: Sequence[Path], folder: Path) -> dict[Path, list[Path]]:
    """The masks of each image: of its folder or, if none has both, of one that differs in a single name."""
    places = {path.parent for path in images}
    together = any(mask.parent in places for mask in masks)
    in_place: dict[tuple, list[Path]] = defaultdict(list)
    for image in images:
        for key in _keys(_folders(image, folder), together):
            in_place[key].append(image)
    # Where all images end in the same word, such as c0, the masks' names need not have it.
    common_ending = len(images) > 1 and len({tuple(_words(image)[-1:]) for image in images}) == 1
    masks_of: dict[Path, list[Path]] = {image: [] for image in images}
    for mask in masks:
        keys = _keys(_folders(mask, folder), together)
        candidates = list(dict.fromkeys(image for key in keys for image in in_place[key]))
        # Where only one image is near, its masks may have any names, such as seg1.png.
        inside = len(candidates) == 1 and candidates[0].parent in (mask.parent, mask.parent.parent)
        owners = candidates if inside else _images_by_name(mask, candidates, common_ending)
        if len(owners) != 1:
            raise ValueError(f"{mask}: a mask of {'several images' if owners else 'no image'}; expected the "
                             "one in its folder, or one whose name its own begins with. Choose with --image "
                             "and --masks, such as --masks '*seg*'")
        masks_of[owners[0]].append(mask)
    for image, its_masks in masks_of.items():
        if not its_masks:
            raise ValueError(f"{image}: an image without masks; add them, move it away, or choose with "
                             "--image and --masks, such as --masks '*seg*'")
    return masks_of


def _keys(parts: tuple[str, ...], together: bool) -> list[tuple]:
    """Keys of a folder; folders with a key in common belong together, as they differ in one name or none."""
    if together:
        return [parts]
    # One name may differ, as images and gt do, if it is at the same depth and all others are equal.
    return [(number, *parts[:number], *parts[number + 1:]) for number in range(len(parts) + 1)]


def _images_by_name(mask: Path, images: Sequence[Path], common_ending: bool) -> list[Path]:
    """The images with the longest name with which the mask's begins; common_ending: without its last word.

    Names are compared as they are, then word by word: 1.2.3_4 is the fourth mask of 1.2.3, not of 1.2.3.4."""
    stem, words = stem_of(mask), _words(mask)
    lengths = {image: len(stem_of(image)) for image in images
               if re.match(rf"{re.escape(stem_of(image))}([\W_]|$)", stem)}
    # Whole names first. Only if none fits, the word in which all images end is left out.
    for end in (None, -1) if common_ending else (None,):
        if not lengths:
            names = {image: _words(image)[:end] for image in images}
            lengths = {image: len(name) for image, name in names.items() if words[:len(name)] == name}
    return [image for image, length in lengths.items() if length == max(lengths.values())]


def _patients(folder: Path, images: Sequence[Path], pattern: str) -> dict[Path, str]:
    """The patient of each image: the first of its folders that may name one and differs between images.

    Folders called after a fold, or like a container of images, name none. Below a fold's folder it is the
    first after all above: brain/train/c1 is of patient brain/c1. Where no folder is left, it is the folder
    that holds only this image, else the image."""
    pattern = nfc(pattern).lower()  # as in `_matching`
    names: dict[Path, list[str]] = {}
    above: dict[Path, int] = {}  # how many of the names are of folders above the fold's
    for path in images:
        parts = _folders(path, folder)
        # A pattern that no image is called by is of folders.
        containers = (*CONTAINERS, *[pattern] * (not fnmatch(nfc(path.name).lower(), pattern)))
        naming = [not fold_of(part) and not any(fnmatch(part.lower(), name.lower()) for name in containers)
                  for part in parts]
        names[path] = [part for part, may_name in zip(parts, naming) if may_name]
        above[path] = sum(naming[:_fold_at(parts) or 0])
    common = len(list(takewhile(lambda column: len(set(column)) == 1, zip(*names.values()))))
    count = Counter(path.parent for path in images)
    patients: dict[Path, str] = {}
    for path in images:
        parts = _folders(path, folder)
        patient = "/".join(names[path][common:max(common, above[path]) + 1])
        if not patient and count[path.parent] == 1 and parts and (
                fold_of(parts[-1]) is None or fnmatch(stem_of(path).lower(), IMAGE)):
            patient = parts[-1]
        patient = patient or stem_of(path)
        # A patient who is only a number is another one in each fold.
        fold = _fold_in(parts)
        patients[path] = f"{fold}/{patient}" if fold and patient.isdecimal() else patient
    return patients


def _fold_at(parts: Sequence[str]) -> int | None:
    """The place of the first of some folders that is called after a fold."""
    return next((number for number, part in enumerate(parts) if fold_of(part)), None)


def _fold_in(parts: Sequence[str]) -> str:
    """The fold that the first of some folders is called after, or ""."""
    return next(filter(None, map(fold_of, parts)), "")


def _split(folder: Path, cases: list[Case]) -> list[Case]:
    """The cases by name, beginning with their fold if all lie in folders such as train and test.

    Without images for testing, those for validation are tested on."""
    folds = [_fold_in(_folders(case.image, folder)) for case in cases]
    if all(folds) and len(set(folds)) > 1 and "train" in folds:
        renamed = {} if "test" in folds else {"val": "test"}
        for number, (case, fold) in enumerate(zip(cases, folds)):
            parts = case.name.split("/")
            del parts[_fold_at(parts) or 0]
            name = "/".join([renamed.get(fold, fold), *(parts or [stem_of(case.image)])])
            cases[number] = replace(case, name=name)
    return sorted(cases, key=lambda case: _natural_key(case.name))


def common_axis(shapes: dict[str, tuple[int, ...]], axis: str) -> str:
    """The name of the axis to cut all volumes across: `axis`, or that of the fewest slices in most.

    shapes: name of each case -> (h, w) or (z, h, w). Prints the name of a case that has fewer slices along
    another, as a long scan may have more slices than rows."""
    volumes = {name: shape for name, shape in shapes.items() if len(shape) == 3}
    if axis != "fewest" or not volumes:
        return axis
    # The same axis for all: slices across different axes look like different data.
    chosen = int(np.bincount([axis_of(shape, axis) for shape in volumes.values()]).argmax())
    name_of = {number: letter for letter, number in AXES.items()}
    others = [name for name, shape in volumes.items() if shape[chosen] > min(shape)]
    if others:
        print(f"warning: all volumes are cut across axis {name_of[chosen]}, which has the fewest slices in "
              f"most; {len(others)} have fewer across another, such as {others[0]} {volumes[others[0]]} "
              "(z, y, x); choose with --axis", flush=True)
    return name_of[chosen]


def read(case: Case, labels: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray, set[int]]:
    """Image (h, w, c) or (z, h, w, c) as in its file, masks (k, ...) bool, and the labels that are marked.

    labels: the values that count as marked; without, all but 0. One mask file is in memory at a time.
    Raises ValueError naming a file that cannot be read, or whose size or place in the scanner is not that of
    the others."""
    image = read_scan(case.image)
    placed = replace(image, values=np.empty(0))  # the first file that says where its voxels are
    marked: set[int] = set()
    for number, path in enumerate(case.masks):
        scan = read_scan(path, mask=True)
        # The image comes second, as only its shape may include channels.
        if number == 0:
            shape = scan.values.shape
            values, masks = with_channels(image, shape), np.zeros((len(case.masks), *shape), bool)
        if scan.values.shape != shape or len(shape) > 3:
            raise ValueError(f"{path}: a mask of {scan.values.shape}, expected {shape} as "
                             f"{case.masks[0]}, and 2 or 3 dimensions")
        check_same_place([placed, scan])
        # A PNG or NumPy file does not say where it lies: the first file that does is the reference.
        if placed.affine is None:
            placed = replace(scan, values=np.empty(0))
        its_labels = labels_of(scan)
        masks[number] = np.isin(its_labels, labels) if labels else its_labels != 0
        marked |= set(np.unique(its_labels[masks[number]]).tolist())
    return values, masks, marked


def slices(values: np.ndarray, masks: np.ndarray, axis: str, window: Sequence[float] = ()
           ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each slice's image (h, w, c) float64 in [0, 1] and masks (k, h, w) across an axis; 2-D ones themselves.

    values, masks: as of `read`. Intensities are scaled by `limits_of` the whole volume, a slice at a time."""
    limits = limits_of(values, window)
    if values.ndim == 3:
        # A 2-D image is a volume of one slice.
        values, masks, number = values[None], masks[:, None], 0
    else:
        number = axis_of(values.shape, axis)
    for z in range(values.shape[number]):
        yield rescaled(values.take(z, number), *limits), masks.take(z, number + 1)
