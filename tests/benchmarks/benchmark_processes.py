"""What several processes cost: the share of a training step that the sum of gradients takes, in three forms.

Each process computes its share of a batch of the flow; then the gradients are summed, a tensor at a time, in
buckets of 25 MiB (`Processes.sum`), or all at once. All ways must give the sum of what the processes have.
Two minutes on two CPU cores, wall time, which other jobs on the machine lengthen:

    torchrun --nproc_per_node=2 -m tests.benchmarks.benchmark_processes --dim 32
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from unittest import mock

import torch
from torch import Tensor

import data
from data import Loader
from metadata_manager import Objective, RunConfig, experiment
from models import ATFM, GTR, STNet, processes
from models.processes import BUCKET, Processes, join, seed_step
from tests.benchmarks.measure import machine, report

WAYS = {"a tensor at a time": 0, f"buckets of {BUCKET / 2**20:g} MiB": BUCKET, "all at once": sys.maxsize}


def gradients(atfm: ATFM, batches: Loader, step: int) -> list[Tensor]:
    """Of this process's share of a batch."""
    seed_step(0, step, batches.rank)
    atfm.net.zero_grad(set_to_none=True)
    for piece in atfm.losses(*batches(step)):
        (batches.weight(step) * piece["loss"]).backward()
    return [weight.grad for weight in atfm.net.parameters() if weight.grad is not None]


def summed(ours: Processes, mine: Sequence[Tensor], bucket: int) -> tuple[list[Tensor], float]:
    """The sum over the processes, and its seconds from when all were ready."""
    found = [tensor.clone() for tensor in mine]
    ours.wait()
    started = perf_counter()
    with mock.patch.object(processes, "BUCKET", bucket):
        ours.sum(found)
    if ours.device.type == "cuda":
        torch.cuda.synchronize(ours.device)
    return found, perf_counter() - started


def require_sum(ours: Processes, mine: Sequence[Tensor], found: Sequence[Tensor], way: str) -> None:
    """Raises SystemExit unless `found` is the sum over the processes of what each has, `mine`."""
    expected = [sum(parts) for parts in zip(*ours.gather([tensor.cpu() for tensor in mine]))]
    for one, other in zip(found, expected, strict=True):
        if not torch.allclose(one.cpu(), other, rtol=1e-5, atol=1e-8):
            off = float((one.cpu() - other).abs().max())
            raise SystemExit(f"{way}: off the sum of the gradients by {off}")


def measured(ours: Processes, atfm: ATFM, batches: Loader, repeats: int) -> list[dict]:
    """A row per way: milliseconds of the gradients and of their sum, and the sum's share of both."""
    computing, exchanging = [], {name: [] for name in WAYS}
    for step in range(repeats + 1):  # the first warms up
        ours.wait()
        started = perf_counter()
        mine = gradients(atfm, batches, step)
        ours.wait()
        computing.append(perf_counter() - started)
        for name, bucket in WAYS.items():
            found, seconds = summed(ours, mine, bucket)
            exchanging[name].append(seconds)
            if step == 0:
                require_sum(ours, mine, found, name)
    compute = statistics.median(computing[1:])
    times = {name: statistics.median(seconds[1:]) for name, seconds in exchanging.items()}
    size = sum(tensor.nbytes for tensor in mine) / 2**20
    return [{"way": name, "tensors": len(mine), "MiB": size, "gradients, ms": 1e3 * compute,
             "sum, ms": 1e3 * time, "share": f"{time / (compute + time):.1%}"}
            for name, time in times.items()]


def main(flags: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", default="LIDC_demo", help="a dataset of metadata_manager")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dim", type=int, default=32, help="width of ST-Net")
    parser.add_argument("--size", type=int, default=48, help="centre crop, pixels per side")
    parser.add_argument("--batch_size", type=int, default=8, help="images per step, of all processes")
    parser.add_argument("--repeats", type=int, default=5, help="steps timed")
    arguments = parser.parse_args(flags)
    found = experiment(arguments.what)
    with join(RunConfig(device=arguments.device)) as ours:
        torch.manual_seed(0)
        train = data.load(replace(found.metadata, crop=arguments.size), "train")
        batches = Loader(train, arguments.batch_size, 0, ours.device, None, ours.rank, ours.count)
        atfm = ATFM(GTR.of(found.gtr, found.metadata.channels), STNet(arguments.dim), Objective(),
                    annotators_per_pass=1).to(ours.device)
        rows = measured(ours, atfm, batches, arguments.repeats)
        report(rows, processes=ours.count, **(vars(arguments) | machine(ours.device) | {"clock": "wall"}))


if __name__ == "__main__":
    main()
