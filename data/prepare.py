"""Images of your own with several experts' masks, to one file that the scripts take: --what mine.h5

    python -m data.prepare FOLDER --output mine.h5
    python -m data.prepare FOLDER --output mine.h5 --image 'image*' --masks '*seg*' --label 1
    python -m data.prepare --check PATH

It says what it found, and draws four images with their outlines into mine.png. `data/cases.py` has the forms
of folders that it knows. Volumes are cut into slices. --check says the same of any data set.
"""

if not __package__:  # started by its path, it would not find the project
    raise SystemExit("error: start it from the project's folder, as `python -m data.prepare ...`")


import argparse
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import torch
from tqdm import tqdm

import fig
from data import cases, isic3, lidc, mmis, phiseg
from data.convert import files_in
from data.dataset import ExpertDataset
from data.images import Fit
from data.splits import FOLDS, VALIDATED
from data.store import Store, Writer, open_store
from data.volumes import AXES, axis_of
from fig.canvas import evenly_spaced
from metadata_manager import came_split
from metrics.overlap import dice_matrix

FACTOR = 8  # both networks halve an image's sides up to three times
LARGEST = 256  # pixels per side, unless --size says otherwise
PAPER_FILE = (15_096, 875)  # slices and CT series of the paper's LIDC
SHOWN = 4  # images in the picture


def prepare(folder: Path, output: Path, flags: argparse.Namespace) -> Store:
    """Write the cases below a folder into one file; returns the store that it is.

    Raises ValueError or OSError naming the file or the flag that is wrong; then nothing is written."""
    if output.suffix.lower() not in (".h5", ".hdf5"):
        raise ValueError(f"--output {output}: expected a name that ends in .h5")
    if output.exists() and not h5py.is_hdf5(output):  # an input, maybe
        raise ValueError(f"--output {output}: exists and is not an HDF5 file; name another")
    if folder.resolve() in output.resolve().parents:  # its picture would be an input of the next time
        raise ValueError(f"--output {output}: lies in {folder}, whose files are read; name a place outside")
    found = found_cases(folder, flags)
    side = flags.size or default_size(found, flags)
    if side % FACTOR or side < FACTOR:
        raise ValueError(f"--size {side}: expected a multiple of {FACTOR}, at least {FACTOR}")
    settings = json.dumps({"axis": flags.axis, "window": flags.window})
    with Writer(output, f"prepared from {folder.resolve()}", prepared=settings) as writer:
        append(writer, found, side, flags)
    print(f"{folder}: {len(found)} cases")
    return open_store(output)


def found_cases(folder: Path, flags: argparse.Namespace) -> list[cases.Case]:
    """The cases below a folder, with the patients that the flags say. Errors as `cases.find`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected one with images and masks in it")
    found = cases.find(folder, flags.image, flags.masks)
    if flags.patients is not None:
        found = cases.with_patients(found, flags.patients, flags.column)
    cases.refuse_divided(found)
    return found


def default_size(found: Sequence[cases.Case], flags: argparse.Namespace) -> int:
    """The largest side of all slices, rounded up to a multiple of FACTOR. Raises ValueError above LARGEST."""
    largest = 0
    for case in tqdm(found, desc="sizes", unit="case", disable=None):
        image, masks, _ = cases.read(case)
        largest = max(largest, *next(cases.slices(image, masks, flags.axis))[0].shape[:2])
    size = -(-largest // FACTOR) * FACTOR
    if size > LARGEST:
        raise ValueError(f"images of up to {largest} pixels per side; choose --size: {LARGEST} makes larger "
                         f"ones smaller, {size} keeps them")
    return size


def append(writer: Writer, found: Sequence[cases.Case], side: int, flags: argparse.Namespace) -> None:
    """Append every slice of the cases to a store, fitted into side x side pixels.

    Raises ValueError as `cases.read`, for labels among which no flag chooses, for another number of channels
    than before, and for an image that is also another patient's."""
    k, differ = max(len(case.masks) for case in found), len({len(case.masks) for case in found}) > 1
    seen: dict[bytes, cases.Case] = {}
    labels: set[int] = set()
    channels = None
    for case in tqdm(found, desc="cases", unit="case", disable=None):
        image, masks, own_labels = cases.read(case, flags.window, flags.label)
        labels |= own_labels
        if len(labels) > 1 and not flags.label:
            raise ValueError(f"{case.image.parent}: masks with the labels "
                             f"{', '.join(map(str, sorted(labels)))}; choose with --label, such as --label 1")
        twin = seen.setdefault(hashlib.sha256(image.tobytes()).digest(), case)
        if twin.patient != case.patient and np.ptp(image):
            raise ValueError(f"{case.image}: the same image as {twin.image}, of another patient; remove one, "
                             "or name patients with --patients")
        if image.shape[-1] != (channels := channels or image.shape[-1]):
            raise ValueError(f"{case.image}: {image.shape[-1]} channels, expected {channels} as in "
                             f"{found[0].image}")
        axis = axis_of(image.shape, flags.axis) if image.ndim == 4 else -1
        for z, (one, of_experts) in enumerate(cases.slices(image, masks, flags.axis)):
            fit = Fit(one.shape[0], one.shape[1], side)
            padded = np.zeros((k, side, side), bool)  # masks of experts who are not there are never shown
            padded[:len(masks)] = fit.put_masks(torch.from_numpy(of_experts))
            fields = {"experts": len(masks)} if differ else {}
            writer.append(fit.put_pixels(torch.from_numpy(one).movedim(-1, 0)), padded, patient=case.patient,
                          id=case.name if axis < 0 else f"{case.name}/{z:03d}", file=str(case.image),
                          slice=z, axis=axis, height=fit.height, width=fit.width, **fields)
    if not labels:
        raise ValueError(f"{found[0].image.parent} and all others: no mask marks anything"
                         f"{f' with --label {flags.label}' if flags.label else ''}; check the masks")


