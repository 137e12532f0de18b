"""The formats of originals that are read. To add one: a module such as data/isic3.py, a line in READERS."""

from pathlib import Path

from data import isic3, lidc, mmis, phiseg
from data.convert import Reader

# By Metadata.reader, in the order in which a path is tried.
READERS: dict[str, Reader] = {
    "phiseg": phiseg.READER,
    "lidc": lidc.READER,
    "isic3": isic3.READER,
    "mmis": mmis.READER,
    # `data.prepare` makes a store of it, as this takes flags.
    "cases": Reader("folder of cases", Path.is_dir, fit="padded"),
}


def reader_called(name: str) -> Reader:
    """The reader of a name. Raises ValueError for another name than those of READERS."""
    if name not in READERS:
        raise ValueError(f"reader {name!r}: unknown; expected one of {', '.join(READERS)}")
    return READERS[name]


def reader_of(path: Path) -> Reader | None:
    """The first reader that knows a file or folder; None for an HDF5 file that is no original but a store."""
    return next((reader for reader in READERS.values() if reader.recognises(path)), None)
