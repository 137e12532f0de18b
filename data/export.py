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
from metadata_manager import EXPERIMENTS, Metadata
from metrics.files import whole_file
from metrics.program import one_line_errors, path
from models.flags import experiment

PARTS = ("train", "val", "test")


def rows(metadata: Metadata) -> list[tuple[str, str, str]]:
    """Split, id and patient of every image, in the order in which runs see them; errors as `load`."""
    lines = []
    for part in PARTS:
        images = load(metadata, part)
        lines += [(part, name, str(patient)) for name, patient in zip(images.ids, images.patients)]
    return lines


def write(output: Path, lines: Sequence[tuple[str, str, str]]) -> None:
    """Writes the lines as CSV. Raises ValueError for a file that exists and holds anything else."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([("split", "id", "patient"), *lines])
    content = text.getvalue().encode()
    if output.is_dir() or output.exists() and output.read_bytes() != content:
        raise ValueError(f"--output {output}: exists and does not hold these lists; it is not replaced: name "
                         "another file, or move it away")
    with whole_file(output) as file:
        file.write(content)


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, and ends with a line for what a user can put right."""
    parser = argparse.ArgumentParser(prog="python -m data.export", description=__doc__.split("\n\n")[0])
    parser.add_argument("--what", default="LIDC", help=f"{', '.join(EXPERIMENTS)}, or your own .h5 file")
    parser.add_argument("--data_path", help="folder or file of the data (default: metadata_manager.PATHS)")
    parser.add_argument("--split_seed", type=int, default=0, help="as in the scripts")
    parser.add_argument("--output", type=path, required=True, help="the .csv file to write")
    with one_line_errors("a smaller data set"):
        flags = parser.parse_args(argv)
        metadata = experiment(flags.what).metadata
        lines = rows(replace(metadata, data_path=flags.data_path or metadata.data_path,
                             split_seed=flags.split_seed))
        write(flags.output, lines)
        counts = ", ".join(f"{sum(line[0] == part for line in lines)} {part}" for part in PARTS)
        print(f"{flags.output}: {counts} images")


if __name__ == "__main__":
    main()
