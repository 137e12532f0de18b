"""The training loop of both steps: batch, gradients, step, log, validate, save.

Every step is a function of (seed, step, rank): the batch, and all that is drawn at random. So a run that was
stopped anywhere and is started again with the same command repeats the uninterrupted run, bit for bit on the
CPU.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from metadata_manager import FLOWS, FlowConfig, LoopConfig, OptimizerConfig
from models import checkpoint
from models.processes import Processes, in_bfloat16, lock, seed_step, stop_signals
from models.run import Batches, Run, Terms, Timer, Validation


def train_loop(model: nn.Module, losses: Callable[..., Iterable[dict[str, Tensor]]],
               optimizer: torch.optim.Optimizer, batches: Batches, validate: Callable[[Any], Validation], *,
               folder: Path, about: dict[str, Any], epochs: int, config: LoopConfig, seed: int,
               optimization: OptimizerConfig, processes: Processes) -> None:
    """Trains `model` in place up to `epochs`, going on from folder/last.pt if there is one.

    losses(done, *batch): yields the loss of a batch (image, masks, ...) in pieces, each a dict of "loss" and
    of terms to log; the pieces' sum is the batch's mean. done: the fraction of all steps taken before.
    validate(model) sees the averaged weights, if there are any.
    about: what every checkpoint says of itself, see `loading.describe`. optimization: the learning rate and
    its schedule, clipping and averaging.
    Raises ValueError if the folder is in use or holds a run with other settings; NonFiniteLoss naming the
    batch; SystemExit with 128 + the signal's number after SIGINT, SIGTERM or SIGHUP, saved.
    """
    with lock(folder, processes), stop_signals() as signals:
        # Resume.
        run = Run(model, optimizer, batches, folder, about, config, optimization, processes)
        state = run.state
        run.resume()
        if state.epoch >= epochs:
            print(f"{folder}: already trained for {epochs} epochs; raise the number of epochs to go on")
            return
        timer = Timer(state.step, epochs * len(batches))

        with run.open_board():
            for epoch in range(state.epoch + 1, epochs + 1):
                started, first = time.perf_counter(), state.step
                # disable=None: no bar where the output is not a terminal.
                for step in tqdm(range(first, epoch * len(batches)), f"epoch {epoch}/{epochs}", leave=False,
                                 disable=None if processes.first else True):
                    timer.tell(step)

                    # Batch, and all that is drawn at random in this step.
                    seed_step(seed, step, processes.rank)
                    batch, done = batches(step), step / (epochs * len(batches))

                    # Gradients. Each process has those of its part, already weighted, so their sum is that of
                    # the whole batch. The norm comes after the sum, so that all processes clip alike.
                    terms = backward(losses(done, *batch), batches.weight(step))
                    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
                    processes.sum([*terms.values(), *gradients])
                    terms["gradient_norm"] = norm = torch.nn.utils.get_total_norm(gradients)
                    if optimization.clip:
                        torch.nn.utils.clip_grads_with_norm_(model.parameters(), optimization.clip, norm)

                    # Step, unless the previous step's terms were not finite, which raises. To skip a batch,
                    # this step's terms are needed at once, so that the host waits for the GPU.
                    run.read_terms()
                    if config.skip_nonfinite and not all(value.isfinite() for value in terms.values()):
                        state.totals["skipped_batches"] = state.totals.get("skipped_batches", 0.0) + 1
                    else:
                        run.unread = Terms(step, terms)
                        for group in optimizer.param_groups:
                            group["lr"] = learning_rate(optimization, done)
                        optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    # Before the average, whose decay depends on it, and before a stop, which saves it.
                    state.step += 1
                    if run.average is not None:
                        run.average.update_parameters(model)
                    run.stop_if_asked(signals)

                # Log, validate, save.
                run.log_epoch(epoch, epochs, time.perf_counter() - started, state.step - first)
                if epoch % config.validate_every == 0 or epoch == epochs:
                    run.validate(epoch, validate)
                # Only now is the epoch done: a run that was stopped in a validation repeats the validation.
                state.epoch = epoch
                if epoch % config.save_model_step == 0:
                    run.save(f"epoch_{epoch:04d}.pt")
                # After the others: a run that ends before this repeats them.
                run.save("last.pt")
                run.stop_if_asked(signals)


def backward(pieces: Iterable[dict[str, Tensor]], weight: float) -> dict[str, Tensor]:
    """Adds up the gradients of a loss over its pieces, and returns the sums of its terms.

    weight: of this process's means in those of the whole batch."""
    terms: dict[str, Tensor] = {}
    # `pieces` is a generator: backward() frees the activations of one before the next is computed.
    for piece in pieces:
        (weight * piece["loss"]).backward()
        for name, value in piece.items():
            terms[name] = terms.get(name, 0) + weight * value.detach()
    return terms


def learning_rate(optimization: OptimizerConfig, done: float) -> float:
    """The learning rate of a step before which a fraction `done`, in [0, 1), of all steps was taken."""
    # Half a cosine, from 1 at the first step to 0 after the last.
    falling = (1 + math.cos(math.pi * done)) / 2 if optimization.schedule == "cosine" else 1.0
    return optimization.lr * falling


def settle_precision(config: FlowConfig, folder: Path, device: torch.device) -> FlowConfig:
    """The settings of a flow with --amp auto replaced by True or False.

    It is what the run in `folder` began with, if there is one, else bfloat16 where the device computes in it.
    Prints which, unless it is float32 on a device that has no bfloat16."""
    if config.amp != "auto" or config.method not in FLOWS:
        return config
    usual, last = str(in_bfloat16("auto", device)), folder / "last.pt"
    amp = str(checkpoint.load(last, config.method)["config"].get("amp", False)) if last.exists() else usual
    if amp != usual:
        print(f"{last}: goes on in {'bfloat16' if amp == 'True' else 'float32'}, as it began (--amp {amp})")
    elif amp == "True":
        print("ST-Net's products are in bfloat16 (--amp False: the paper's float32)")
    return replace(config, amp=amp)
