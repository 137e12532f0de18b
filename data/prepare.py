"""Images of your own with several experts' masks, to one file that the scripts take: --what mine.h5

    python -m data.prepare FOLDER --output mine.h5
    python -m data.prepare FOLDER --output mine.h5 --image 'image*' --masks '*seg*' --label 1
    python -m data.prepare --check PATH

It prints what they hold, and draws four images with their outlines into mine.png. `data/cases.py` has the
forms of folders that it knows. Volumes are cut into slices. --check prints the same of any data set.
"""

if not __package__:  # started by its path, it would not find the project
    raise SystemExit("error: start it from the project's folder, as `python -m data.prepare ...`")


import argparse
import hashlib
import json
import shlex
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import fig
from data import cases, patients
from data.dataset import ExpertDataset
from data.images import Fit
from data.readers import reader_of
from data.splits import FOLDS, VALIDATED
from data.store import BLOCK, SUFFIXES, Store, open_store
from data.volumes import AXES, axis_of, limits_of, read_scan
from data.writer import Writer, refuse_foreign
from fig.canvas import evenly_spaced
from metrics.overlap import dice_matrix
from metrics.program import one_line_errors, path
from models.flags import came_split

FACTOR = 8  # both networks halve an image's sides up to three times
LARGEST = 256  # pixels per side, unless --size says otherwise
SCRIPTS = ("train_GTR.py", "train_prior_LIDC.py", "test_prior_LIDC.py")  # what comes next
MEMORY = "smaller volumes, or fewer experts: one case is in memory at a time"
PAPER_FILE = (15_096, 875)  # slices and CT series of the paper's LIDC
SHOWN = 4  # images in the picture


def prepare(folder: Path, output: Path, flags: argparse.Namespace) -> Store:
    """Write the cases below a folder into one file; returns the store that it is.

    Raises ValueError or OSError naming the file or the flag that is wrong; then nothing is written."""
    if flags.size is not None and flags.size not in range(FACTOR, 2048 + 1, FACTOR):
        raise ValueError(f"--size {flags.size}: expected a multiple of {FACTOR}, {FACTOR} to 2048")
    limits_of(np.zeros(1), flags.window)  # raises if it does not ascend
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected one with images and masks in it")
    all_cases = cases.find(folder, flags.image, flags.masks)
    if flags.patients is not None:
        all_cases = patients.with_patients(all_cases, flags.patients, flags.column)
    # A patient in two folds would be trained and tested on.
    patients.refuse_divided(all_cases)
    # Only the command that made a file replaces it: it is known by these words.
    names = ("image", "masks", "label", "patients", "column", "axis", "size", "window")
    given = [f"--{name} {getattr(flags, name)}" for name in names if getattr(flags, name)]
    origin = f"prepared from {folder.resolve()} with {' '.join(given)}"
    check_output(folder, output, origin)
    # All sizes are read first, as axis and side are the same for all cases.
    shapes = {case.name: read_scan(case.masks[0], mask=True).values.shape
              for case in tqdm(all_cases, desc="sizes", unit="case", disable=None)}
    axis = cases.common_axis(shapes, flags.axis)
    side = flags.size or default_size(shapes, axis)
    with Writer(output, origin, prepared=json.dumps({"axis": axis, "window": flags.window})) as writer:
        append(writer, all_cases, side, axis, flags)
    print(f"{folder}: {len(all_cases)} cases")
    return open_store(output)


def check_output(folder: Path, output: Path, origin: str) -> None:
    """Raises ValueError for an output that is no .h5, lies among the inputs, or is a file not made by this.

    A picture of the same name may be replaced only if the .h5 file is beside it."""
    if output.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--output {output}: expected a name that ends in .h5")
    if folder.resolve() in output.resolve().parents:  # its picture would be an input of the next time
        raise ValueError(f"--output {output}: lies in {folder}, whose files are read; name a place outside")
    refuse_foreign(output, origin)
    picture = output.with_suffix(".png")
    if picture.exists() and not output.exists():
        raise ValueError(f"--output {output}: its picture would replace {picture}, which was not made by "
                         "this program; name another file, or move that one away")


