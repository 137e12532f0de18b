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
from data.volumes import AXES, axis_of, limits_of
from data.writer import Writer, refuse_foreign
from fig.canvas import evenly_spaced
from metrics.overlap import dice_matrix
from metrics.program import one_line_errors, path
from models.flags import came_split

FACTOR = 8  # both networks halve an image's sides up to three times
LARGEST = 256  # pixels per side, unless --size says otherwise
SIZES = (FACTOR, 2048)  # that --size may have
SCRIPTS = ("train_GTR.py", "train_prior_LIDC.py", "test_prior_LIDC.py")  # what comes next
MEMORY = "smaller volumes, or fewer experts: one case is in memory at a time"
PAPER_FILE = (15_096, 875)  # slices and CT series of the paper's LIDC
SHOWN = 4  # images in the picture


def prepare(folder: Path, output: Path, flags: argparse.Namespace) -> Store:
    """Write the cases below a folder into one file; returns the store that it is.

    Raises ValueError or OSError naming the file or the flag that is wrong; then nothing is written."""
    check_numbers(flags)
    all_cases = cases_below(folder, flags)
    origin = origin_of(folder, flags)
    check_output(folder, output, origin)
    shapes = shapes_of(all_cases)
    axis = cases.common_axis(shapes, flags.axis)
    side = flags.size or default_size(shapes, axis)
    settings = json.dumps({"axis": axis, "window": flags.window})
    with Writer(output, origin, prepared=settings) as writer:
        append(writer, all_cases, side, axis, flags)
    print(f"{folder}: {len(all_cases)} cases")
    return open_store(output)


def origin_of(folder: Path, flags: argparse.Namespace) -> str:
    """The command in words: a file is replaced by the command that made it alone, see `refuse_foreign`."""
    names = ("image", "masks", "label", "patients", "column", "axis", "size", "window")
    given = [f"--{name} {getattr(flags, name)}" for name in names if getattr(flags, name)]
    return f"prepared from {folder.resolve()} with {' '.join(given)}"


def check_output(folder: Path, output: Path, origin: str) -> None:
    """Raises ValueError for an output that is no .h5, lies among the inputs, or is another's file.

    Likewise for its picture, which is known to be ours by the .h5 file beside it."""
    if output.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--output {output}: expected a name that ends in .h5")
    if folder.resolve() in output.resolve().parents:  # its picture would be an input of the next time
        raise ValueError(f"--output {output}: lies in {folder}, whose files are read; name a place outside")
    try:
        refuse_foreign(output, origin)
    except ValueError as error:
        raise ValueError(f"--output {error}") from error
    if picture_of(output).exists() and not output.exists():
        raise ValueError(f"--output {output}: its picture would replace {picture_of(output)}, which was not "
                         "made by this program; name another file, or move that one away")


def check_numbers(flags: argparse.Namespace) -> None:
    """Raises ValueError for numbers out of range, naming the flag."""
    if flags.size is not None and (flags.size % FACTOR or not SIZES[0] <= flags.size <= SIZES[1]):
        raise ValueError(f"--size {flags.size}: expected a multiple of {FACTOR}, {SIZES[0]} to {SIZES[1]}")
    for label in flags.label:
        if not -2**63 <= label < 2**63:
            raise ValueError(f"--label {label}: expected a number of at most 64 bits, as in a mask's file")
    limits_of(np.zeros(1), flags.window)


def picture_of(output: Path) -> Path:
    """The picture that is drawn beside a prepared file."""
    return output.with_suffix(".png")


