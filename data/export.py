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


def write(output: Path, metadata: Metadata) -> str:
    """Writes the lists as CSV, in the order in which runs see them; returns how many images, in words.

    Raises ValueError for a file that exists and holds anything else, and errors as of `load`."""
    parts = {part: load(metadata, part) for part in PARTS}
    # Line ends are csv's: the text must not translate them.
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("split", "id", "patient"))
    rows.writerows((part, *row) for part, images in parts.items() for row in zip(images.ids, images.patients))
    content = text.getvalue().encode()
    # The same command may be repeated: a file with the same content is replaced by itself.
    if output.is_dir() or output.exists() and output.read_bytes() != content:
        raise ValueError(f"--output {output}: exists and does not hold these lists; it is not replaced: name "
                         "another file, or move it away")
    with whole_file(output) as file:
        file.write(content)
    return ", ".join(f"{len(images)} {part}" for part, images in parts.items()) + " images"


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
        metadata = replace(metadata, data_path=flags.data_path or metadata.data_path,
                           split_seed=flags.split_seed)
        print(f"{flags.output}: {write(flags.output, metadata)}")


if __name__ == "__main__":
    main()
