"""How every file of results is written: whole, or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file under a temporary name that becomes `path` when the block ends without an error.

    Flushed to disk before it is renamed: a reader, or a run after a crash, finds the old file or the new one.
    Folders are made as needed. Raises OSError naming the path, for example when the disk is full; then what
    was there before is intact."""
    temporary = path.with_name(path.name + ".writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error}); what was there before is intact. Free some "
                      "space and run the same command again") from error
    finally:
        temporary.unlink(missing_ok=True)
