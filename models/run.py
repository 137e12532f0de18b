"""A training run: where it stands, its checkpoints, its log and its end."""

import math
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter

from metadata_manager import LoopConfig, OptimizerConfig
from metrics.program import memory_advice, time_text, with_advice
from models import checkpoint
from models.loading import refuse_other_settings
from models.processes import NonFiniteLoss, Processes, leave, peak_memory

# How scalars are printed for which a number without its unit says little.
TEXTS: dict[str, Callable[[float], str]] = {
    "speed/images_per_second": lambda value: f"{value:.3g} images/s",
    "speed/hours_left": lambda value: f"{time_text(3600 * value)} left",
    "memory/peak_GiB": lambda value: f"memory {value:.2g} GiB"}
# The first steps are slower, because they prepare what the others use, such as memory.
UNTIMED_STEPS, TIMED_STEPS = 3, 10


class Batches(Protocol):
    """This process's part of batch number `step`, a function of (seed, step); len() steps make an epoch.

    weight: of this process's mean loss in that of the whole batch. size, ids: of the whole batch's images."""

    def __len__(self) -> int: ...
    def __call__(self, step: int) -> tuple[Tensor, ...]: ...
    def weight(self, step: int) -> float: ...
    def size(self, step: int) -> int: ...
    def ids(self, step: int) -> list[str]: ...


@dataclass(frozen=True)
class Validation:
    """Scores on held-out images and a picture (h, w, 3) uint8. best.pt has the lowest first score."""

    scores: dict[str, float]
    picture: np.ndarray


@dataclass
class State:
    """Where a run stands; a checkpoint keeps all of it."""

    step: int = 0  # done
    epoch: int = 0  # trained, validated and saved
    images: int = 0  # of the epoch that is not finished
    totals: dict[str, float] = field(default_factory=dict)  # of its loss terms, over those images
    best: float = math.inf  # validation score


class Terms:
    """The loss terms of a step, on their way from its device.

    The host reads them one step later and waits for them then, that is, for that step's gradients and no
    longer. So the host is at most one step ahead of a GPU, and the GPU need not wait for the host."""

    def __init__(self, step: int, terms: dict[str, Tensor]) -> None:
        self.step, self.names = step, list(terms)
        values = torch.stack(list(terms.values()))
        # From a GPU into pinned memory, while the host goes on: it reads them only after the event.
        self.values = values.to("cpu", non_blocking=True)
        self.copied = torch.cuda.Event() if values.is_cuda else None
        if self.copied is not None:
            self.copied.record()

    def read(self) -> dict[str, float]:
        """The terms by name."""
        if self.copied is not None:
            self.copied.synchronize()
        return dict(zip(self.names, self.values.tolist()))


