"""How every file is written: whole, or not at all; and how a file is locked."""

import fcntl
import glob
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file, to write and read, whose temporary name becomes `path` if the block ends without error.

    Flushed to disk before it is renamed: a reader, or a run after a crash, finds the old file or the new one.
    The temporary name is random, so that two writers of the same file do not collide. A writer holds a lock
    on it: a temporary file without a lock was left by a killed process, and the next writer removes it.
    Folders are made as needed. Raises OSError naming the path, for example when the disk is full; then what
    was there before is intact."""
    # In the same folder, as renaming is only safe within a file system.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        # x: it fails rather than write into a file that is there.
        with open(temporary, "x+b") as file:
            locked(file)
            yield file
            file.flush()
            # Without this, a power cut after the renaming could leave an empty file under the final name.
            os.fsync(file.fileno())
            # Renamed while the lock is held: no other writer can take the file for an abandoned one.
            os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error}); what was there before is intact. Free some "
                      "space and run the same command again, or choose another place") from error
    finally:
        with suppress(OSError):  # it was renamed, or never made
            temporary.unlink()


def write_text(path: Path, content: str | dict[str, Any]) -> None:
    """Writes text, or a dict as JSON, whole or not at all. Raises OSError as `whole_file`."""
    with whole_file(path) as file:
        file.write((content if isinstance(content, str) else json.dumps(content)).encode())


def locked(file: BinaryIO) -> bool | None:
    """Locks an open file until it is closed or its process ends; False if another holder has it.

    None where the file system knows no locks: nobody is kept out there."""
    try:
        # LOCK_NB: fails at once where another process holds the lock, instead of waiting for it.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove_abandoned(path: Path) -> None:
    """Removes the temporary files of processes that were killed: locks end with their process."""
    for old in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError), open(old, "rb") as file:  # gone by now, or of another user
            # A writer that is alive holds the lock. Without locks nobody knows, and the file is kept.
            if locked(file):
                old.unlink()
