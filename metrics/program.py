"""How every command begins and ends: paths with a tilde, output for any terminal, errors in one line.

Also how it writes tables, numbers and times.
"""

import argparse
import getpass
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

# What CUDA and its libraries say without memory where torch raises no OutOfMemoryError: cuBLAS and cuDNN 8,
# cuDNN 9, and CUDA itself.
NO_GPU_MEMORY = re.compile(r"_STATUS_ALLOC_FAILED|DEVICE_ALLOCATION_FAILED|CUDA error: out of memory")
# What torch.compile says where it cannot work: on a CPU; on CUDA without Triton, a C compiler, or a new
# enough card.
CANNOT_COMPILE = re.compile(r"No working C\+\+ compiler|Cannot find a working triton"
                            r"|Failed to find C compiler|too old to be supported by the triton")
DAY = 24 * 3600  # seconds
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
        # Names of files and patients may have letters that the terminal's encoding lacks.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with memory_advice(saves_memory):
            yield
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(shortened(f"error: {error}"))
    except RuntimeError as error:
        reason = CANNOT_COMPILE.search(str(error))
        # Any other RuntimeError is a fault of the program: its traceback is needed.
        if reason is None:
            raise
        line = next(line for line in str(error).splitlines() if reason[0] in line)
        sys.exit(shortened("error: --compile True: torch.compile needs a C++ compiler, and on a GPU Triton "
                           f"too; leave --compile out, or install them ({line[:200]})"))


@contextmanager
def memory_advice(saves_memory: str) -> Iterator[None]:
    """Ends the process with one line and exit code 1 where memory does not suffice.

    saves_memory: the flags that help here. Of nested blocks the inner one's are named."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if out_of_gpu_memory(error):
            reason = str(error).splitlines()[0][:90]
            sys.exit(f"error: out of GPU memory. What helps: {saves_memory}. ({reason})")
        # On a CPU, torch says so by a RuntimeError with these words.
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        reason = " ".join(str(error).split()) or "none was left"
        sys.exit(f"error: out of memory. What helps: {saves_memory}. ({reason[:60]})")


def out_of_gpu_memory(error: BaseException) -> bool:
    """Whether this says that a GPU's memory did not suffice, in the words of torch or of CUDA's libraries."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and NO_GPU_MEMORY.search(str(error)) is not None)


def name_user() -> None:
    """Gives a user without an entry in passwd, as in a container, a name: torch asks for one."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"user{os.getuid()}"


def shortened(message: str) -> str:
    """A message on one line, of at most LONGEST characters: what is too long is left out in the middle.

    Its beginning names the file or flag, and its end says what to do."""
    line = " ".join(message.split())
    if len(line) <= LONGEST:
        return line
    end = LONGEST // 3
    return f"{line[:LONGEST - end - 5]} ... {line[-end:]}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, each line with its line break."""
    # Only the first line, the head, is followed by a line of dashes.
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [head, *rows]).replace(
        "\n", f"\n{'|---' * len(head)}|\n", 1)


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 seed, 2 seeds."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def time_text(seconds: float) -> str:
    """Seconds as a person says them: 45 s, 12 min, 3.4 h, 250 h."""
    # Up to 90 of a unit, since 75 s says more than 1 min.
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 10 * 3600 else f"{seconds / 3600:,.0f} h"


def with_advice(text: str, seconds: float, ways: str) -> str:
    """A text on how long something takes; if that is over a day, also on the `ways` to make it shorter."""
    return text if seconds <= DAY else f"{text}. More than a day; what makes it affordable: {ways}"
