"""The training loop of both steps: batch, gradients, step, log, validate, save.

Every step is a function of (seed, step, rank): the batch, and all that is drawn at random. So a run that was
stopped anywhere and is started again with the same command repeats the uninterrupted run, bit for bit on the
CPU.
"""

import math
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from metadata_manager import BASELINES, FLOWS, FlowConfig, GTRConfig, LoopConfig, Metadata, OptimizerConfig
from metrics.program import DAY, memory_advice, time_text
from models import checkpoint
from models.loading import REMOVED, refuse_removed
from models.processes import (
    NonFiniteLoss,
    Processes,
    in_bfloat16,
    leave,
    lock,
    peak_memory,
    seed_step,
    stop_signals,
)

# Settings that a run may change when it goes on: none alters what a step computes, beyond rounding.
CHANGEABLE = {"data_path", "epochs", "num_epochs", "gtr", "alphas", "solver", "steps", "temperature",
              "annotators_per_pass", "images_per_pass", "recompute", "channels_last", "compile",
              "checkpoint"}  # what older files call `recompute`
# How scalars are printed whose number alone says little.
TEXTS: dict[str, Callable[[float], str]] = {
    "speed/images_per_second": lambda value: f"{value:.3g} images/s",
    "speed/hours_left": lambda value: f"{time_text(3600 * value)} left",
    "memory/peak_GiB": lambda value: f"memory {value:.2g} GiB"}
UNTIMED_STEPS, TIMED_STEPS = 3, 10  # of a run: the first prepare what the others use
DIFFERENCES = {"gtr_weights": "over another GTR", "training_images": "on other images"}


class Batches(Protocol):
    """This process's part of batch number `step`, a function of (seed, step); len() steps make an epoch."""

    def __len__(self) -> int: ...
    def __call__(self, step: int) -> tuple[Tensor, ...]: ...
    def weight(self, step: int) -> float: ...
    def size(self, step: int) -> int: ...
    def ids(self, step: int) -> list[str]: ...


@dataclass(frozen=True)
class Validation:
    """Scores on held-out images, of which the first chooses best.pt: lower is better.

    picture: (h, w, 3) uint8."""

    scores: dict[str, float]
    picture: np.ndarray


