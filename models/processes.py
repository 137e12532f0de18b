"""What a script needs of its process: a device, the other processes of torchrun, seeds, signals, a lock."""

import fcntl
import hashlib
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from metadata_manager import RunConfig

T = TypeVar("T")
# How long a process waits for one that validates, tests or converts, which takes hours. torch's default is
# minutes.
PATIENCE = timedelta(days=7)
# Bytes exchanged at once: few exchanges, and little memory beside the gradients.
BUCKET = 25 * 2**20
# The step before the first, see `seed_step`.
INITIALIZATION = -1
# What lowers memory in step 2. Only the first of these changes what is trained.
FLOW_MEMORY = ("a smaller --batch_size (in proportion); of ATFM's flows --checkpoint True (activations to "
               "about a fifth), --annotators_per_pass 1 (to one of the k annotators'), --images_per_pass 1 "
               "(to one of a batch's images')")


class NonFiniteLoss(FloatingPointError):
    """The loss or its gradient is not finite."""


@dataclass(frozen=True)
class Processes:
    """This process, on its device, among those of a run. Only the first prints, validates and writes.

    cpu_group: the group through which they exchange flags and objects, without waiting for a GPU.
    """

    device: torch.device
    rank: int = 0
    count: int = 1
    cpu_group: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is the one that prints, validates and writes."""
        return self.rank == 0

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over the processes, in one exchange per `BUCKET` bytes.

        Called once a step. DistributedDataParallel would exchange within each backward(), but a step has
        several, see `ATFM.losses`. Its no_sync() would have to know the last of them, which the loop does
        not, and all that calls the net would have to call its wrapper."""
        if self.count == 1:
            return
        for bucket in buckets(tensors, BUCKET):
            # One long tensor: an exchange for each of many small ones would cost more than the bytes do.
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            dist.all_reduce(flat)
            for tensor, summed in zip(bucket, flat.split([tensor.numel() for tensor in bucket])):
                tensor.copy_(summed.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Whether any process says so; all wait for each other."""
        if self.count == 1:
            return flag
        # On the CPU, see `cpu_group`. The largest of the flags is 1 if any is.
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.cpu_group)
        return bool(flags)

    def wait(self) -> None:
        """Returns when all processes have come here."""
        self.any(False)

    def gather(self, value: T) -> list[T]:
        """Every process's value, in their order."""
        if self.count == 1:
            return [value]
        values: list = [None] * self.count
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def check_same(self, value: Any, what: str) -> None:
        """Raises ValueError unless all processes have the same value; what: the value is, in words."""
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise ValueError(f"{what} differs between processes: {values[0]} in process 0, {other} in "
                                 f"process {rank}. On several machines, give them a shared --output_path, or "
                                 "copy the folder to each before starting")

    def in_turn(self, load: Callable[[], T]) -> T:
        """load() in the first process of each machine, then in the others, which find what it has written."""
        # All come to the same barrier once: the first of a machine after loading, the others before.
        first_here = int(os.environ.get("LOCAL_RANK", self.rank)) == 0
        if not first_here:
            self.wait()
        value = load()
        if first_here:
            self.wait()
        return value


def buckets(tensors: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """The tensors in their order, as many at a time as fit in `size` bytes, but at least one."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(held.nbytes for held in bucket) + tensor.nbytes > size:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextmanager
def join(run: RunConfig) -> Iterator[Processes]:
    """The processes of this run while the block runs: those that torchrun started, or this one alone.

    Raises ValueError for a device that is not there."""
    device = device_of(run.device)
    # TF32 keeps 10 bits of each factor. That does for convolutions, not for a likelihood or an overlap, which
    # are products of matrices over thousands of pixels. Such products are under a hundredth of ST-Net's work.
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = run.tf32, False
    if run.deterministic:
        # cuBLAS repeats its results only with a workspace of fixed size.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        print(f"device: {name_of(device)}")
        yield Processes(device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        processes = Processes(device, dist.get_rank(), dist.get_world_size(),
                              dist.new_group(backend="gloo", timeout=PATIENCE))
        # The scripts print without asking for the rank, so the output of the other processes is dropped here.
        with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if processes.first else nowhere):
            print(f"device: {processes.count} processes, the first on {name_of(device)}")
            yield processes
    finally:
        dist.destroy_process_group()


def device_of(name: str) -> torch.device:
    """The device of --device: "auto" is CUDA if there is one; torchrun's n-th process takes the n-th GPU.

    Raises ValueError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    # Plain "cuda" would be torch's current GPU, which is the first one in every process.
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        # torch.device itself does not say whether there is such a device.
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: not available ({reason}); try auto or cpu") from error
    device = torch.device(name)
    # For calls that take no device, such as those of the process group and of `peak_memory`.
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def name_of(device: torch.device) -> str:
    """The device in words; says so if there is a GPU that torch cannot use."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    unused = Path("/dev/nvidia0").exists() and not torch.cuda.is_available()
    warning = ("; warning: there is an NVIDIA GPU that torch cannot use: compare its driver's version with "
               "CUDA's in `python -m torch.utils.collect_env`") if unused else ""
    return f"{device}, {torch.get_num_threads()} threads{warning}"


def in_bfloat16(amp: str, device: torch.device) -> bool:
    """Whether ST-Net's products are in bfloat16, by --amp; "auto": on a GPU that does not just emulate it."""
    if amp != "auto":
        return amp == "True"
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def precision_of(device: torch.device, run: RunConfig, amp: bool) -> str:
    """The precision that the networks compute in, in words. amp: whether ST-Net does in bfloat16."""
    float32 = "float32, convolutions in TF32" if device.type == "cuda" and run.tf32 else "float32"
    return f"bfloat16 in ST-Net, else {float32}" if amp else float32


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seeds torch on all devices for one step of one process, or for the INITIALIZATION.

    Seed and step are hashed, because torch's CPU generator uses only the low 32 bits of a seed."""
    digest = hashlib.blake2b(f"{seed} {step}".encode(), digest_size=8).digest()
    # Each process draws other numbers: the ranks differ in the low bits, which are the ones that count.
    torch.manual_seed((int.from_bytes(digest, "little") + rank) % 2**64)


@contextmanager
def lock(folder: Path, processes: Processes) -> Iterator[None]:
    """Holds a lock on the folder, which ends with the process; raises ValueError if another run holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "w")
    except OSError as error:
        raise OSError(f"{folder}: cannot be written ({error}); use another --output_path") from error
    # Closing the file ends the lock, so it stays open for as long as the block runs.
    with file:
        # Only the first, because the lock would refuse the other processes of the same run.
        if processes.first:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{folder}: another run writes here; wait for it or use another "
                                 "--output_path") from None
            except OSError as error:
                print(f"warning: {folder} cannot be locked ({error}): start no second run there")
        # No process goes on before the folder is theirs.
        processes.wait()
        yield


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that receives SIGINT, SIGTERM or SIGHUP, which then do not end the process; a second one does.

    SIGHUP comes when a terminal is closed. Where it is ignored, as under nohup, it stays so."""
    received: list[int] = []
    previous: dict[int, Any] = {
        n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    if previous[signal.SIGHUP] == signal.SIG_IGN:
        del previous[signal.SIGHUP]

    def receive(number: int, frame: object) -> None:
        received.append(number)
        # A second signal acts as usual, for a process that does not come to look at the list.
        signal.signal(number, previous[number])

    for number in previous:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def leave(signals: Sequence[int], words: str, quiet: bool = False) -> None:
    """If a signal came, ends the process with the code that a shell gives for it; words: printed after it."""
    if signals:
        if not quiet:
            print(f"\n{signal.Signals(signals[0]).name}{words}", file=sys.stderr)
        raise SystemExit(128 + signals[0])


def peak_memory() -> int:
    """Bytes at the peak so far: of tensors on the current GPU, or without a GPU of the whole process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    # Bytes on macOS, KiB on Linux.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
