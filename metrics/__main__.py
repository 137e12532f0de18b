"""Scores masks that any program has written, as the tests score ATFM's: GED, HM-IoU, MDM and the rest.

    python -m metrics samples masks --samples 16 32 --output scores.json

Each folder holds a case per sub-folder of PNGs or NIfTI files (.nii, .nii.gz), one mask each, or per file
<case>.npy of an array (n, h, w). A volume is one mask. The same cases must be in both. A mask has two values,
of which the larger is marked; a constant one is empty if it is 0. Empty masks count: see PROTOCOL.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import torch
from PIL import Image

from metrics.evaluation import score
from metrics.report import columns, write_text

KINDS = (".png", ".nii", ".nii.gz")


def cases_of(folder: Path) -> dict[str, list[Path]]:
    """Name of each case -> its files, by name. Raises ValueError if there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected one with a sub-folder or .npy file per case")
    cases: dict[str, list[Path]] = {}
    for path in sorted(one for one in folder.iterdir() if not one.name.startswith(".")):
        if path.is_dir():
            files = sorted(one for one in path.iterdir()
                           if one.name.lower().endswith(KINDS) and not one.name.startswith("."))
        else:
            files = [path] if path.suffix.lower() == ".npy" else []
        if files and path.stem in cases:
            raise ValueError(f"{path}: case {path.stem} is also in {cases[path.stem][0]}; expected it once")
        if files:
            cases[path.stem if path.is_file() else path.name] = files
    if not cases:
        raise ValueError(f"{folder}: no case; expected sub-folders of {', '.join(KINDS)} files, or .npy "
                         "files")
    return cases


def masks_of(files: Sequence[Path]) -> torch.Tensor:
    """The masks of a case, (n, h, w) bool. Raises ValueError naming the file that is none or does not fit."""
    masks: list[np.ndarray] = []
    for path in files:
        try:
            found = read(path)
        except (OSError, ValueError, nibabel.filebasedimages.ImageFileError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); expected a PNG, NIfTI or array") from error
        if found.ndim != 3 or found.dtype.kind not in "biu" or 0 in found.shape:
            raise ValueError(f"{path}: {found.dtype} {found.shape}, expected masks (n, h, w) of bool or "
                             "integers, or a grey PNG")
        if len(np.unique(found[found != 0])) > 1:
            raise ValueError(f"{path}: {len(np.unique(found))} values; expected 0 and one other")
        if masks and found.shape[1:] != masks[0].shape:
            raise ValueError(f"{path}: {found.shape[1:]} pixels, expected {masks[0].shape} as in {files[0]}")
        masks += list(found != 0)
    return torch.from_numpy(np.stack(masks))


def read(path: Path) -> np.ndarray:
    """Masks of a file, (n, h, w); of a volume (h, w, z) one, (1, h, w * z)."""
    if path.suffix.lower() == ".npy":
        return np.load(path)
    if path.suffix.lower() == ".png":
        return np.asarray(Image.open(path))[None]
    volume = np.asanyarray(nibabel.load(path).dataobj)  # type: ignore[attr-defined]
    return volume.reshape(1, len(volume), -1)


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
            samples, masks = masks_of(files), masks_of(theirs[case])
            counts = arguments.counts or [len(samples)]
            if samples.shape[1:] != masks.shape[1:] or max(counts) > len(samples) or min(counts) < 1:
                raise ValueError(f"case {case}: {tuple(samples.shape)} samples, {tuple(masks.shape)} masks; "
                                 f"expected at least {max(counts)} samples, and the same height and width")
            scores = score(samples[None], masks[None], counts)
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
