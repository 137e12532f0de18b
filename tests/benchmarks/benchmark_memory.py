"""Memory of one training step of the flow at the papers' sizes, and what each measure against it saves.

Straightforward: float32, a forward pass per annotator, one backward pass through them all. Ours:
`ATFM.losses` with annotators_per_pass, recompute and amp on and off. On tensors with shapes and no data:

    saved       what autograd keeps for a backward pass, the most of a step; storages once, without weights
                and the batch itself
    recomputed  what recompute brings back beside it, a block at a time: the largest block

Under amp CUDA's rules of what is cast hold. With a GPU also the allocator's peak, weights and Adam's moments
included, and the time of a step. All ways are first checked to give the same gradient, on a small net:

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

from models import ATFM, GTR, STNet
from models.flags import experiment
from models.st_net import Recomputable
from tests.benchmarks import straightforward
from tests.benchmarks.measure import machine, medians, report

GIB = 2**30


@dataclass(frozen=True)
class Sizes:
    """Of a step: image (b, c, size, size), masks (b, k, size, size), width of ST-Net."""

    b: int
    c: int
    k: int
    size: int
    dim: int

    def batch(self) -> tuple[Tensor, Tensor]:
        image = torch.rand(self.b, self.c, self.size, self.size)
        return image, (torch.rand(self.b, self.k, self.size, self.size) < 0.5).float()


@dataclass(frozen=True)
class Way:
    """One way to compute the gradient of a step; `ours` False is the straightforward one. None: all."""

    ours: bool
    annotators_per_pass: int | None = None
    recompute: bool = False
    amp: bool = False

    def build(self, sizes: Sizes) -> ATFM:
        net = STNet(sizes.dim, recompute=self.recompute)
        return ATFM(GTR(sizes.c), net, annotators_per_pass=self.annotators_per_pass, amp=self.amp)

    def parts(self, atfm: ATFM, image: Tensor, masks: Tensor) -> Iterable[dict[str, Tensor]]:
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


def counted(way: Way, sizes: Sizes) -> tuple[int, int]:
    """Bytes saved in the first part of a step, as large as any, and in the largest block to recompute."""
    blocks = [0]

    def count(block: Recomputable, inputs: tuple[Tensor, ...]) -> None:
        blocks.append(saved_bytes(lambda: block.forward(*inputs), [*block.parameters(), *inputs]))

    with without_data("cuda" if way.amp else "cpu"):
        atfm, batch = way.build(sizes), sizes.batch()
        inputs = [*atfm.parameters(), *batch]
        saved = saved_bytes(lambda: next(iter(way.parts(atfm, *batch))), inputs)
        if way.recompute:
            for module in atfm.net.modules():
                if isinstance(module, Recomputable):
                    module.register_forward_pre_hook(count)
            next(iter(way.parts(atfm, *batch)))
    return saved, max(blocks)


def gradient(way: Way, sizes: Sizes, device: torch.device) -> Tensor:
    """Of the loss in all weights, as one vector, with the same weights, batch and draws for every way."""
    torch.manual_seed(0)
    atfm, (image, masks) = way.build(sizes).to(device), sizes.batch()
    torch.manual_seed(1)
    for part in way.parts(atfm, image.to(device), masks.to(device)):
        part["loss"].backward()
    return torch.cat([weight.grad.flatten() for weight in atfm.net.parameters()])


def require_same_gradients(sizes: Sizes, device: torch.device) -> None:
    """Raises SystemExit if one is off by 0.1 % of the straightforward one's length, or 10 % in bfloat16."""
    expected = gradient(WAYS[0], sizes, device)
    for way in WAYS[1:]:
        difference = float((gradient(way, sizes, device) - expected).norm() / expected.norm())
        if not difference < (0.1 if way.amp else 1e-3):
            raise SystemExit(f"{way}: its gradient is {difference:.2%} off the straightforward one's")


def measured(way: Way, sizes: Sizes, device: torch.device, repeats: int) -> dict[str, float | str]:
    """The allocator's peak and the median time of whole steps on a GPU."""
    torch.cuda.empty_cache()
    try:
        atfm, batch = way.build(sizes).to(device), [part.to(device) for part in sizes.batch()]
        optimizer = torch.optim.AdamW(atfm.net.parameters(), lr=1e-4)

        def step() -> None:
            for part in way.parts(atfm, *batch):
                part["loss"].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step()  # makes the moments
        torch.cuda.reset_peak_memory_stats(device)
        time = medians({"step": step}, repeats, device)["step"]
        return {"peak GiB": torch.cuda.max_memory_allocated(device) / GIB, "ms per step": 1e3 * time}
    except torch.cuda.OutOfMemoryError:
        return {"peak GiB": "out of memory", "ms per step": "-"}


def main(flags: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", default="isic3_style_concat", choices=("isic3_style_concat", "LIDC"))
    for name, of_what in ("size", "pixels per side"), ("dim", "width of ST-Net"):
        parser.add_argument(f"--{name}", type=int, help=f"{of_what} (default: the data set's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps per median (GPU only)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    arguments = parser.parse_args(flags)
    torch.set_num_threads(arguments.threads)
    device, found = torch.device(arguments.device), experiment(arguments.what)
    sizes = Sizes(found.flow.batch_size, found.metadata.channels, found.metadata.annotators,
                  arguments.size or found.metadata.size, arguments.dim or found.flow.dim)
    require_same_gradients(Sizes(b=2, c=sizes.c, k=sizes.k, size=16, dim=8), device)

    rows, first = [], 0
    for way in WAYS:
        saved, block = counted(way, sizes)
        first = first or saved
        rows.append({**vars(way), "saved GiB": saved / GIB, "times less": first / saved,
                     "recomputed GiB": block / GIB, "times less with it": first / (saved + block)})
        if device.type == "cuda":
            rows[-1] |= measured(way, sizes, device, arguments.repeats)
    report(rows, what=arguments.what, **vars(sizes), **machine(device))


if __name__ == "__main__":
    main()
