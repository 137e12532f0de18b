"""How every command begins and ends: paths with a tilde, any terminal, one line for what a user can mend."""

import argparse
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

LONGEST = 390  # characters of a message: a longer one is not read


def path(text: str) -> Path:
    """The type of a flag that holds a path: a tilde is the home folder, also in --output=~/x."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # of a user without a home folder
        raise argparse.ArgumentTypeError(f"{text}: {error}; write the folder's full path") from error


@contextmanager
def one_line_errors(saves_memory: str = "") -> Iterator[None]:
    """Ends the process with one line and exit code 1 for what a user can put right, instead of a traceback.

    saves_memory: the flags that help when memory does not suffice. Output that only takes ASCII gets other
    characters as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with memory_advice(saves_memory):
            yield
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(shortened(f"error: {error}"))


@contextmanager
def memory_advice(saves_memory: str) -> Iterator[None]:
    """Ends the process with one line and exit code 1 where memory does not suffice.

    saves_memory: the flags that help here; of one block within another, the inner one's."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        sys.exit(f"error: out of GPU memory. What helps: {saves_memory}. ({str(error).splitlines()[0][:60]})")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        reason = " ".join(str(error).split()) or "none was left"
        sys.exit(f"error: out of memory. What helps: {saves_memory}. ({reason[:60]})")


def shortened(message: str) -> str:
    """A message on one line, of at most LONGEST characters: what is too much is left out of its middle.

    Its beginning names the file or flag, and its end says what to do."""
    line = " ".join(message.split())
    if len(line) <= LONGEST:
        return line
    end = LONGEST // 3
    return f"{line[:LONGEST - end - 5]} ... {line[-end:]}"
