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

    losses(done, *batch): pieces of the loss of a batch (image, masks, ...) before which a fraction `done` of
    all steps was taken, each a dict of "loss" and of terms to log; the pieces' sum is the batch's mean.
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
                for step in tqdm(range(first, epoch * len(batches)), f"epoch {epoch}/{epochs}", leave=False,
                                 disable=None if processes.first else True):  # None: where nobody sees it
                    timer.tell(step)

                    # Batch, and all that is drawn at random in this step.
                    seed_step(seed, step, processes.rank)
                    batch, done = batches(step), step / (epochs * len(batches))

                    # Gradients.
                    terms = backward(losses(done, *batch), batches.weight(step))
                    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
                    processes.sum([*terms.values(), *gradients])
                    terms["gradient_norm"] = norm = torch.nn.utils.get_total_norm(gradients)
                    if optimization.clip:
                        torch.nn.utils.clip_grads_with_norm_(model.parameters(), optimization.clip, norm)

                    # Step.
                    run.read_terms()
                    if config.skip_nonfinite and not all(value.isfinite() for value in terms.values()):
                        state.totals["skipped_batches"] = state.totals.get("skipped_batches", 0.0) + 1
                    else:
                        run.unread = Terms(step, terms)
                        for group in optimizer.param_groups:
                            group["lr"] = learning_rate(optimization, done)
                        optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    state.step += 1
                    if run.average is not None:
                        run.average.update_parameters(model)
                    run.stop_if_asked(signals)

                # Log, validate, save.
                run.log_epoch(epoch, epochs, time.perf_counter() - started, state.step - first)
                if epoch % config.validate_every == 0 or epoch == epochs:
                    run.validate(epoch, validate)
                state.epoch = epoch
                if epoch % config.save_model_step == 0:
                    run.save(f"epoch_{epoch:04d}.pt")
                run.save("last.pt")  # after the others: a run that ends before it repeats them
                run.stop_if_asked(signals)


def backward(pieces: Iterable[dict[str, Tensor]], weight: float) -> dict[str, Tensor]:
    """Adds up the gradients of a loss and gives its terms, sums over its pieces.

    Piece by piece, so that the activations of one are freed before the next. weight: of this process's means
    in the whole batch's."""
    terms: dict[str, Tensor] = {}
    for piece in pieces:
        (weight * piece["loss"]).backward()
        for name, value in piece.items():
            terms[name] = terms.get(name, 0) + weight * value.detach()
    return terms


def learning_rate(optimization: OptimizerConfig, done: float) -> float:
    """The learning rate of a step before which a fraction `done`, in [0, 1), of all steps was taken."""
    falling = (1 + math.cos(math.pi * done)) / 2 if optimization.schedule == "cosine" else 1.0
    return optimization.lr * falling


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