@dataclass
class Run:
    """A training run: what is trained, where it stands, and the folder that it is kept in."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Batches
    folder: Path
    about: dict[str, Any]
    config: LoopConfig
    optimization: OptimizerConfig
    processes: Processes
    state: State = field(default_factory=State)
    average: AveragedModel | None = None  # of the weights
    unread: Terms | None = None  # of the last step, not in the state's totals yet
    board: SummaryWriter | None = None  # of the first process

    def __post_init__(self) -> None:
        if self.optimization.ema:
            self.average = moving_average(self.model, self.optimization.ema, self.state)

    @property
    def measure(self) -> dict[str, int]:
        """What a validation score is measured with; scores of other images or samples do not compare."""
        return {"images": self.config.val_images, "samples": self.config.val_samples,
                "steps": self.config.val_steps}

    def save(self, name: str) -> None:
        """Writes a checkpoint: the weights to use (averaged, if they are), and all that resuming needs."""
        if not (self.config.save_model and self.processes.first):
            return
        # "model" has the weights to use. Training goes on from those without averaging.
        content = {**self.about, "state": vars(self.state), "optimizer": self.optimizer.state_dict(),
                   "measure": self.measure, "model": self.model.state_dict()}
        if self.average is not None:
            content["unaveraged"] = [weight.detach() for weight in self.model.parameters()]
            content["model"] = self.average.module.state_dict()
        checkpoint.save(self.folder / name, content)

    def resume(self) -> None:
        """Goes on from folder/last.pt, if there is one, after checking that it is of the same run."""
        path = self.folder / "last.pt"
        if path.exists():
            self.load(path, checkpoint.load(path, self.about["stage"]))
            print(f"{path}: going on after step {self.state.step}")
        # Each process has read its machine's file, and it has to be the same one.
        self.processes.check_same((self.state.step, checkpoint.fingerprint(self.model)),
                                  "where the run stands (step, weights)")

    def load(self, path: Path, content: dict[str, Any]) -> None:
        """Fills model, average, optimizer and state from a checkpoint's content."""
        refuse_other_settings(content, self.about["config"], path)
        checkpoint.fill(self.model, content, path)
        if self.average is not None:
            checkpoint.fill(self.average.module, content, path)
            with torch.no_grad():
                for parameter, weight in zip(self.model.parameters(), content["unaveraged"], strict=True):
                    parameter.copy_(weight)
        self.optimizer.load_state_dict(content["optimizer"])
        state, saved = self.state, content["state"]
        # Older checkpoints do not count epochs. They were written before an epoch's log, with totals, or at
        # its end, without. Others replace this number just below.
        state.epoch = (saved["step"] - bool(saved["totals"])) // len(self.batches)
        for name, value in saved.items():
            setattr(state, name, value)
        if content.get("measure", self.measure) != self.measure and state.best < math.inf:
            state.best = math.inf
            print(f"{path}: validated otherwise until now ({content['measure']} there, {self.measure} here), "
                  "so scores do not compare: best.pt is chosen anew from the next validation on")

    def open_board(self) -> Any:
        """TensorBoard's file, to be used as a context; only the first process has one."""
        if not self.processes.first:
            return nullcontext()
        # Hides what was logged after the checkpoint. A finished epoch's scalars have the number of its last
        # step, so they stay.
        purge = self.state.step + (0 if self.state.totals else 1)
        self.board = SummaryWriter(str(self.folder), purge_step=purge)
        return self.board

    def read_terms(self) -> None:
        """Adds the last step's terms to the epoch's totals; raises NonFiniteLoss if they are not finite."""
        if self.unread is None:
            return
        step, values, self.unread = self.unread.step, self.unread.read(), None
        if not all(map(math.isfinite, values.values())):
            text = ", ".join(f"{name} {value:g}" for name, value in values.items())
            last = self.folder / "last.pt"
            saved = f"{last} is from before this step. " if last.exists() else ""
            raise NonFiniteLoss(f"step {step}: {text} on the images {'; '.join(self.batches.ids(step))}. "
                                f"{saved}Lower --lr, look at these images, or pass --skip_nonfinite True to "
                                "leave such batches out")
        images = self.batches.size(step)
        for name, value in values.items():
            self.state.totals[name] = self.state.totals.get(name, 0.0) + value * images
        self.state.images += images

    def log_epoch(self, epoch: int, epochs: int, seconds: float, steps: int) -> None:
        """Logs the means of the epoch's terms over its images, and the speed of its last `steps`."""
        self.read_terms()
        state = self.state
        # The run was stopped between this epoch's log and its validation: it is logged already.
        if not (state.images or state.totals):
            return
        skipped = state.totals.pop("skipped_batches", 0.0)
        # There are no images where every batch was skipped.
        scalars = {f"train/{name}": total / max(state.images, 1) for name, total in state.totals.items()}
        if self.config.skip_nonfinite:
            scalars["train/skipped_batches"] = skipped
        scalars["train/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        # No steps: the run went on after the epoch's last one.
        if steps:
            of_epoch = seconds * len(self.batches) / steps
            scalars["speed/images_per_second"] = state.images / of_epoch
            scalars["speed/hours_left"] = (epochs - epoch) * of_epoch / 3600
        scalars["memory/peak_GiB"] = peak_memory() / 2**30
        self.log(f"epoch {epoch}/{epochs}", scalars)
        state.images, state.totals = 0, {}

    def validate(self, epoch: int, validate: Callable[[Any], Validation]) -> None:
        """Validates, logs the scores and writes best.pt if they are the best so far."""
        # First, because a validation can run out of memory, and the epoch would be lost.
        self.save("last.pt")
        if self.board is None:
            return
        with memory_advice("in validation: a smaller --val_samples (in proportion)"):
            validation = validate(self.model if self.average is None else self.average.module)
        self.board.add_image("validation/samples", validation.picture, self.state.step, dataformats="HWC")
        self.log(f"epoch {epoch} validation",
                 {f"validation/{name}": value for name, value in validation.scores.items()})
        # best.pt is of a finished epoch.
        self.state.epoch, score = epoch, next(iter(validation.scores.values()))
        if score < self.state.best:
            self.state.best = score
            self.save("best.pt")

    def log(self, title: str, scalars: dict[str, float]) -> None:
        """Scalars "group/name" to TensorBoard, and as a line to log.txt and the screen."""
        if self.board is None:
            return
        for name, value in scalars.items():
            self.board.add_scalar(name, value, self.state.step)
        line = f"{title}: " + "  ".join(
            TEXTS[name](value) if name in TEXTS else f"{name.rpartition('/')[2]} {value:.5g}"
            for name, value in scalars.items())
        print(line)
        with open(self.folder / "log.txt", "a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def stop_if_asked(self, signals: list[int]) -> None:
        """After a signal to any of the processes: saves, and exits with the code that a shell gives it."""
        if not self.processes.any(bool(signals)):
            return
        # Terms first: weights after a step that was not finite are not saved.
        self.read_terms()
        self.save("last.pt")
        # torchrun ends all processes when the first exits: here they wait until the checkpoint is written.
        self.processes.check_same((self.state.step, checkpoint.fingerprint(self.model)),
                                  "what was trained (step, weights)")
        kept = "saved; the same command goes on from here" if self.config.save_model else "nothing saved"
        # Where the signal came to another process, this one ends in the same way.
        leave(signals or [signal.SIGTERM], f" after step {self.state.step}: {kept}",
              quiet=not self.processes.first)


def moving_average(model: nn.Module, decay: float, state: State) -> AveragedModel:
    """Exponential moving average of a model's weights.

    Its decay after step s is at most s / (s + 10), so that early averages forget the initialization."""

    def update(averages: Any, weights: Any, _: Any) -> None:
        torch._foreach_lerp_(averages, weights, 1 - min(decay, state.step / (state.step + 10)))

    average = AveragedModel(model, multi_avg_fn=update)
    # AveragedModel copies at its first update, so that the first step is already averaged.
    average.update_parameters(model)
    return average


class Timer:
    """Says once, after the first steps of a run, how long the others take."""

    def __init__(self, first: int, steps: int) -> None:
        self.begin, self.steps, self.started = first + UNTIMED_STEPS, steps, 0.0

    def tell(self, step: int) -> None:
        """Called before each step."""
        if step == self.begin:
            self.started = time.perf_counter()
        if step == self.begin + TIMED_STEPS:
            each = (time.perf_counter() - self.started) / TIMED_STEPS
            print(duration_text(each, self.steps - step), flush=True)


def duration_text(seconds_per_step: float, steps: int) -> str:
    """A line on how long the remaining steps take; if that is over a day, also on what makes it shorter."""
    seconds = seconds_per_step * steps
    text = f"about {time_text(seconds)} for {steps:,} steps on this machine, without validation"
    return with_advice(text, seconds, "fewer epochs (--epochs of GTR, --num_epochs), a narrower --dim, "
                       "--crop, several GPUs (torchrun --nproc_per_node 4)")
