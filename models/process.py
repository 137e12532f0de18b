"""What a training run needs of its process: a device, seeds, a lock on its folder, word of signals."""

import fcntl
import hashlib
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from metadata_manager import RunConfig
from models.parallel import Processes


def place(run: RunConfig) -> torch.device:
    """The device of --device: "auto" is CUDA if there is one; torchrun's n-th process takes the n-th GPU.

    Raises ValueError for one that is not there."""
    name = run.device
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs a fixed one
        torch.use_deterministic_algorithms(True)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: not available ({reason}); try auto or cpu") from error
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def seed_step(seed: int, step: int) -> None:
    """Seeds torch on all devices for one step; step -1 is the initialization.

    Hashed, because torch's CPU generator heeds the low 32 bits of a seed only."""
    digest = hashlib.blake2b(f"{seed} {step}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little"))


@contextmanager
def claimed(folder: Path, processes: Processes) -> Iterator[None]:
    """Holds a lock on the folder, which ends with the process; raises ValueError if another run holds it."""
    with open(folder / "lock", "w") as file:
        if processes.first:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{folder}: another run writes here; wait for it or use another "
                                 "--output_path") from None
            except OSError as error:
                print(f"warning: {folder} cannot be locked ({error}): start no second run there")
        processes.any(False)  # nobody goes on before the folder is theirs
        yield


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that receives SIGINT or SIGTERM instead of the process; a second signal acts at once."""
    received: list[int] = []
    previous: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def receive(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    for number in previous:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def peak_memory() -> int:
    """Bytes: the most so far that tensors held on the current GPU, or without one that the process held."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