def opened(path: Path, flags: argparse.Namespace, folder: Path) -> tuple[str, Store]:
    """The form of a data set and its store, which is made in `folder`. Errors as of its reader."""
    made = folder / "checked.h5"
    if path.is_file() and h5py.is_hdf5(path) and not phiseg.is_phiseg(path):
        return "store", open_store(path)
    if path.is_file() and h5py.is_hdf5(path):
        form, files, convert = "file of PHiSeg", [path], phiseg.convert
    elif path.is_file() or files_in(path, ".pickle", ".pkl", ".pck", ".p"):
        form, files, convert = "LIDC pickles", lidc.files_of(path), lidc.convert
    elif (path / "Images").is_dir() and (path / "Segmentations").is_dir():
        form, files, convert = "ISIC3 folder", isic3.files_of(path), isic3.convert
    elif mmis.is_mmis(path):
        form, files, convert = "MMIS folder", mmis.files_of(path), mmis.convert
    else:
        return "folder of cases", prepare(path, made, flags)
    with Writer(made, f"checked from {path}") as writer:
        convert(files, writer)
    return form, open_store(made)


def summary(store: Store) -> str:
    """What a store holds: images, patients, sizes, experts, empty masks, agreement, and its fingerprint."""
    images = ExpertDataset(store, np.arange(len(store)))
    experts, empty, agreement = Counter[int](), [], []
    for index in range(len(images)):
        masks = images[index][1]
        k = len(masks)
        experts[k] += 1
        empty += (masks.sum((1, 2)) == 0).tolist()
        if k > 1 and masks.any():
            pairs = dice_matrix(masks[None].bool(), masks[None].bool())[0]
            agreement.append(float((pairs.sum() - k) / (k * (k - 1))))
    count, h, w, c = store.shape
    lines = [f"{count:,} images of {h} x {w}, {c} channel{'s' * (c > 1)}",
             f"{len(set(store.patient))} patients, such as {store.patient[0]}", split_of(store)]
    if "height" in store.fields:
        sizes = Counter(zip(store.fields["height"].tolist(), store.fields["width"].tolist())).most_common()
        lines.append("before they were fitted: " + ", ".join(f"{h} x {w} ({n})" for (h, w), n in sizes[:5])
                     + (f" and {len(sizes) - 5} other sizes" if len(sizes) > 5 else ""))
    lines.append("experts per image: " + ", ".join(f"{k} ({n:,} images)" for k, n in sorted(experts.items())))
    lines.append(f"masks that mark nothing: {np.mean(empty):.1%}; mean pairwise Dice of experts: "
                 + (f"{np.mean(agreement):.3f}, over {len(agreement):,} images that somebody marked"
                    if agreement else "-"))
    return "\n".join([*lines, f"fingerprint: {images.fingerprint}"])


