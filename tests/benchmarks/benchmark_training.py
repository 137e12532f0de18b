"""Time of a training step of each stage: the project's code against straightforward code, on embedded data.

Straightforward: images fetched one by one and stacked; GTR's Monte Carlo samples scored one after another
(Eq. 5); the flow's annotators one after another, then one backward pass (Algorithm 1); float32; the
optimizer's update tensor by tensor. Ours: `Loader`, `monte_carlo_nll`, `ATFM.losses` and torch's update
of all tensors, as in `train_loop`. All start from the same weights and must have the same losses in their
first steps. Two minutes on a CPU core:

    python -m tests.benchmarks.benchmark_training --amp
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count

import torch
from torch import Tensor

import data
from data import Loader
from metadata_manager import Experiment, Objective
from models import ATFM, GTR, STNet, monte_carlo_nll
from models.flags import experiment
from models.flow import one_expert
from models.processes import INITIALIZATION, seed_step
from tests.benchmarks import straightforward
from tests.benchmarks.measure import machine, medians, report

SEED, COMPARED = 0, 4  # steps whose losses must be the same
BASELINE = "straightforward"
CPU = torch.device("cpu")
Step = Callable[[], float]  # trains the next step of a run, and gives its loss


def run(pieces: Callable[[Tensor, Tensor], Iterable[Tensor]], batch: Callable[[int], tuple[Tensor, ...]],
        optimizer: torch.optim.Optimizer) -> Step:
    """pieces(image, masks): of a batch's loss; batch(step): image and masks."""
    steps = count()

    def step() -> float:
        number, total = next(steps), torch.zeros(())
        seed_step(SEED, number)
        for loss in pieces(*batch(number)):
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)
    return step


def straightforward_run(loss: Callable[[Tensor, Tensor], Tensor], model: torch.nn.Module, batches: Loader,
                        lr: float) -> Step:
    return run(lambda *batch: [loss(*batch)],
               lambda step: straightforward.load(batches.dataset, batches.indices(step)),
               torch.optim.Adam(model.parameters(), lr, foreach=False, fused=False))


def gtr_ways(settings: Experiment, batches: Loader) -> dict[str, Step]:
    """Step 1: a GTR per way, each trained on a random expert per image as `train_GTR.py` does."""
    lr, m = settings.gtr.lr, settings.gtr.mc_samples

    def untrained() -> GTR:
        seed_step(SEED, INITIALIZATION)
        return GTR.of(settings.gtr, settings.metadata.channels)

    def plain_loss(image: Tensor, masks: Tensor) -> Tensor:
        return straightforward.gtr_loss(first, image, one_expert(masks)[:, 0], m)

    def losses(image: Tensor, masks: Tensor) -> Iterator[Tensor]:
        mask = one_expert(masks)  # drawn first, as in `plain_loss`
        yield monte_carlo_nll(second(image).rsample(m, antithetic=True), mask)

    first, second = untrained(), untrained()
    return {BASELINE: straightforward_run(plain_loss, first, batches, lr),
            "ours": run(losses, batches, torch.optim.Adam(second.parameters(), lr))}


def flow_ways(settings: Experiment, dim: int, batches: Loader, amp: bool) -> dict[str, Step]:
    """Step 2: a flow per way, all over GTRs of the same weights."""
    lr = settings.flow.lr

    def untrained(amp: bool = False) -> ATFM:
        seed_step(SEED, INITIALIZATION)
        gtr = GTR.of(settings.gtr, settings.metadata.channels)
        return ATFM(gtr, STNet(dim), Objective(alpha=settings.flow.alpha), annotators_per_pass=1, amp=amp)

    def ours(atfm: ATFM) -> Step:
        return run(lambda *batch: (piece["loss"] for piece in atfm.losses(*batch)), batches,
                   torch.optim.Adam(atfm.net.parameters(), lr))

    first = untrained()
    plain = straightforward_run(partial(straightforward.flow_loss, first), first.net, batches, lr)
    return {BASELINE: plain, "ours": ours(untrained())} | (
        {"ours, bfloat16": ours(untrained(amp=True))} if amp else {})


def rows_of(stage: str, ways: dict[str, Step], b: int, repeats: int) -> Iterator[dict]:
    """A row per way. Raises SystemExit if a loss is 0.1 % off the straightforward one, or 5 % in bfloat16."""
    losses = {name: [step() for _ in range(COMPARED)] for name, step in ways.items()}
    for name, of_way in losses.items():
        for loss, expected in zip(of_way, losses[BASELINE]):
            if not abs(loss - expected) <= (0.05 if "bfloat16" in name else 1e-3) * abs(expected):
                raise SystemExit(f"{stage}, {name}: losses {of_way}, but straightforward {losses[BASELINE]}")
    times = medians(ways, repeats, CPU, warm_up=False)
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
    parser.add_argument("--repeats", type=int, default=9, help="steps timed")
    asked = parser.parse_args(flags)
    torch.set_num_threads(1)
    settings = experiment(asked.what)
    train = data.load(replace(settings.metadata, crop=asked.size), "train")
    # As many images as make whole batches, so that all steps do the same work.
    batches = Loader(train.spread(COMPARED * asked.batch_size), asked.batch_size, SEED)
    stages = {"GTR": gtr_ways(settings, batches), "flow": flow_ways(settings, asked.dim, batches, asked.amp)}
    rows = [row for stage, ways in stages.items()
            for row in rows_of(stage, ways, asked.batch_size, asked.repeats)]
    report(rows, **(vars(asked) | machine(CPU)))


if __name__ == "__main__":
    main()
