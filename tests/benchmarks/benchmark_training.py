"""Time of a training step of each stage: the project's loop against a straightforward one, on embedded data.

Straightforward: images fetched one by one and stacked; GTR's Monte Carlo samples scored one after another
(Eq. 5); the flow's annotators one after another, then one backward pass (Algorithm 1); float32; the
optimizer's update tensor by tensor; the loss read at once. Ours: `Run.step`, which `fit` repeats. All start
from the same weights and must report the same losses in their first steps. "waiting" is the time of making a
batch as a share of the step. Two minutes on a CPU core:

    python -m tests.benchmarks.benchmark_training --amp
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import data
from data import Batches
from metadata_manager import Experiment, LoopConfig, experiment
from models import ATFM, GTR, STNet, monte_carlo_nll
from models.flow import one_expert
from models.parallel import ALONE, Part
from models.systems import build_gtr
from models.training import Losses, Run, seed_step
from tests.benchmarks import straightforward
from tests.benchmarks.measure import machine, medians, report, seconds

SEED, CHECKED_STEPS = 0, 3
BASELINE = "straightforward"
Step = Callable[[], Tensor]  # trains one step and returns its loss


def our_steps(model: nn.Module, losses: Losses, batches: Batches, lr: float) -> Step:
    """Steps of the project's training loop."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    run = Run(model, optimizer, losses, batches, Path(), {}, LoopConfig(), SEED, average=None,
              processes=ALONE, stop=[])

    def step() -> Tensor:
        run.step()
        return run.state.pending[2]["loss"]

    return step


def plain_steps(model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], batches: Batches, lr: float,
                device: torch.device) -> Step:
    """Steps as one would first write them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, foreach=False, fused=False)
    done = 0

    def step() -> Tensor:
        nonlocal done
        seed_step(SEED, done)
        image, masks = straightforward.load(batches.dataset, batches.rows(done))
        loss = loss_of(image.to(device), masks.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        done += 1
        return torch.tensor(loss.item())

    return step


def gtr_ways(found: Experiment, batches: Callable[[str], Batches], device: torch.device) -> dict[str, Step]:
    """Step 1: a GTR per way, each trained on a random expert per image as `train_gtr` does."""
    lr, m = found.gtr.lr, found.gtr.mc_samples

    def untrained() -> GTR:
        seed_step(SEED, -1)
        return build_gtr(found.metadata, found.gtr).to(device)

    def plain_loss(image: Tensor, masks: Tensor) -> Tensor:
        return straightforward.gtr_loss(plain, image, one_expert(masks)[:, 0], m)

    def our_losses(image: Tensor, masks: Tensor, part: Part) -> list[dict[str, Tensor]]:
        mask = one_expert(masks, part)
        return [{"loss": monte_carlo_nll(model(image).rsample(m, antithetic=True, part=part), mask)}]

    plain, model = untrained(), untrained()
    return {BASELINE: plain_steps(plain, plain_loss, batches("cpu"), lr, device),
            "ours": our_steps(model, our_losses, batches(str(device)), lr)}


def flow_ways(found: Experiment, dim: int, batches: Callable[[str], Batches], device: torch.device, amp: bool
              ) -> dict[str, Step]:
    """Step 2: a flow per way, all over GTRs of the same weights."""
    def untrained(annotators_per_pass: int | None = None, amp: bool = False) -> ATFM:
        seed_step(SEED, -1)
        return ATFM(build_gtr(found.metadata, found.gtr), STNet(dim), alpha=found.prior.alpha,
                    annotators_per_pass=annotators_per_pass, amp=amp).to(device)

    lr, plain = found.prior.lr, untrained()
    models = {"ours, an annotator per pass": untrained(1), "ours, all in a pass": untrained()}
    if amp:
        models["ours, an annotator per pass, bfloat16"] = untrained(1, amp=True)
        models["ours, all in a pass, bfloat16"] = untrained(amp=True)
    ways = {BASELINE: plain_steps(plain.net, lambda *batch: straightforward.flow_loss(plain, *batch),
                                  batches("cpu"), lr, device)}
    for name, model in models.items():
        ways[name] = our_steps(model.net, model.losses, batches(str(device)), lr)
    return ways


def require_same_losses(stage: str, ways: dict[str, Step]) -> None:
    """Raises SystemExit if first losses are 0.1 % off the straightforward ones, or 5 % in bfloat16."""
    losses = {name: [float(step()) for _ in range(CHECKED_STEPS)] for name, step in ways.items()}
    for name, found in losses.items():
        for ours, expected in zip(found, losses[BASELINE]):
            if not abs(ours - expected) <= (0.05 if "bfloat16" in name else 1e-3) * abs(expected):
                raise SystemExit(f"{stage}, {name}: losses {found}, but straightforward {losses[BASELINE]}")


def rows_of(stage: str, ways: dict[str, Step], batches: Batches, repeats: int, device: torch.device
            ) -> Iterator[dict]:
    """A row per way, after the check."""
    def median(make: Callable[[int], object]) -> float:
        return statistics.median(seconds(partial(make, step), device) for step in range(20))

    require_same_losses(stage, ways)
    times = medians(ways, repeats, device)
    item_by_item = median(lambda step: straightforward.load(batches.dataset, batches.rows(step)))
    at_once = median(batches)
    for name, time in times.items():
        waiting = (item_by_item if name == BASELINE else at_once) / time
        yield {"stage": stage, "way": name, "ms per step": 1e3 * time,
               "images per s": batches.batch_size / time, "times faster": times[BASELINE] / time,
               "waiting": f"{waiting:.2%}"}


def main(flags: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", default="LIDC_demo", help="a dataset of metadata_manager")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", action="store_true", help="rows in bfloat16 too (the flow only)")
    parser.add_argument("--dim", type=int, default=16, help="width of ST-Net")
    parser.add_argument("--size", type=int, default=48, help="centre crop, pixels per side")
    parser.add_argument("--batch_size", type=int, default=8, help="images per step")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps per median")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; more need idle cores")
    arguments = parser.parse_args(flags)
    torch.set_num_threads(arguments.threads)
    device, found = torch.device(arguments.device), experiment(arguments.what)
    found = replace(found, metadata=replace(found.metadata, crop=arguments.size))

    def batches(where: str) -> Batches:
        return Batches(data.load(found.metadata, "train"), arguments.batch_size, SEED, where)

    stages = {"GTR": gtr_ways(found, batches, device),
              "flow": flow_ways(found, arguments.dim, batches, device, arguments.amp)}
    rows = [row for stage, ways in stages.items()
            for row in rows_of(stage, ways, batches(str(device)), arguments.repeats, device)]
    report(rows, **(vars(arguments) | machine(device)))


if __name__ == "__main__":
    main()
