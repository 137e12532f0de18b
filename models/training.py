"""The training loop of both stages: resume, step, log, validate, save.

Every step reseeds from (seed, step) and takes the batch that (seed, step) determines, so a run that was
stopped anywhere and started again with the same command repeats the uninterrupted run, bit for bit on the
CPU.
"""

import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from metadata_manager import LoopConfig
from models import checkpoint
from models.parallel import ALONE, Part, Processes
from models.process import claimed, peak_memory, seed_step, stop_requests

# Settings that may differ when a run goes on: none of them alters what a step computes, beyond rounding.
MAY_CHANGE = {"data_path", "epochs", "num_epochs", "gtr", "alphas", "solver", "steps", "annotators_per_pass",
              "checkpoint", "channels_last", "compile"}

FINGERPRINTS = {"gtr_weights": "over another GTR", "training_images": "on other images"}  # said in words

Losses = Callable[[Tensor, Tensor, Part], Iterable[dict[str, Tensor]]]


class Batches(Protocol):
    """Batch number `step` as a pure function of (seed, step); len() is the number of steps per epoch."""

    def __len__(self) -> int: ...
    def __call__(self, step: int) -> tuple[Tensor, Tensor]: ...
    def ids(self, step: int) -> list[str]: ...


@dataclass(frozen=True)
class Validation:
    """Scores on held-out images, the first of which marks the best checkpoint where it is lowest.

    picture: (h, w, 3) uint8."""

    scores: dict[str, float]
    picture: np.ndarray


