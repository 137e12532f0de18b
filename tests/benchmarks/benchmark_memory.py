"""Memory of one training step of the flow at the papers' sizes, and what each measure against it saves.

Straightforward: float32, a forward pass per annotator, one backward pass through them all. Ours:
`ATFM.losses` with annotators_per_pass, recompute and amp on and off. Counted on tensors without data:

    saved       what autograd keeps for a backward pass, the most of a step; storages once, without weights
                and the batch itself
    recomputed  what recompute brings back beside it, a block at a time: the largest block

Under amp CUDA's rules of what is cast hold. The allocator's peak on a GPU: tests/benchmarks/gpu.py.

    python -m tests.benchmarks.benchmark_memory --what LIDC
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from metadata_manager import Experiment
from models import ATFM, GTR, STNet
from models.flags import experiment
from models.st_net import Recomputable
from tests.benchmarks import straightforward
from tests.benchmarks.measure import report
from tests.benchmarks.plan import batch

GIB = 2**30


@dataclass(frozen=True)
class Way:
    """One way to compute the gradient of a step; `ours` False is the straightforward one. None: all."""

    ours: bool
    annotators_per_pass: int | None = None
    recompute: bool = False
    amp: bool = False

    def build(self, settings: Experiment) -> ATFM:
        net = STNet(settings.flow.dim, recompute=self.recompute)
        return ATFM(GTR(settings.metadata.channels), net, annotators_per_pass=self.annotators_per_pass,
                    amp=self.amp)

    def pieces(self, atfm: ATFM, image: Tensor, masks: Tensor) -> Iterable[dict[str, Tensor]]:
        if self.ours:
            return atfm.losses(image, masks)
        return [{"loss": straightforward.flow_loss(atfm, image, masks)}]


BOTH = (False, True)
WAYS = (Way(ours=False), *(Way(True, *measures) for measures in product((None, 1), BOTH, BOTH)))


@contextmanager
def without_data(device: str) -> Iterator[None]:
    """Tensors made here have no data, on a device that need not exist, whose rules of autocast hold."""
    with (FakeTensorMode(), torch.device(device),
          mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
          mock.patch("torch.cuda.is_bf16_supported", return_value=True)):
        yield


def saved_bytes(forward: Callable[[], Any], leave_out: Iterable[Tensor]) -> int:
    """Of the storages that autograd saves during forward(), each once, without those of `leave_out`."""
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        return saved.setdefault(tensor.untyped_storage()._cdata, tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # held until the end, so that no storage takes another's place
    known = {tensor.untyped_storage()._cdata for tensor in leave_out}
    del result
    return sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in known)


def counted(way: Way, settings: Experiment) -> tuple[int, int]:
    """Bytes saved in the first piece of a step, as large as any, and in the largest block to recompute."""
    blocks = [0]

    def count(block: Recomputable, inputs: tuple[Tensor, ...]) -> None:
        blocks.append(saved_bytes(lambda: block.forward(*inputs), [*block.parameters(), *inputs]))

    with without_data("cuda" if way.amp else "cpu"):
        atfm, inputs = way.build(settings), batch(settings, settings.flow.batch_size)
        saved = saved_bytes(lambda: next(iter(way.pieces(atfm, *inputs))), [*atfm.parameters(), *inputs])
        if way.recompute:
            for module in atfm.net.modules():
                if isinstance(module, Recomputable):
                    module.register_forward_pre_hook(count)
            next(iter(way.pieces(atfm, *inputs)))
    return saved, max(blocks)


def main(flags: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", default="isic3_style_concat", help="a dataset of metadata_manager")
    settings = experiment(parser.parse_args(flags).what)
    rows, first = [], 0
    for way in WAYS:
        saved, block = counted(way, settings)
        first = first or saved
        rows.append({**vars(way), "saved GiB": saved / GIB, "times less": first / saved,
                     "recomputed GiB": block / GIB, "times less with it": first / (saved + block)})
    report(rows, what=settings.metadata.what, torch=str(torch.__version__))


if __name__ == "__main__":
    main()