def cases_below(folder: Path, flags: argparse.Namespace) -> list[cases.Case]:
    """The cases below a folder, with the patients that the flags say. Errors as `cases.find`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected one with images and masks in it")
    all_cases = cases.find(folder, flags.image, flags.masks)
    if flags.patients is not None:
        all_cases = patients.with_patients(all_cases, flags.patients, flags.column)
    patients.refuse_divided(all_cases)
    return all_cases


def shapes_of(all_cases: Sequence[cases.Case]) -> dict[str, tuple[int, ...]]:
    """Name of each case -> (h, w) or (z, h, w). Raises ValueError as `cases.read`."""
    return {case.name: cases.shape_of(case)
            for case in tqdm(all_cases, desc="sizes", unit="case", disable=None)}


def default_size(shapes: dict[str, tuple[int, ...]], axis: str) -> int:
    """The largest side of all slices, rounded up to a multiple of FACTOR. Raises ValueError above LARGEST."""
    largest = 0
    for shape in shapes.values():
        sides = np.delete(shape, axis_of(shape, axis)) if len(shape) == 3 else np.array(shape)
        largest = max(largest, int(sides.max()))
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
    k, differ = max(len(case.masks) for case in all_cases), len({len(case.masks) for case in all_cases}) > 1
    first_with: dict[bytes, cases.Case] = {}  # by the image's content
    labels: set[int] = set()
    channels = None
    for case in tqdm(all_cases, desc="cases", unit="case", disable=None):
        values, masks, its_labels = cases.read(case, flags.label)
        labels |= its_labels
        if len(labels) > 1 and not flags.label:
            several = ", ".join(map(str, sorted(labels)[:10]))
            raise ValueError(f"{case.image.parent}: masks with the labels {several}; choose with --label, "
                             f"such as --label {max(labels)}")
        if values.shape[-1] != (channels := channels or values.shape[-1]):
            raise ValueError(f"{case.image}: {values.shape[-1]} channels, expected {channels} as in "
                             f"{all_cases[0].image}")
        number = axis_of(values.shape, axis) if values.ndim == 4 else -1
        content = hashlib.sha256()
        for z, (image, slice_masks) in enumerate(cases.slices(values, masks, axis, flags.window)):
            content.update(image.tobytes())
            fit = Fit(image.shape[0], image.shape[1], side)
            padded = np.zeros((k, side, side), bool)  # masks of experts who are not there are never shown
            padded[:len(masks)] = fit.put_masks(torch.from_numpy(slice_masks))
            fields = {"experts": len(masks)} if differ else {}
            writer.append(fit.put_pixels(torch.from_numpy(image).movedim(-1, 0)), padded,
                          patient=case.patient, id=case.name if number < 0 else f"{case.name}/{z:03d}",
                          file=str(case.image), slice=z, axis=number, height=fit.height, width=fit.width,
                          **fields)
        twin = first_with.setdefault(content.digest(), case)
        if twin.patient != case.patient and np.ptp(values):
            raise ValueError(f"{case.image}: the same image as {twin.image}, of another patient; remove one, "
                             "or name patients with --patients")
    if not labels:
        raise ValueError(f"{all_cases[0].image.parent} and all others: no mask marks anything"
                         f"{f' with --label {flags.label}' if flags.label else ''}; check the masks")


def opened(place: Path, flags: argparse.Namespace, folder: Path) -> tuple[str, Store]:
    """The form of a data set and its store, which is made in `folder`. Errors as of its reader."""
    if not place.exists():
        raise FileNotFoundError(f"--check {place}: no such file or folder")
    made = folder / "checked.h5"
    reader = reader_of(place)
    if reader is None:
        return "store", open_store(place)
    if reader.convert is None:
        return reader.form, prepare(place, made, flags)
    with Writer(made, f"checked from {place}") as writer:
        reader.convert(reader.files_of(place), writer)
    return reader.form, open_store(made)


def summary(store: Store) -> str:
    """What a store holds, in lines: images, patients, sizes, experts, empty masks, Dice, fingerprint."""
    experts, empty, dice = Counter[int](), [], []
    for masks in masks_of_rows(store):
        k = len(masks)
        experts[k] += 1
        empty += (masks.sum((1, 2)) == 0).tolist()
        if k > 1 and masks.any():
            pairs = dice_matrix(masks[None].bool(), masks[None].bool())[0]
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
                 + (f"{np.mean(dice):.3f}, over {len(dice):,} images that an expert marked"
                    if dice else "-"))
    return "\n".join([*lines, f"fingerprint: {ExpertDataset(store, np.arange(len(store))).fingerprint}"])


def masks_of_rows(store: Store) -> Iterator[torch.Tensor]:
    """The masks (k_i, h, w) of each row, of which a block is in memory at a time."""
    for start in range(0, len(store), BLOCK):
        rows = ExpertDataset(store, np.arange(start, min(start + BLOCK, len(store))))
        yield from (rows[index][1] for index in range(len(rows)))


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


def draw(store: Store, file: Path) -> None:
    """Draws a PNG file: of four patients the image that experts marked most of, and with their outlines."""
    areas = store.areas() / (store.annotators if store.experts is None else store.experts)  # of a mean mask
    largest: dict = {}  # by patient: the row
    for row in np.flatnonzero(areas):
        best = largest.setdefault(store.patient[row], row)
        if areas[row] >= areas[best]:
            largest[store.patient[row]] = row
    rows = [largest[patient] for patient in sorted(largest)]
    images = ExpertDataset(store, np.array([rows[i] for i in evenly_spaced(len(rows), SHOWN)]))
    fig.save(fig.case_sheet([images[i] for i in range(len(images))]), file)


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, and ends with a line for what a user can put right."""
    with one_line_errors(MEMORY):
        flags = parsed(argv)
        if flags.check is not None:
            check(flags)
            return
        store = prepare(flags.folder, flags.output, flags)
        draw(store, picture_of(flags.output))
        print(f"{summary(store)}\n{flags.output} and {picture_of(flags.output)}: next,")
        for script in SCRIPTS:
            print(f"  python {script} --what {shlex.quote(str(flags.output))} --preset best")


def check(flags: argparse.Namespace) -> None:
    """Prints what the data set of --check holds; what it is read from is converted in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        form, store = opened(flags.check, flags, Path(folder))
        print(f"{flags.check}: {form}\n{summary(store)}")
        if (store.annotators, store.shape[1:]) == (4, (128, 128, 1)):
            print(like_the_paper(store))


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
