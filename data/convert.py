"""Converts each original (pickles, PNGs, files of PHiSeg and MMIS) once, into a store beside it."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import splits
from data.store import Store, open_store
from data.writer import Writer

VERSION = 3  # raise it when a reader of originals changes: all are converted again
Convert = Callable[[Sequence[Path], Writer], None]


@dataclass(frozen=True)
class Reader:
    """How the originals of one format are read; all functions raise ValueError naming the file at fault.

    released: the rows of the authors' split."""

    form: str  # in words
    recognises: Callable[[Path], bool]  # whether a file or folder has this format
    files_of: Callable[[Path], list[Path]] = lambda path: [path]  # what an original consists of
    convert: Convert | None = None  # appends these files to a store; None: it takes the flags of data.prepare
    released: Callable[[Store], dict[str, np.ndarray]] = lambda store: splits.released(len(store))
    fit: str = "stretched"  # how an image without masks becomes a square, one of fig.own_images.FITS


def converted(original: Path, files: Sequence[Path], convert: Convert) -> Store:
    """The store of `original`, made by `convert(files, writer)` on first use and again when a file changes.

    It lies beside the original or, if that folder is read-only, in $XDG_CACHE_HOME/atfm or ~/.cache/atfm.
    Raises OSError where neither is writable, and what `convert` raises."""
    # A link to the original then leads to the same store.
    original = original.resolve()
    digest = _digest(original, files)
    reason = "converting once"
    for place in _places(original):
        if not place.is_file():
            continue
        try:
            store = open_store(place)
        except ValueError as error:
            # No error: a damaged store can be made again from the original.
            reason = f"the store is unusable ({error}); converting again"
            continue
        if store.digest == digest:
            return store
        reason = f"its files changed since {place} was made, or its reader did; converting again"
    with _writer(original, digest) as writer:
        print(f"{original}: {reason}, into {writer.path}", flush=True)
        convert(files, writer)
    return open_store(writer.path)


def files_in(folder: Path, *suffixes: str, deep: bool = False) -> list[Path]:
    """Files of a folder by name, those with one of `suffixes` in any case if there are any.

    deep: also of its sub-folders, linked ones too."""
    paths: list[Path] = []
    visited: set[Path] = set()
    for place, inner, names in os.walk(folder, followlinks=True):
        real = Path(place).resolve()
        if not deep or real in visited:  # a link that leads back
            # os.walk enters none of the sub-folders that are taken out of this list.
            inner.clear()
        if real not in visited:
            paths += [Path(place, name) for name in names]
        visited.add(real)
    # What macOS and Windows leave in folders is passed over.
    return sorted(path for path in paths
                  if not path.name.startswith(".") and path.name.lower() not in ("thumbs.db", "desktop.ini")
                  and (not suffixes or path.suffix.lower() in suffixes))


def _digest(original: Path, files: Sequence[Path]) -> str:
    """Of the version, and of names, sizes and modification times of the original's files."""
    lines = [f"{VERSION}"]
    for file in files:
        # Size and time instead of content, since hashing gigabytes at each start would take long.
        status = file.stat()
        lines.append(f"{os.path.relpath(file.resolve(), original)} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _places(original: Path) -> tuple[Path, Path]:
    """Where the store of `original` may lie, best first."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if cache.startswith("~"):  # a user without HOME or an entry in passwd, as in a container
        cache = tempfile.gettempdir()
    # All originals use the same cache folder, where two may have the same name: the path's digest differs.
    name = f"{original.name}-{hashlib.sha256(str(original).encode()).hexdigest()[:12]}.h5"
    return original.with_name(f"{original.name}.atfm.h5"), Path(cache, "atfm", name)


def _writer(original: Path, digest: str) -> Writer:
    """A writer of the store at the first place that is writable."""
    refusals = []
    for place in _places(original):
        try:
            # What is there is a store of this original: one that is out of date, or damaged.
            return Writer(place, f"converted from {original}", digest, replace=True)
        except OSError as error:
            refusals.append(f"{place.parent} ({error})")
    raise OSError(f"{original}: no folder for its store is writable: {'; '.join(refusals)}; "
                  "set XDG_CACHE_HOME")