@dataclass
class State:
    """Where a run stands."""

    step: int = 0  # done
    epoch: int = 0  # trained, validated and saved
    images: int = 0  # of the epoch that is not finished
    totals: dict[str, float] = field(default_factory=dict)  # of its loss terms, over those images
    best: float = math.inf  # validation score
    unread: tuple[int, dict[str, Tensor]] | None = None  # the last step and its terms, not in `totals` yet

    def saved(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {kept.name: getattr(self, kept.name) for kept in fields(self) if kept.name != "unread"}


def train_loop(model: nn.Module, losses: Callable[..., Iterable[dict[str, Tensor]]],
               optimizer: torch.optim.Optimizer, batches: Batches, validate: Callable[[Any], Validation], *,
               folder: Path, about: dict[str, Any], epochs: int, config: LoopConfig, seed: int,
               optimization: OptimizerConfig, processes: Processes) -> None:
    """Trains `model` in place up to `epochs`, going on from folder/last.pt if there is one.

    losses(done, *batch): pieces of the loss of a batch (image, masks, ...) before which a fraction `done` of
    all steps was taken, each a dict of "loss" and of terms to log; the pieces' sum is the batch's mean.
    validate(model) sees the averaged weights, if there are any.
    about: what every checkpoint says of itself, see `loading.describe`. optimization: the learning rate and
    its schedule, clipping and averaging.
    Raises ValueError if the folder is in use or holds a run with other settings; NonFiniteLoss naming the
    batch; SystemExit with 128 + the signal's number after SIGINT, SIGTERM or SIGHUP, saved.
    """
    with lock(folder, processes), stop_signals() as signals:
        # State: where the run stands, and the moving average of its weights.
        state = State()
        average = moving_average(model, optimization.ema, state) if optimization.ema else None

        def save(name: str) -> None:
            if config.save_model and processes.first:
                checkpoint.save(folder / name, snapshot(about, model, average, optimizer, state)
                                | {"measure": measure_of(config)})

        # Resume.
        if (folder / "last.pt").exists():
            resume(folder / "last.pt", about, model, average, optimizer, state, len(batches),
                   measure_of(config))
        processes.check_same((state.step, checkpoint.fingerprint(model)),
                             "where the run stands (step, weights)")
        if state.epoch >= epochs:
            print(f"{folder}: already trained for {epochs} epochs; raise the number of epochs to go on")
            return
        # What a lost epoch logged is hidden; a finished epoch's scalars carry the number of its last step.
        purge = state.step + (0 if state.totals else 1)
        timed_from, timer = state.step + UNTIMED_STEPS, 0.0

        with SummaryWriter(str(folder), purge_step=purge) if processes.first else nullcontext() as board:
            for epoch in range(state.epoch + 1, epochs + 1):
                started = time.perf_counter()
                steps = range(state.step, epoch * len(batches))
                for step in tqdm(steps, f"epoch {epoch}/{epochs}", leave=False, disable=quiet(processes)):
                    # How long it takes, said once.
                    if step == timed_from:
                        timer = time.perf_counter()
                    if step == timed_from + TIMED_STEPS:
                        each = (time.perf_counter() - timer) / TIMED_STEPS
                        print(duration_text(each, epochs * len(batches) - step), flush=True)

                    # Batch.
                    seed_step(seed, step, processes.rank)
                    batch = batches(step)
                    weight = batches.weight(step)  # of this process's means in the whole batch's

                    # Gradients, piece by piece, so that a piece's activations are freed before the next.
                    terms: dict[str, Tensor] = {}
                    for piece in losses(step / (epochs * len(batches)), *batch):
                        (weight * piece["loss"]).backward()
                        for name, value in piece.items():
                            terms[name] = terms.get(name, 0) + weight * value.detach()
                    gradients = [parameter.grad for parameter in model.parameters()
                                 if parameter.grad is not None]
                    processes.sum([*terms.values(), *gradients])
                    terms["gradient_norm"] = norm = torch.nn.utils.get_total_norm(gradients)
                    if optimization.clip:
                        torch.nn.utils.clip_grads_with_norm_(model.parameters(), optimization.clip, norm)

                    # Step. The last step's terms are looked at here: the host waits for a GPU to finish this
                    # step's gradients, and not for its update, during which it prepares the next batch.
                    read_terms(state, batches, folder)
                    if config.skip_nonfinite and not all(value.isfinite() for value in terms.values()):
                        state.totals["skipped_batches"] = state.totals.get("skipped_batches", 0.0) + 1
                    else:
                        state.unread = (step, terms)
                        for group in optimizer.param_groups:
                            group["lr"] = learning_rate(optimization, step / (epochs * len(batches)))
                        optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    state.step += 1
                    if average is not None:
                        average.update_parameters(model)

                    # Stop, if a signal asks any of the processes to.
                    if processes.any(bool(signals)):
                        read_terms(state, batches, folder)
                        stop(signals, model, state, config, processes, save)

                # Log, once an epoch.
                read_terms(state, batches, folder)
                if state.images or state.totals:
                    scalars = epoch_means(state, optimizer, config)
                    seconds, fraction = time.perf_counter() - started, len(steps) / len(batches)
                    if fraction:  # 0: resumed after the epoch's last step
                        scalars["speed/images_per_second"] = state.images * fraction / seconds
                        scalars["speed/hours_left"] = (epochs - epoch) * seconds / fraction / 3600
                    scalars["memory/peak_GiB"] = peak_memory() / 2**30
                    log(f"epoch {epoch}/{epochs}", scalars, board, folder, state.step)
                    state.images, state.totals = 0, {}

                # Validate; what was trained is saved first.
                if epoch % config.validate_every == 0 or epoch == epochs:
                    save("last.pt")
                    if board is not None:
                        with memory_advice("in validation: a smaller --val_samples (in proportion)"):
                            validation = validate(model if average is None else average.module)
                        board.add_image("validation/samples", validation.picture, state.step,
                                        dataformats="HWC")
                        scores = {f"validation/{name}": value for name, value in validation.scores.items()}
                        log(f"epoch {epoch} validation", scores, board, folder, state.step)
                        state.epoch, score = epoch, next(iter(validation.scores.values()))
                        if score < state.best:
                            state.best = score
                            save("best.pt")

                # Save.
                state.epoch = epoch
                if epoch % config.save_model_step == 0:
                    save(f"epoch_{epoch:04d}.pt")
                save("last.pt")  # after the others: a run that ends before it repeats them
                if processes.any(bool(signals)):
                    stop(signals, model, state, config, processes, save)


def settle_precision(config: FlowConfig, folder: Path, device: torch.device) -> FlowConfig:
    """The settings of a flow with what --amp auto comes to.

    That is what the run in `folder` began with, if there is one, else bfloat16 where the device computes in
    it. Prints which, unless it is float32 on a device that has no bfloat16."""
    if config.amp != "auto" or config.method not in FLOWS:
        return config
    usual, last = str(in_bfloat16("auto", device)), folder / "last.pt"
    amp = str(checkpoint.load(last, config.method)["config"].get("amp", False)) if last.exists() else usual
    if amp != usual:
        print(f"{last}: goes on in {'bfloat16' if amp == 'True' else 'float32'}, as it began (--amp {amp})")
    elif amp == "True":
        print("ST-Net's products are in bfloat16 (--amp False: the paper's float32)")
    return replace(config, amp=amp)


def duration_text(seconds_per_step: float, steps: int) -> str:
    """A line on how long the steps that remain take, and over a day on what helps."""
    seconds = seconds_per_step * steps
    text = f"about {time_text(seconds)} for {steps:,} steps on this machine, without validation"
    if seconds <= DAY:
        return text
    return (f"{text}. More than a day; what makes it affordable: fewer epochs (--epochs of GTR, "
            "--num_epochs), a narrower --dim, --crop, several GPUs (torchrun --nproc_per_node 4)")


def measure_of(config: LoopConfig) -> dict[str, int]:
    """What a validation score is measured with; scores of other images, samples or steps do not compare."""
    return {"images": config.val_images, "samples": config.val_samples, "steps": config.val_steps}


def learning_rate(optimization: OptimizerConfig, done: float) -> float:
    """The learning rate of a step before which a fraction `done`, in [0, 1), of all steps was taken."""
    falling = (1 + math.cos(math.pi * done)) / 2 if optimization.schedule == "cosine" else 1.0
    return optimization.lr * falling


def moving_average(model: nn.Module, decay: float, state: State) -> AveragedModel:
    """Exponential moving average of a model's weights; its decay after step s is at most s / (s + 10).

    So early averages forget the initialization."""

    def update(averages: Any, weights: Any, _: Any) -> None:
        torch._foreach_lerp_(averages, weights, 1 - min(decay, state.step / (state.step + 10)))

    average = AveragedModel(model, multi_avg_fn=update)
    average.update_parameters(model)  # the first update copies
    return average


def snapshot(about: dict[str, Any], model: nn.Module, average: AveragedModel | None,
             optimizer: torch.optim.Optimizer, state: State) -> dict[str, Any]:
    """A checkpoint's content: the weights to use (averaged, if they are), and all that resuming needs."""
    content = {**about, "state": state.saved(), "optimizer": optimizer.state_dict()}
    if average is None:
        return {**content, "model": model.state_dict()}
    unaveraged = [weight.detach() for weight in model.parameters()]
    return {**content, "model": average.module.state_dict(), "unaveraged": unaveraged}


def resume(path: Path, about: dict[str, Any], model: nn.Module, average: AveragedModel | None,
           optimizer: torch.optim.Optimizer, state: State, steps_per_epoch: int, measure: dict[str, int]
           ) -> None:
    """Fills model, average, optimizer and state from a checkpoint, after checking that it is the same run."""
    content = checkpoint.load(path, about["stage"])
    trained, current = content["config"], about["config"]
    # More epochs would move a falling learning rate, and where the energy score takes over.
    fixed_length = current.get("schedule", "constant") != "constant" or current.get("loss", "nll") != "nll"
    changeable = CHANGEABLE - {"epochs", "num_epochs"} if fixed_length else CHANGEABLE
    refuse_removed(content, path)
    if about["stage"] in BASELINES:  # which are in float32, whatever it says
        changeable = changeable | {"amp"}
    names = sorted((trained.keys() | current.keys()) - changeable - REMOVED.keys())
    # What runs did before there was a setting is its default.
    kinds = (Metadata, GTRConfig if about["stage"] == "GTR" else FlowConfig)
    trained = {setting.name: setting.default for kind in kinds for setting in fields(kind)} | trained
    # --amp was a boolean once.
    trained = {name: str(value) if name == "amp" else value for name, value in trained.items()}
    different = [DIFFERENCES.get(name) or f"{name} {trained.get(name)} there, {current.get(name)} here"
                 for name in names if trained.get(name) != current.get(name)]
    if different:
        raise ValueError(f"{path}: a run with other settings ({'; '.join(different)}); use those, "
                         "another --output_path, or delete the folder")
    checkpoint.fill(model, content, path)
    if average is not None:
        checkpoint.fill(average.module, content, path)
        with torch.no_grad():
            for parameter, weight in zip(model.parameters(), content["unaveraged"], strict=True):
                parameter.copy_(weight)
    optimizer.load_state_dict(content["optimizer"])
    saved = content["state"]
    # An older checkpoint does not count epochs: it was written before the epoch's log, or after all of it.
    state.epoch = (saved["step"] - bool(saved["totals"])) // steps_per_epoch
    for name, value in saved.items():
        setattr(state, name, value)
    print(f"{path}: going on after step {state.step}")
    if content.get("measure", measure) != measure and state.best < math.inf:
        state.best = math.inf
        print(f"{path}: validated otherwise until now ({content['measure']} there, {measure} here), so "
              "scores do not compare: best.pt is chosen anew from the next validation on")


def read_terms(state: State, batches: Batches, folder: Path) -> None:
    """Adds the last step's terms to the epoch's totals; raises NonFiniteLoss if they are not finite."""
    if state.unread is None:
        return
    (step, terms), state.unread = state.unread, None
    values = dict(zip(terms, torch.stack(list(terms.values())).tolist()))
    if not all(map(math.isfinite, values.values())):
        terms_text = ", ".join(f"{name} {value:g}" for name, value in values.items())
        last = folder / "last.pt"
        saved = f"{last} is from before this step. " if last.exists() else ""
        raise NonFiniteLoss(f"step {step}: {terms_text} on the images {'; '.join(batches.ids(step))}. {saved}"
                            "Lower --lr, look at these images, or pass --skip_nonfinite True to leave such "
                            "batches out")
    images = batches.size(step)
    for name, value in values.items():
        state.totals[name] = state.totals.get(name, 0.0) + value * images
    state.images += images


def stop(signals: list[int], model: nn.Module, state: State, config: LoopConfig, processes: Processes,
         save: Callable[[str], None]) -> None:
    """Saves and exits with the code that a shell gives for the signal."""
    save("last.pt")
    # The first to exit ends the others: here all wait until the checkpoint is written.
    processes.check_same((state.step, checkpoint.fingerprint(model)), "what was trained (step, weights)")
    kept = "saved; the same command goes on from here" if config.save_model else "nothing saved"
    leave(signals or [signal.SIGTERM], f" after step {state.step}: {kept}", quiet=not processes.first)


def epoch_means(state: State, optimizer: torch.optim.Optimizer, config: LoopConfig) -> dict[str, float]:
    """Means of the epoch's terms over its images, and the learning rate, by their names in TensorBoard."""
    skipped = state.totals.pop("skipped_batches", 0.0)
    means = {f"train/{name}": total / max(state.images, 1) for name, total in state.totals.items()}
    if config.skip_nonfinite:
        means["train/skipped_batches"] = skipped
    return means | {"train/learning_rate": optimizer.param_groups[0]["lr"]}


def log(title: str, scalars: dict[str, float], board: SummaryWriter | None, folder: Path, step: int) -> None:
    """Scalars "group/name" to TensorBoard, and as a line to log.txt and the screen, by the first process."""
    if board is None:
        return
    for name, value in scalars.items():
        board.add_scalar(name, value, step)
    line = f"{title}: " + "  ".join(
        TEXTS[name](value) if name in TEXTS else f"{name.rpartition('/')[2]} {value:.5g}"
        for name, value in scalars.items())
    print(line)
    with open(folder / "log.txt", "a") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


def quiet(processes: Processes) -> bool | None:
    """For tqdm's `disable`: all but the first process, and it where nobody sees the bar (None)."""
    return None if processes.first else True