def default_size(shapes: dict[str, tuple[int, ...]], axis: str) -> int:
    """The largest side of all slices, rounded up to a multiple of FACTOR. Raises ValueError above LARGEST."""
    # Of a volume only the sides of its slices count, not how many slices there are.
    largest = max(int(np.max(np.delete(shape, axis_of(shape, axis)) if len(shape) == 3 else shape))
                  for shape in shapes.values())
    size = -(-largest // FACTOR) * FACTOR
    if size > LARGEST:
        raise ValueError(f"images of up to {largest} pixels per side; choose --size: {LARGEST} makes larger "
                         f"ones smaller, {size} keeps them")
    return size


def append(writer: Writer, all_cases: Sequence[cases.Case], side: int, axis: str, flags: argparse.Namespace
           ) -> None:
    """Append every slice of the cases to a store, fitted into side x side pixels; one case is in memory.

    Raises ValueError as `cases.read`, for labels among which no flag chooses, for another number of channels
    than before, and for an image that is also another patient's."""
    counts = {len(case.masks) for case in all_cases}
    k = max(counts)
    first_with: dict[bytes, cases.Case] = {}  # by the image's content
    labels: set[int] = set()
    channels = None
    for case in tqdm(all_cases, desc="cases", unit="case", disable=None):
        values, masks, its_labels = cases.read(case, flags.label)
        labels |= its_labels
        # Of all cases so far, as a file may have only some of the labels.
        if len(labels) > 1 and not flags.label:
            several = ", ".join(map(str, sorted(labels)[:10]))
            raise ValueError(f"{case.image.parent}: masks with the labels {several}; choose with --label, "
                             f"such as --label {max(labels)}")
        if values.shape[-1] != (channels := channels or values.shape[-1]):
            raise ValueError(f"{case.image}: {values.shape[-1]} channels, expected {channels} as in "
                             f"{all_cases[0].image}")
        number = axis_of(values.shape, axis) if values.ndim == 4 else -1
        # Of the whole case: the same image under two patients could be in training and in testing.
        content = hashlib.sha256()
        for z, (image, slice_masks) in enumerate(cases.slices(values, masks, axis, flags.window)):
            content.update(image.tobytes())
            fit = Fit(image.shape[0], image.shape[1], side)
            padded = np.zeros((k, side, side), bool)  # beyond len(masks): never shown
            padded[:len(masks)] = fit.put_masks(torch.from_numpy(slice_masks))
            # Left out where all cases have k masks, as they have in a store without this field.
            fields = {"experts": len(masks)} if len(counts) > 1 else {}
            writer.append(fit.put_pixels(torch.from_numpy(image).movedim(-1, 0)), padded,
                          patient=case.patient, id=case.name if number < 0 else f"{case.name}/{z:03d}",
                          file=str(case.image), slice=z, axis=number, height=fit.height, width=fit.width,
                          **fields)
        twin = first_with.setdefault(content.digest(), case)
        if twin.patient != case.patient and np.ptp(values):  # many images may be black
            raise ValueError(f"{case.image}: the same image as {twin.image}, of another patient; remove one, "
                             "or name patients with --patients")
    if not labels:
        raise ValueError(f"{all_cases[0].image.parent} and all others: no mask marks anything"
                         f"{f' with --label {flags.label}' if flags.label else ''}; check the masks")


def summary(store: Store) -> str:
    """What a store holds, in lines: images, patients, sizes, experts, empty masks, Dice, fingerprint."""
    experts, empty, dice = Counter[int](), [], []
    for masks in masks_of_rows(store):
        k = len(masks)
        experts[k] += 1
        empty += (masks.sum((1, 2)) == 0).tolist()
        # Two empty masks match: images that nobody marked would raise the mean.
        if k > 1 and masks.any():
            pairs = dice_matrix(masks[None].bool(), masks[None].bool())[0]
            # Without the k pairs of a mask with itself, whose Dice is 1.
            dice.append(float((pairs.sum() - k) / (k * (k - 1))))
    count, h, w, c = store.shape
    lines = [f"{count:,} images of {h} x {w}, {c} channel{'s' * (c > 1)}",
             f"{len(set(store.patient))} patients, such as {store.patient[0]}", split_of(store)]
    if "height" in store.fields:
        sizes = Counter(zip(store.fields["height"].tolist(), store.fields["width"].tolist())).most_common()
        lines.append("before they were fitted: " + ", ".join(f"{h} x {w} ({n})" for (h, w), n in sizes[:5])
                     + (f" and {len(sizes) - 5} other sizes" if len(sizes) > 5 else ""))
    lines.append("experts per image: " + ", ".join(f"{k} ({n:,} images)" for k, n in sorted(experts.items())))
    lines.append(f"empty masks, that mark nothing: {np.mean(empty):.1%}; mean pairwise Dice of experts: "
                 + (f"{np.mean(dice):.3f}, over {len(dice):,} images that an expert marked" if dice else "-"))
    return "\n".join([*lines, f"fingerprint: {ExpertDataset(store, np.arange(len(store))).fingerprint}"])


def masks_of_rows(store: Store) -> Iterator[torch.Tensor]:
    """The masks (k_i, h, w) of each row, of which a block is in memory at a time."""
    for first in range(0, len(store), BLOCK):
        rows = ExpertDataset(store, np.arange(first, min(first + BLOCK, len(store))))
        yield from (rows[index][1] for index in range(len(rows)))


def split_of(store: Store) -> str:
    """The split that the images came in, if any, in words."""
    count = Counter(name.partition("/")[0] for name in store.ids)
    if came_split(set(count)):
        parts = ", ".join(f"{count[fold]:,} {fold}" for fold in FOLDS if fold in count)
        spared = "" if "val" in count else f"; of train, {VALIDATED:.0%} of the patients validate"
        return f"split: came as {parts}; --split file keeps it{spared}"
    few = len(set(store.patient)) < 3
    return "split: none came with them; --split group, by patient, " + (
        "needs 3 patients: if these are not the patients, name them with --patients" if few
        else "64 / 16 / 20 %")


def draw(store: Store, file: Path) -> None:
    """Draws a PNG file: of each of four patients the most marked image, without and with outlines."""
    areas = store.areas() / (store.annotators if store.experts is None else store.experts)  # of a mean mask
    # The last row of a patient in ascending order of the area is the largest; empty ones are not shown.
    largest = {store.patient[row]: row for row in np.argsort(areas, kind="stable") if areas[row]}
    rows = [largest[patient] for patient in sorted(largest)]
    images = ExpertDataset(store, np.array([rows[i] for i in evenly_spaced(len(rows), SHOWN)]))
    fig.save(fig.case_sheet([images[i] for i in range(len(images))]), file)


def check(place: Path, flags: argparse.Namespace) -> None:
    """Prints what the data set at a place holds; an original is converted in a temporary folder."""
    if not place.exists():
        raise FileNotFoundError(f"--check {place}: no such file or folder")
    reader = reader_of(place)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "checked.h5")
        if reader is None:
            store = open_store(place)
        elif reader.convert is None:
            store = prepare(place, made, flags)
        else:
            with Writer(made, f"checked from {place}") as writer:
                reader.convert(reader.files_of(place), writer)
            store = open_store(made)
        print(f"{place}: {reader.form if reader else 'store'}\n{summary(store)}")
    if (store.annotators, store.shape[1:]) == (4, (128, 128, 1)):  # LIDC's
        series = len(set(store.fields.get("series", store.patient)))
        word = "series" if "series" in store.fields else "patients"
        print(f"the paper's LIDC has {PAPER_FILE[0]:,} slices of {PAPER_FILE[1]} series: "
              + ("the same numbers" if (len(store), series) == PAPER_FILE
                 else f"not these, {len(store):,} of {series} {word}"))


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, and ends with a line for what a user can put right."""
    with one_line_errors(MEMORY):
        flags = parsed(argv)
        if flags.check is not None:
            check(flags.check, flags)
            return
        store, picture = prepare(flags.folder, flags.output, flags), flags.output.with_suffix(".png")
        draw(store, picture)
        print(f"{summary(store)}\n{flags.output} and {picture}: next,")
        for script in SCRIPTS:
            print(f"  python {script} --what {shlex.quote(str(flags.output))} --preset best")


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags of a command line. Exits with a usage message for others."""
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=path, nargs="?", help="of cases: an image with its masks each")
    parser.add_argument("--output", type=path, help="the .h5 file to write, for --what")
    parser.add_argument("--check", type=path, metavar="PATH", help="only say what data of any form hold")
    parser.add_argument("--image", help="pattern of images' names (default: image*, or like their folder)")
    parser.add_argument("--masks", help="pattern of the masks' names (default: all that are no image)")
    parser.add_argument("--label", type=int, nargs="+", default=[],
                        help="values that count as marked, where masks have several (default: any but 0)")
    parser.add_argument("--patients", type=path, help="CSV file with the case in its first column and the "
                                                      "patient in another (default: by folder)")
    parser.add_argument("--column", default="patient", help="of that file, the patient's")
    parser.add_argument("--axis", choices=("fewest", *AXES), default="fewest",
                        help="to cut all volumes across: that of the fewest slices in most, or one by name")
    parser.add_argument("--size", type=int, help="pixels per side: larger images become smaller, in their "
                                                 "proportions, and all are padded with zeros (default: the "
                                                 "largest side)")
    parser.add_argument("--window", type=float, nargs=2, default=[], metavar=("LOW", "HIGH"),
                        help="intensities that become 0 and 1 (default: of each image or volume its minimum "
                             "and maximum; 8 bits: 0 and 255)")
    flags = parser.parse_args(argv)
    if (flags.check is None) == (flags.folder is None) or (flags.folder is None) != (flags.output is None):
        parser.error("expected FOLDER and --output, or --check PATH alone")
    return flags


if __name__ == "__main__":
    main()
