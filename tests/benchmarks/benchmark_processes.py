"""What several processes cost: how much of a training step the sum of gradients takes, in three forms.

Each process computes its part of a batch of the flow; then the gradients are summed, a tensor at a time, in
buckets of 25 MiB (`Processes.sum`), or all at once. All ways must give the sum of what the processes have.
Two minutes on two CPU cores, wall time, which other jobs on the machine lengthen:

    torchrun --nproc_per_node=2 -m tests.benchmarks.benchmark_processes --dim 32
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import data
from data import Loader
from metadata_manager import RunConfig
from models import ATFM, GTR, STNet, processes
from models.flags import experiment
from models.processes import BUCKET, Processes, join, seed_step
from tests.benchmarks.measure import machine, report

WAYS = {"a tensor at a time": 0, f"buckets of {BUCKET / 2**20:g} MiB": BUCKET, "all at once": sys.maxsize}


def gradients(atfm: ATFM, batches: Loader, step: int) -> list[Tensor]:
    """Of this process's part of a batch."""
    seed_step(0, step, batches.rank)
    atfm.net.zero_grad(set_to_none=True)
    for piece in atfm.losses(*batches(step)):
        (batches.weight(step) * piece["loss"]).backward()
    return [weight.grad for weight in atfm.net.parameters() if weight.grad is not None]


def timed(group: Processes, call: Callable[[], Any]) -> tuple[Any, float]:
    """call(), and its seconds from when all processes were ready until all have it."""
    group.wait()
    started = perf_counter()
    result = call()
    if group.device.type == "cuda":
        torch.cuda.synchronize(group.device)
    group.wait()
    return result, perf_counter() - started


def require_sum(group: Processes, parts: Sequence[Tensor], summed: Sequence[Tensor], way: str) -> None:
    """Raises SystemExit unless `summed` is the sum over the processes of what each has."""
    expected = [sum(tensors) for tensors in zip(*group.gather([tensor.cpu() for tensor in parts]))]
    for ours, right in zip(summed, expected, strict=True):
        if not torch.allclose(ours.cpu(), right, rtol=1e-5, atol=1e-8):
            raise SystemExit(f"{way}: off the sum of the gradients by {(ours.cpu() - right).abs().max()}")


def measured(group: Processes, atfm: ATFM, batches: Loader, repeats: int) -> list[dict]:
    """A row per way: milliseconds of the gradients and of their sum, and the sum's fraction of both."""
    computing, summing = [], {name: [] for name in WAYS}
    for step in range(repeats + 1):  # the first warms up
        parts, seconds = timed(group, lambda step=step: gradients(atfm, batches, step))
        computing.append(seconds)
        for name, bucket in WAYS.items():
            tensors = [tensor.clone() for tensor in parts]
            with mock.patch.object(processes, "BUCKET", bucket):
                _, seconds = timed(group, lambda tensors=tensors: group.sum(tensors))
            summing[name].append(seconds)
            if step == 0:
                require_sum(group, parts, tensors, name)
    gradient_time = statistics.median(computing[1:])
    times = {name: statistics.median(seconds[1:]) for name, seconds in summing.items()}
    size = sum(tensor.nbytes for tensor in parts) / 2**20
    return [{"way": name, "tensors": len(parts), "MiB": size, "gradients, ms": 1e3 * gradient_time,
             "sum, ms": 1e3 * time, "fraction": f"{time / (gradient_time + time):.1%}"}
            for name, time in times.items()]


def main(flags: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", default="LIDC_demo", help="a dataset of metadata_manager")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dim", type=int, default=32, help="width of ST-Net")
    parser.add_argument("--size", type=int, default=48, help="centre crop, pixels per side")
    parser.add_argument("--batch_size", type=int, default=8, help="images per step, of all processes")
    parser.add_argument("--repeats", type=int, default=5, help="steps timed")
    asked = parser.parse_args(flags)
    settings = experiment(asked.what)
    with join(RunConfig(device=asked.device)) as group:
        torch.manual_seed(0)
        train = data.load(replace(settings.metadata, crop=asked.size), "train")
        batches = Loader(train, asked.batch_size, 0, group.device, (), group.rank, group.count)
        atfm = ATFM(GTR.of(settings.gtr, settings.metadata.channels), STNet(asked.dim),
                    annotators_per_pass=1).to(group.device)
        rows = measured(group, atfm, batches, asked.repeats)
        report(rows, processes=group.count, **(vars(asked) | machine(group.device) | {"clock": "wall"}))


if __name__ == "__main__":
    main()