def split_of(store: Store) -> str:
    """The split that the images came in, if any."""
    count = Counter(name.partition("/")[0] for name in store.ids)
    if not came_split(set(count)):
        few = len(set(store.patient)) < 3
        return "split: none came with them; --split group, by patient, " + (
            "needs 3 patients: if these are not the patients, name them with --patients" if few
            else "64 / 16 / 20 %")
    parts = ", ".join(f"{count[fold]:,} {fold}" for fold in FOLDS if fold in count)
    spared = "" if "val" in count else f"; of train, {VALIDATED:.0%} of the patients validate"
    return f"split: came as {parts}; --split file keeps it{spared}"


def like_the_paper(store: Store) -> str:
    """Whether a data set of LIDC's layout has the numbers of the paper's file."""
    series = len(set(store.fields.get("series", store.patient)))
    word = "series" if "series" in store.fields else "patients"
    same = (len(store), series) == PAPER_FILE
    return (f"the paper's LIDC has {PAPER_FILE[0]:,} slices of {PAPER_FILE[1]} series: "
            + ("the same numbers" if same else f"not these, {len(store):,} of {series} {word}"))


def picture(store: Store, path: Path) -> None:
    """Of four patients the image that experts marked most of, without and with their outlines."""
    images = ExpertDataset(store, np.flatnonzero(store.marked()))
    largest: dict = {}  # by patient: pixels marked, and the item
    for index, patient in enumerate(images.patients):
        pixels = float(images[index][1].mean(0).sum())
        largest[patient] = max(largest.get(patient, (0.0, index)), (pixels, index))
    chosen = [largest[patient][1] for patient in sorted(largest)]
    fig.save(fig.case_sheet([images[chosen[i]] for i in evenly_spaced(len(chosen), SHOWN)]), path)


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, and ends with a message for what a user can put right."""
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="of cases: an image with its masks each")
    parser.add_argument("--output", type=Path, help="the .h5 file to write, for --what")
    parser.add_argument("--check", type=Path, metavar="PATH", help="only say what data of any form hold")
    parser.add_argument("--image", help="pattern of images' names (default: image*, or like their folder)")
    parser.add_argument("--masks", help="pattern of the masks' names (default: all that are no image)")
    parser.add_argument("--label", type=int, nargs="+", default=[],
                        help="values that count as marked, where masks have several (default: any but 0)")
    parser.add_argument("--patients", type=Path, help="CSV file with the case in its first column and the "
                                                      "patient in another (default: by folder)")
    parser.add_argument("--column", default="patient", help="of that file, the patient's")
    parser.add_argument("--axis", choices=("fewest", *AXES), default="fewest",
                        help="of volumes, to cut across: the one with the fewest slices, or one by name")
    parser.add_argument("--size", type=int, help="pixels per side: larger images become smaller, in their "
                                                 "proportions, and all are padded with zeros (default: the "
                                                 "largest side)")
    parser.add_argument("--window", type=float, nargs=2, default=[], metavar=("LOW", "HIGH"),
                        help="intensities that become 0 and 1 (default: of each image or volume its minimum "
                             "and maximum; 8 bits: 0 and 255)")
    flags = parser.parse_args(argv)
    if (flags.check is None) == (flags.folder is None) or (flags.folder is None) != (flags.output is None):
        parser.error("expected FOLDER and --output, or --check PATH alone")
    try:
        if flags.check is not None:
            if not flags.check.exists():
                raise FileNotFoundError(f"--check {flags.check}: no such file or folder")
            with tempfile.TemporaryDirectory() as folder:
                form, store = opened(flags.check, flags, Path(folder))
                print(f"{flags.check}: {form}\n{summary(store)}")
                if (store.annotators, store.shape[1:]) == (4, (128, 128, 1)):
                    print(like_the_paper(store))
            return
        store = prepare(flags.folder, flags.output, flags)
        picture(store, flags.output.with_suffix(".png"))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{summary(store)}\n{flags.output} and {flags.output.with_suffix('.png')}: next, "
          f"python train_GTR.py --what {flags.output}")


if __name__ == "__main__":
    main()
