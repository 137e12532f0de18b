"""The lists of a split as CSV, for other people's code: split, id, patient, one row per image.

    python -m data.export --what LIDC --data_path <folder or file> --output splits.csv
"""

if not __package__:  # started by its path, it would not find the project
    raise SystemExit("error: start it from the project's folder, as `python -m data.export ...`")


import argparse
import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data.dataset import load
from metadata_manager import EXPERIMENTS, Metadata, experiment
from metrics.files import whole_file

PARTS = ("train", "val", "test")


def rows(metadata: Metadata) -> list[tuple[str, str, str]]:
    """Split, id and patient of every image, in the order in which runs see them; errors as `load`."""
    found = []
    for part in PARTS:
        images = load(metadata, part)
        found += [(part, name, str(patient)) for name, patient in zip(images.ids, images.patients)]
    return found


def main(flags: Sequence[str] | None = None) -> None:
    """Reads the command line, and ends with a message for what a user can put right."""
    parser = argparse.ArgumentParser(prog="python -m data.export", description=__doc__.split("\n\n")[0])
    parser.add_argument("--what", default="LIDC", help=f"{', '.join(EXPERIMENTS)}, or your own .h5 file")
    parser.add_argument("--data_path", help="folder or file of the data (default: metadata_manager.PATHS)")
    parser.add_argument("--split_seed", type=int, default=0, help="as in the scripts")
    parser.add_argument("--output", type=Path, required=True, help="the .csv file to write")
    arguments = parser.parse_args(flags)
    try:
        metadata = experiment(arguments.what).metadata
        metadata = replace(metadata, data_path=arguments.data_path or metadata.data_path,
                           split_seed=arguments.split_seed)
        text, found = io.StringIO(newline=""), rows(metadata)
        csv.writer(text, lineterminator="\n").writerows([("split", "id", "patient"), *found])
        with whole_file(arguments.output) as file:
            file.write(text.getvalue().encode())
    except (ValueError, OSError) as error:
        parser.error(str(error))
    counts = ", ".join(f"{sum(part == one for one, *_ in found)} {part}" for part in PARTS)
    print(f"{arguments.output}: {counts} images")


if __name__ == "__main__":
    main()