@dataclass
class State:
    """Where a run stands: steps done; of this epoch images, sums of terms and skipped batches; best score.

    `pending` are the terms of the last step, looked at one step later: a GPU never waits for the host.
    """

    step: int = 0
    images: int = 0
    totals: dict[str, float] = field(default_factory=dict)
    best: float = math.inf
    pending: tuple[int, int, dict[str, Tensor]] | None = None  # step, images, terms

    def finished_epochs(self, steps: int) -> int:
        """Epochs of `steps` steps that are done and logged: not one that a stop ended after its last step."""
        return (self.step - bool(self.totals)) // steps


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient is not finite."""


def fit(model: nn.Module, losses: Losses, batches: Batches, validate: Callable[[], Validation], *,
        folder: Path, content: dict[str, Any], epochs: int, lr: float, weight_decay: float, loop: LoopConfig,
        seed: int, ema: float = 0.0, processes: Processes = ALONE) -> None:
    """Trains `model` in place to `epochs`, going on from folder/last.pt if there is one.

    losses(image, masks, part): pieces of the loss of a part of the batch, each a dict with "loss" and terms
    to log, see `ATFM.losses`.
    content: what every checkpoint says about itself: stage, config, and whatever its reader needs.
    ema: decay of the moving average of the weights that is validated and saved; 0: the weights themselves.
    processes: those that train together, each on its part of every batch; they see the same folder.
    Raises ValueError for a setting of the loop below 1, and if the folder is in use or holds a run with
    another config; NonFiniteLoss naming the batch; SystemExit with 128 + the signal's number after SIGINT or
    SIGTERM, the run saved.
    """
    for name in ("save_model_step", "validate_every", "val_images", "val_samples", "val_steps"):
        if getattr(loop, name) < 1:
            raise ValueError(f"--{name} {getattr(loop, name)}: expected at least 1")
    folder.mkdir(parents=True, exist_ok=True)
    with claimed(folder, processes), stop_requests() as stop:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
        average = Average(model, ema) if ema else None
        run = Run(model, optimizer, losses, batches, folder, content, loop, seed, average, processes, stop)
        run.resume()
        finished = run.state.finished_epochs(len(batches))
        if finished >= epochs:
            print(f"{folder}: already trained for {epochs} epochs; raise the number of epochs to go on")
            return
        # What a lost epoch logged is hidden; a finished one's scalars carry the number of its last step.
        unlogged = run.state.step + (0 if run.state.totals else 1)
        writer = SummaryWriter(str(folder), purge_step=unlogged) if processes.first else nullcontext()
        with writer as run.board:
            for epoch in range(finished + 1, epochs + 1):
                run.epoch(f"epoch {epoch}/{epochs}", epoch * len(batches))
                if epoch % loop.validate_every == 0 or epoch == epochs:
                    run.validate(epoch, validate)
                if epoch % loop.save_model_step == 0:
                    run.save(f"epoch_{epoch:04d}.pt")
                run.save("last.pt")  # after the others: a run that ends before it repeats the epoch and them
                run.stop_if_asked()


class Average:
    """Exponential moving average of a model's weights; its decay after step s is at most s / (s + 10)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Raises ValueError unless 0 < decay < 1."""
        if not 0 < decay < 1:
            raise ValueError(f"--ema {decay:g}: expected 0 (none), or a decay below 1 such as 0.999")
        self.parameters: list[Tensor] = list(model.parameters())
        self.values = [parameter.detach().clone() for parameter in self.parameters]
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights as they are after `step` steps."""
        decay = min(self.decay, step / (step + 10))  # early averages forget the initialization
        torch._foreach_lerp_(self.values, self.parameters, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the model's weights and the average."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            held = parameter.clone()
            parameter.copy_(value)
            value.copy_(held)


@dataclass
class Run:
    """A training run: what it trains, where it writes, and its state."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: Losses
    batches: Batches
    folder: Path
    content: dict[str, Any]
    loop: LoopConfig
    seed: int
    average: Average | None
    processes: Processes
    stop: list[int]  # signals received
    state: State = field(default_factory=State)
    board: SummaryWriter | None = None  # of the first process

    def epoch(self, title: str, end: int) -> None:
        """Steps up to number `end`, then a line in log.txt and the means of the loss terms in TensorBoard."""
        started, first = time.perf_counter(), self.state.step
        for _ in tqdm(range(first, end), title, leave=False, disable=None if self.processes.first else True):
            self.step()
            self.stop_if_asked()
        self.settle()
        seconds = time.perf_counter() - started
        skipped = self.state.totals.pop("skipped_batches", 0.0)
        images = max(self.state.images, 1)
        scalars = {f"train/{name}": total / images for name, total in self.state.totals.items()}
        if self.loop.skip_nonfinite:
            scalars["train/skipped_batches"] = skipped
        scalars["train/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        scalars["speed/images_per_second"] = self.state.images * (end - first) / (len(self.batches) * seconds)
        scalars["memory/peak_GiB"] = peak_memory() / 2**30
        self.log(title, scalars, end)
        self.state.images, self.state.totals = 0, {}

    def step(self) -> None:
        """One optimizer step on batch number state.step."""
        seed_step(self.seed, self.state.step)
        image, masks = self.batches(self.state.step)
        part = self.processes.part(len(image))
        terms: dict[str, Tensor] = {}
        for piece in self.losses(image, masks, part):
            (part.weight * piece["loss"]).backward()
            for name, value in piece.items():
                terms[name] = terms.get(name, 0) + part.weight * value.detach()
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        self.processes.add([*terms.values(), *gradients])
        terms["gradient_norm"] = torch.nn.utils.get_total_norm(gradients)
        self.settle()
        if self.loop.skip_nonfinite and not all(value.isfinite() for value in terms.values()):
            self.state.totals["skipped_batches"] = self.state.totals.get("skipped_batches", 0.0) + 1
        else:
            self.state.pending = (self.state.step, len(image), terms)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        if self.average is not None:
            self.average.update(self.state.step)

    def settle(self) -> None:
        """Adds the last step's terms to the epoch's totals; raises NonFiniteLoss if they are not finite."""
        if self.state.pending is None:
            return
        (step, images, terms), self.state.pending = self.state.pending, None
        values = dict(zip(terms, torch.stack(list(terms.values())).tolist()))
        if not all(map(math.isfinite, values.values())):
            found = ", ".join(f"{name} {value:g}" for name, value in values.items())
            raise NonFiniteLoss(
                f"step {step}: {found} on the images {'; '.join(self.batches.ids(step))}. "
                f"{self.folder / 'last.pt'} is from before this step. Lower --lr, look at these images, or "
                "pass --skip_nonfinite True to leave such batches out")
        for name, value in values.items():
            self.state.totals[name] = self.state.totals.get(name, 0.0) + value * images
        self.state.images += images

    def validate(self, epoch: int, validate: Callable[[], Validation]) -> None:
        """Logs scores, and a picture to TensorBoard; writes best.pt if the first score is the lowest."""
        if self.board is None:
            return
        with self.averaged():
            result = validate()
        self.board.add_image("validation/samples", result.picture, self.state.step, dataformats="HWC")
        scalars = {f"validation/{name}": value for name, value in result.scores.items()}
        self.log(f"epoch {epoch} validation", scalars, self.state.step)
        score = next(iter(result.scores.values()))
        if score < self.state.best:
            self.state.best = score
            self.save("best.pt")

    def stop_if_asked(self) -> None:
        """After a signal to any process, saves and exits with the code that a shell gives for that signal."""
        if not self.processes.any(bool(self.stop)):
            return
        number = self.stop[0] if self.stop else signal.SIGTERM
        self.settle()
        self.save("last.pt")
        self.processes.any(False)  # the first to exit ends the others: wait until the checkpoint is written
        kept = "saved; the same command goes on from here" if self.loop.save_model else "nothing saved"
        if self.processes.first:
            print(f"\n{signal.Signals(number).name} after step {self.state.step}: {kept}", file=sys.stderr)
        raise SystemExit(128 + number)

    def save(self, name: str) -> None:
        """Writes folder/name, unless the run is not to leave checkpoints, or another process writes them."""
        if not self.loop.save_model or not self.processes.first:
            return
        state = {name: getattr(self.state, name) for name in ("step", "images", "totals", "best")}
        content = {**self.content, "state": state, "optimizer": self.optimizer.state_dict()}
        with self.averaged():
            content["model"] = self.model.state_dict()
            if self.average is not None:
                content["unaveraged"] = self.average.values  # swapped: the weights that training goes on with
            checkpoint.save(self.folder / name, content)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model has the averaged weights within, if there are any."""
        if self.average is None:
            yield
            return
        self.average.swap()
        try:
            yield
        finally:
            self.average.swap()

    def resume(self) -> None:
        """Goes on from folder/last.pt, if there is one, after checking that it is the same run."""
        path = self.folder / "last.pt"
        if not path.exists():
            return
        found = checkpoint.load(path, self.content["stage"])
        theirs, ours = found["config"], self.content["config"]
        names = sorted((theirs.keys() | ours.keys()) - MAY_CHANGE)
        different = [FINGERPRINTS.get(name) or f"{name} {theirs.get(name)} there, {ours.get(name)} here"
                     for name in names if theirs.get(name) != ours.get(name)]
        if different:
            raise ValueError(f"{path}: a run with other settings ({'; '.join(different)}); use those, "
                             "another --output_path, or delete the folder")
        checkpoint.fill(self.model, found, path)
        if self.average is not None:  # checkpoints hold the average as the model
            self.average = Average(self.model, self.average.decay)
            with torch.no_grad():
                for parameter, weight in zip(self.average.parameters, found["unaveraged"], strict=True):
                    parameter.copy_(weight)
        self.optimizer.load_state_dict(found["optimizer"])
        self.state = State(**found["state"])
        print(f"{path}: going on after step {self.state.step}")

    def log(self, title: str, scalars: dict[str, float], step: int) -> None:
        """Scalars "group/name" to TensorBoard, and as a line to log.txt and the screen."""
        if self.board is None:
            return
        for name, value in scalars.items():
            self.board.add_scalar(name, value, step)
        line = f"{title}: " + "  ".join(
            f"{name.rpartition('/')[2]} {value:.5g}" for name, value in scalars.items())
        print(line)
        with open(self.folder / "log.txt", "a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
