"""Time of a training step of each stage: the project's loop against a straightforward one, on embedded data.

Straightforward: images fetched one by one and stacked; GTR's Monte Carlo samples scored one after another
(Eq. 5); the flow's annotators one after another, then one backward pass (Algorithm 1); float32; the
optimizer's update tensor by tensor; the loss read at once. Ours: `train_loop`. All start from the same
weights and must have the same losses in their first epoch, which is a few steps. Two minutes on a CPU core:

    python -m tests.benchmarks.benchmark_training --amp
"""

import argparse
import io
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import data
from data import Loader
from metadata_manager import Experiment, LoopConfig, Objective, OptimizerConfig
from models import ATFM, GTR, STNet, Validation, monte_carlo_nll, train_loop
from models.flags import experiment
from models.flow import one_expert
from models.processes import INITIALIZATION, Processes, seed_step
from tests.benchmarks import straightforward
from tests.benchmarks.measure import machine, now, report

SEED, STEPS = 0, 4  # steps per epoch
BASELINE = "straightforward"
CPU = torch.device("cpu")
Epoch = Callable[[], list[tuple[float, float]]]  # trains one: of each step when it began, and the loss


def ours(model: nn.Module, losses: Callable[[Tensor, Tensor], Iterable[dict[str, Tensor]]], batches: Loader,
         lr: float) -> Epoch:
    """Epochs of the project's loop."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)

    def epoch() -> list[tuple[float, float]]:
        steps = []

        def noted(done: float, image: Tensor, masks: Tensor) -> Iterator[dict[str, Tensor]]:
            began, pieces = now(CPU), []
            for piece in losses(image, masks):
                pieces.append(piece["loss"].detach())
                yield piece
            steps.append((began, float(sum(pieces))))

        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            train_loop(model, noted, optimizer, batches,
                       lambda _: Validation({"none": 0.0}, np.zeros((1, 1, 3), np.uint8)),
                       folder=Path(folder), about={}, epochs=1, config=LoopConfig(save_model=False),
                       seed=SEED, optimization=OptimizerConfig(lr=lr), processes=Processes(CPU))
        return steps

    return epoch


def plain(model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], batches: Loader, lr: float) -> Epoch:
    """Epochs of a loop as one would first write it."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, foreach=False, fused=False)

    def epoch() -> list[tuple[float, float]]:
        steps = []
        for step in range(len(batches)):
            seed_step(SEED, step)
            image, masks = straightforward.load(batches.dataset, batches.indices(step))
            began = now(CPU)
            loss = loss_of(image, masks)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            steps.append((began, loss.item()))
        return steps

    return epoch


def gtr_ways(settings: Experiment, batches: Loader) -> dict[str, Epoch]:
    """Step 1: a GTR per way, each trained on a random expert per image as `train_GTR.py` does."""
    lr, m = settings.gtr.lr, settings.gtr.mc_samples

    def untrained() -> GTR:
        seed_step(SEED, INITIALIZATION)
        return GTR.of(settings.gtr, settings.metadata.channels)

    def plain_loss(image: Tensor, masks: Tensor) -> Tensor:
        return straightforward.gtr_loss(first, image, one_expert(masks)[:, 0], m)

    def losses(image: Tensor, masks: Tensor) -> Iterator[dict[str, Tensor]]:
        mask = one_expert(masks)  # drawn first, as in `plain_loss`
        yield {"loss": monte_carlo_nll(second(image).rsample(m, antithetic=True), mask)}

    first, second = untrained(), untrained()
    return {BASELINE: plain(first, plain_loss, batches, lr), "ours": ours(second, losses, batches, lr)}


def flow_ways(settings: Experiment, dim: int, batches: Loader, amp: bool) -> dict[str, Epoch]:
    """Step 2: a flow per way, all over GTRs of the same weights."""
    def untrained(amp: bool = False) -> ATFM:
        seed_step(SEED, INITIALIZATION)
        gtr = GTR.of(settings.gtr, settings.metadata.channels)
        return ATFM(gtr, STNet(dim), Objective(alpha=settings.flow.alpha), annotators_per_pass=1, amp=amp)

    first, lr = untrained(), settings.flow.lr
    ways = {BASELINE: plain(first.net, partial(straightforward.flow_loss, first), batches, lr)}
    for bfloat16 in (False, True) if amp else (False,):
        atfm = untrained(bfloat16)
        ways["ours" + ", bfloat16" * bfloat16] = ours(atfm.net, atfm.losses, batches, lr)
    return ways


def require_same_losses(stage: str, losses: dict[str, list[float]]) -> None:
    """Raises SystemExit if one is 0.1 % off the straightforward one, or 5 % in bfloat16."""
    for name, found in losses.items():
        for loss, expected in zip(found, losses[BASELINE]):
            if not abs(loss - expected) <= (0.05 if "bfloat16" in name else 1e-3) * abs(expected):
                raise SystemExit(f"{stage}, {name}: losses {found}, but straightforward {losses[BASELINE]}")


def rows_of(stage: str, ways: dict[str, Epoch], b: int, repeats: int) -> Iterator[dict]:
    """A row per way, after the check. The ways take turns, so that a change in load hits them all."""
    require_same_losses(stage, {name: [loss for _, loss in epoch()] for name, epoch in ways.items()})
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, epoch in ways.items():
            seconds[name] += np.diff([began for began, _ in epoch()]).tolist()
    times = {name: statistics.median(of_steps) for name, of_steps in seconds.items()}
    for name, time in times.items():
        yield {"stage": stage, "way": name, "ms per step": 1e3 * time, "images per s": b / time,
               "times faster": times[BASELINE] / time}


def main(flags: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", default="LIDC_demo", help="a dataset of metadata_manager")
    parser.add_argument("--amp", action="store_true", help="rows in bfloat16 too (the flow only)")
    parser.add_argument("--dim", type=int, default=16, help="width of ST-Net")
    parser.add_argument("--size", type=int, default=48, help="centre crop, pixels per side")
    parser.add_argument("--batch_size", type=int, default=8, help="images per step")
    parser.add_argument("--repeats", type=int, default=3, help=f"epochs timed, of {STEPS - 1} steps each")
    asked = parser.parse_args(flags)
    torch.set_num_threads(1)
    settings = experiment(asked.what)
    train = data.load(replace(settings.metadata, crop=asked.size), "train")
    batches = Loader(train.spread(STEPS * asked.batch_size), asked.batch_size, SEED)
    stages = {"GTR": gtr_ways(settings, batches), "flow": flow_ways(settings, asked.dim, batches, asked.amp)}
    rows = [row for stage, ways in stages.items()
            for row in rows_of(stage, ways, asked.batch_size, asked.repeats)]
    report(rows, **(vars(asked) | machine(CPU)))


if __name__ == "__main__":
    main()
