"""Scores masks that any program has written, as the tests score ATFM's: GED, HM-IoU, MDM and the rest.

    python -m metrics samples masks --samples 16 32 --output scores.json

Each folder holds a case per sub-folder of files of one mask each (PNG, NIfTI and the others of
data/volumes.py), or per file <case>.npy of an array (n, h, w). A volume is one mask; NIfTI is turned as its
header says. The same cases must be in both. A mask has two values, of which 0 is unmarked. Empty masks count:
see PROTOCOL.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data.volumes import SUFFIXES, Scan, check_same_place, labels_of, read_scan, suffix_of
from metrics.evaluation import score
from metrics.report import columns, write_text


def cases_of(folder: Path) -> dict[str, list[Path]]:
    """Name of each case -> its files, by name. Raises ValueError if there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected one with a sub-folder or .npy file per case")
    cases: dict[str, list[Path]] = {}
    for path in sorted(one for one in folder.iterdir() if not one.name.startswith(".")):
        if path.is_dir():
            files = sorted(one for one in path.iterdir()
                           if suffix_of(one) and not one.name.startswith("."))
        else:
            files = [path] if path.suffix.lower() == ".npy" else []
        if files and path.stem in cases:
            raise ValueError(f"{path}: case {path.stem} is also in {cases[path.stem][0]}; expected it once")
        if files:
            cases[path.stem if path.is_file() else path.name] = files
    if not cases:
        raise ValueError(f"{folder}: no case; expected sub-folders of files ({', '.join(SUFFIXES)}), or "
                         "<case>.npy")
    return cases


def masks_of(files: Sequence[Path], folder: Path) -> list[Scan]:
    """The masks of a case, each (h, w) or (z, h, w) bool. Raises ValueError naming the file that is none.

    files: one each, or the <case>.npy of `folder` with all of them, (n, h, w)."""
    masks: list[Scan] = []
    for path in files:
        scan = read_scan(path, mask=True)
        labels = labels_of(scan)
        several = path.parent == folder and labels.ndim == 3
        if labels.ndim not in (2, 3):
            raise ValueError(f"{path}: {labels.shape}, expected a mask (h, w) or (z, h, w), of "
                             "<case>.npy (n, h, w)")
        values = np.unique(labels)
        if np.count_nonzero(values) > 1:
            raise ValueError(f"{path}: the values {', '.join(map(str, values[:5]))}"
                             f"{', ...' if len(values) > 5 else ''}; expected 0 and one other")
        masks += [Scan(path, one, scan.affine) for one in (labels != 0 if several else [labels != 0])]
    return masks


def stacked(masks: Sequence[Scan], n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first n masks and the others, (1, m, h, w) each; of volumes (1, m, z, h * w).

    Raises ValueError naming the file that has not the first's size and place."""
    for one in masks[1:]:
        if one.values.shape != masks[0].values.shape:
            raise ValueError(f"{one.path}: {one.values.shape} pixels, expected {masks[0].values.shape} as in "
                             f"{masks[0].path}")
    check_same_place(masks)
    values = torch.from_numpy(np.stack([one.values.reshape(len(one.values), -1) for one in masks]))
    return values[None, :n], values[None, n:]


def main(flags: Sequence[str] | None = None) -> None:
    """Reads the command line, and ends with a message for what a user can put right."""
    parser = argparse.ArgumentParser(prog="python -m metrics", description=__doc__.split("\n\n")[0])
    parser.add_argument("samples", type=Path, help="folder of a model's masks")
    parser.add_argument("masks", type=Path, help="folder of the experts' masks")
    parser.add_argument("--samples", dest="counts", type=int, nargs="+", default=[],
                        help="n of GED_n and the others (default: all samples)")
    parser.add_argument("--output", type=Path, help="a JSON file of the scores of each case")
    arguments = parser.parse_args(flags)
    try:
        ours, theirs = cases_of(arguments.samples), cases_of(arguments.masks)
        if ours.keys() != theirs.keys():
            alone = sorted(ours.keys() ^ theirs.keys())
            raise ValueError(f"{len(alone)} cases are in one folder only, such as {alone[0]}")
        found = {}
        for case, files in ours.items():
            samples, masks = masks_of(files, arguments.samples), masks_of(theirs[case], arguments.masks)
            counts = arguments.counts or [len(samples)]
            if max(counts) > len(samples) or min(counts) < 1:
                raise ValueError(f"case {case}: {len(samples)} samples, expected {max(counts)}; --samples "
                                 "must be from 1 to the number there is")
            scores = score(*stacked([*samples, *masks], len(samples)), counts)
            found[case] = {name: value.item() for name, value in scores.items()}
        names = [name for name in columns(counts) if all(name in one for one in found.values())]
        means = {name: float(np.mean([one[name] for one in found.values()])) for name in names}
        print(f"| cases | {' | '.join(names)} |\n" + "|---" * (len(names) + 1) + "|")
        print(f"| {len(found)} | " + " | ".join(f"{means[name]:.4f}" for name in names) + " |")
        if arguments.output:
            write_text(arguments.output, {"mean": means, "cases": found})
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
