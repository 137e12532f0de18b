"""Several processes on one run, as torchrun starts them: what each computes, and how they agree."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """The rows of a batch of b images that one process computes, and the weight of its means in the whole's.

    Random numbers are drawn for the whole batch and cut: all processes together use those of one alone.
    """

    b: int
    rows: slice
    weight: float = 1.0

    def cut(self, whole: Tensor) -> Tensor:
        """This part of a tensor (b, ...)."""
        return whole[self.rows]


def whole(b: int) -> Part:
    """The part of a process that is alone."""
    return Part(b, slice(0, b))


@dataclass(frozen=True)
class Processes:
    """This process among those of a run; the first one alone prints, validates and writes.

    agreement: a group on the CPU, so that to agree on something does not wait for a GPU.
    """

    rank: int = 0
    count: int = 1
    agreement: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def part(self, b: int) -> Part:
        """This process's share of a batch of b; one without a row computes the first, at weight 0."""
        start, stop = self.rank * b // self.count, (self.rank + 1) * b // self.count
        return Part(b, slice(start, stop), (stop - start) / b) if stop > start else Part(b, slice(0, 1), 0.0)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over the processes.

        Once a step and not from within backward(), as DistributedDataParallel does: a step has several
        backward passes, see `ATFM.losses`."""
        if self.count > 1:
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def any(self, flag: bool) -> bool:
        """Whether any process says so; all wait for each other."""
        if self.count == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.agreement)
        return bool(flags)

    def gather(self, value: T) -> list[T]:
        """Every process's value, in their order."""
        if self.count == 1:
            return [value]
        values: list = [None] * self.count
        dist.all_gather_object(values, value, group=self.agreement)
        return values

    def first_first(self, load: Callable[[], T]) -> T:
        """load() in the first process, then in the others, which find what the first has written."""
        if self.first:
            value = load()
            self.any(False)
            return value
        self.any(False)
        return load()


ALONE = Processes()


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """The processes of this run, joined while the block runs: those of torchrun, or this one alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield ALONE
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        processes = Processes(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))
        with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if processes.first else nowhere):
            yield processes
    finally:
        dist.destroy_process_group()
