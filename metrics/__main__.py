"""Scores masks that any program has written, as the tests score ATFM's: GED, HM-IoU, MDM and the rest.

    python -m metrics samples masks --samples 16 32 --output scores.json

Each folder holds a case per sub-folder of files of one mask each (PNG, NIfTI and the others of
data/volumes.py), or per file <case>.npy of an array (n, h, w). A volume is one mask; NIfTI is turned as its
header says. The same cases must be in both. A mask has two values, of which 0 is background. Empty masks
count: see docs/protocol.md.
"""

import argparse
import json
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.volumes import SUFFIXES, Scan, check_same_place, labels_of, read_scan, suffix_of
from metrics.catalogue import columns, score_blocks
from metrics.files import write_text
from metrics.program import one_line_errors, path, table

MEMORY = "fewer --samples; masks of fewer pixels, such as volumes cropped to what is of interest"
BLOCK = 2**20  # pixels of all masks together that are scored at once: a volume is kept as bool, a byte each


def cases_of(folder: Path) -> dict[str, list[Path]]:
    """Name of each case -> its files, by name. Raises ValueError without a case, or with one twice.

    Names that differ in Unicode form (NFC, NFD) only, as they do between file systems, are the same."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected one with a sub-folder or .npy file per case")
    cases: dict[str, list[Path]] = {}
    # Hidden files, such as macOS's .DS_Store, are no cases.
    for entry in sorted(entry for entry in folder.iterdir() if not entry.name.startswith(".")):
        if entry.is_dir():
            files = sorted(file for file in entry.iterdir()
                           if suffix_of(file) and not file.name.startswith("."))
        else:
            files = [entry] if entry.suffix.lower() == ".npy" else []
        # Samples may come from another system than the masks, which writes accented letters otherwise.
        case = unicodedata.normalize("NFC", entry.name if entry.is_dir() else entry.stem)
        if files and case in cases:
            raise ValueError(f"{entry}: case {case} is also in {cases[case][0]}; expected it once")
        if files:
            cases[case] = files
    if not cases:
        raise ValueError(f"{folder}: no case; expected sub-folders of files ({', '.join(SUFFIXES)}), or "
                         "<case>.npy")
    return cases


def masks_of(files: Sequence[Path], folder: Path, most: int | None = None) -> list[Scan]:
    """The masks of a case, at most `most` of them, each (h, w) or (z, h, w) bool.

    files: a mask each, or the <case>.npy of `folder` that holds all, (n, h, w). Raises ValueError naming a
    file that is not a mask."""
    masks: list[Scan] = []
    for file in files[:most]:
        scan = read_scan(file, mask=True)
        if scan.values.ndim not in (2, 3):
            raise ValueError(f"{file}: {scan.values.shape}, expected a mask (h, w) or (z, h, w), of "
                             "<case>.npy (n, h, w)")
        # A 3-D array is a volume in a case's sub-folder, but n masks where it is <case>.npy of the folder.
        several = file.parent == folder and scan.values.ndim == 3
        for values in scan.values[:most] if several else [scan.values]:
            masks.append(replace(scan, values=foreground(replace(scan, values=values))))
    return masks


def number_of_samples(files: Sequence[Path], folder: Path) -> int:
    """How many masks a case has: a mask per file, or the n of <case>.npy in `folder`, (n, h, w)."""
    if files[0].parent != folder:
        return len(files)
    try:
        # Mapped, not read: the header is enough to count.
        shape = np.load(files[0], mmap_mode="r", allow_pickle=False).shape
    except (ValueError, OSError, EOFError, AttributeError):
        return 1  # what is wrong with the file is said where its masks are read
    return 1 if len(shape) == 2 else shape[0]


def foreground(scan: Scan) -> np.ndarray:
    """The pixels of a mask that are not background, bool of its shape.

    Raises ValueError, naming the file, for several labels, and as `labels_of`."""
    labels = labels_of(scan)
    mask = labels != 0
    # Least and largest label suffice; sorting all labels of a volume would take long.
    inside = labels[mask]
    if inside.size and inside.min() != inside.max():
        values = np.unique(scan.values)
        raise ValueError(f"{scan.path}: the values {', '.join(map(str, values[:5]))}"
                         f"{', ...' if len(values) > 5 else ''}; expected 0 and one other")
    return mask


def score_case(samples: Sequence[Scan], masks: Sequence[Scan], counts: Sequence[int]) -> dict[str, float]:
    """All scores of the samples of a case against its masks.

    Raises ValueError naming a file whose size or place differs from the first sample's."""
    first = samples[0]
    for scan in (*samples, *masks):
        if scan.values.shape != first.values.shape:
            raise ValueError(f"{scan.path}: {scan.values.shape} pixels, expected {first.values.shape} as in "
                             f"{first.path}")
        check_same_place([first, scan])
    # The more masks a case has, the fewer pixels a block has: a block bounds the memory.
    step = max(1, BLOCK // (len(samples) + len(masks)))
    # No score depends on where pixels lie, so volumes become single rows, (1, n, 1, pixels).
    blocks = list(zip(*(torch.from_numpy(np.stack([scan.values.ravel() for scan in scans]))[None, :, None]
                        .split(step, dim=3) for scans in (samples, masks))))
    return {name: value.item() for name, value in score_blocks(blocks, counts).items()}


def checked_counts(counts: Sequence[int], numbers: dict[str, int]) -> list[int]:
    """The n of GED_n and the others: those of --samples, or as many as each case has.

    numbers: how many samples each case has. Prints a line if some of them are not scored. Raises ValueError
    for --samples that are below 1, repeated, or more than a case has."""
    # GED falls with n: all cases are scored with the n of the one that has the fewest.
    fewest, most = min(numbers, key=lambda case: numbers[case]), max(numbers, key=lambda case: numbers[case])
    if counts and (min(counts) < 1 or len(set(counts)) < len(counts)):
        raise ValueError(f"--samples {' '.join(map(str, counts))}: expected different numbers from 1")
    if counts and max(counts) > numbers[fewest]:
        raise ValueError(f"case {fewest}: {numbers[fewest]} samples, expected {max(counts)}; --samples must "
                         "be from 1 to the number there is")
    n = max(counts) if counts else numbers[fewest]
    if numbers[most] > n:
        print(f"case {fewest} has {numbers[fewest]} samples, case {most} {numbers[most]}: of each case the "
              f"first {n} are scored, so that cases are comparable; --samples sets how many")
    return list(counts) or [n]


def main(flags: Sequence[str] | None = None) -> None:
    """Reads the command line, and ends with a message for what a user can put right."""
    parser = argparse.ArgumentParser(prog="python -m metrics", description=__doc__.split("\n\n")[0])
    parser.add_argument("samples", type=path, help="folder of a model's masks")
    parser.add_argument("masks", type=path, help="folder of the experts' masks")
    parser.add_argument("--samples", dest="counts", type=int, nargs="+", default=[],
                        help="n of GED_n and the others (default: as many samples as each case has)")
    parser.add_argument("--output", type=path, help="a JSON file of the scores of each case")
    arguments = parser.parse_args(flags)
    with one_line_errors(MEMORY):
        samples, masks = cases_of(arguments.samples), cases_of(arguments.masks)
        if samples.keys() != masks.keys():
            unmatched = sorted(samples.keys() ^ masks.keys())
            raise ValueError(f"{len(unmatched)} cases are in one folder only, such as {unmatched[0]}")
        counts = checked_counts(arguments.counts, {case: number_of_samples(files, arguments.samples)
                                                   for case, files in samples.items()})
        content = {"samples": str(arguments.samples), "masks": str(arguments.masks), "counts": counts}
        # Before hours of scoring, not after them.
        if arguments.output:
            refuse_other_content(arguments.output, content)
        scores = {case: score_case(masks_of(files, arguments.samples, max(counts)),
                                   masks_of(masks[case], arguments.masks), counts)
                  for case, files in samples.items()}
        names = columns(counts)
        means = {name: float(np.mean([of_case[name] for of_case in scores.values()])) for name in names}
        row = [str(len(scores)), *(f"{means[name]:.4f}" for name in names)]
        print(table(["cases", *names], [row]), end="")
        if arguments.output:
            write_text(arguments.output, {**content, "mean": means, "cases": scores})


def refuse_other_content(output: Path, content: dict[str, Any]) -> None:
    """Raises ValueError if there is a file without scores of the same folders and counts."""
    if not output.exists():
        return
    with suppress(ValueError, AttributeError):  # neither JSON nor text, or JSON of another kind
        if content.items() <= json.loads(output.read_bytes()).items():
            return
    raise ValueError(f"--output {output}: exists, and is not what this command wrote before; choose another "
                     "name or move it away")


if __name__ == "__main__":
    main()
