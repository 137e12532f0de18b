"""Training as the scripts call it: the data, the model and the loop of each stage put together."""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import data
import fig
from data import Batches, Slices
from data.augment import augment
from metadata_manager import LoopConfig, Metadata, PriorConfig
from metrics import evaluate
from models import checkpoint, monte_carlo_nll
from models.atfm import ready
from models.command_line import Settings, parse
from models.flow import one_expert
from models.parallel import Part, Processes, joined
from models.process import place, seed_step
from models.systems import (
    Sampler,
    build_atfm,
    build_gtr,
    check_size,
    describe,
    flow_sampler,
    gtr_sampler,
    load_gtr,
)
from models.training import NonFiniteLoss, Validation, fit

OUT_OF_MEMORY = {  # what helps, most first
    "train_gtr": "a smaller --batchsize (in proportion), fewer --mc_samples",
    "train_prior": "--checkpoint True (the flow's activations to about a fifth), --annotators_per_pass 1 (to "
                   "one of the k annotators'), a smaller --batch_size (in proportion)",
    "test_prior": "a smaller --batch_size (in proportion), --amp True (to about a half)",
}


def reports_errors(stage: Callable[..., None]) -> Callable[..., None]:
    """Ends a script with one line and exit code 1 for what a user can put right, instead of a traceback."""

    @functools.wraps(stage)
    def script(*arguments: Any) -> None:
        try:
            stage(*arguments)
        except torch.cuda.OutOfMemoryError as error:
            helps = OUT_OF_MEMORY.get(stage.__name__, "a smaller picture")
            sys.exit(f"error: out of GPU memory. What helps: {helps}. ({str(error).splitlines()[0]})")
        except (ValueError, OSError, NonFiniteLoss) as error:
            sys.exit(f"error: {error}")

    return script


@reports_errors
def train_gtr(what: str, argv: Sequence[str] | None = None) -> None:
    """Step 1: trains GTR by the Monte Carlo likelihood (Eq. 5) into <output_path>/GTR."""
    settings = parse(argv, what, ("metadata", "gtr", "loop"), "Step 1 of ATFM: train GTR.")
    metadata, config, loop = settings.experiment.metadata, settings.experiment.gtr, settings.experiment.loop
    device, seed = place(settings.run), settings.run.seed
    with joined(device) as processes:
        train, held_out = processes.first_first(lambda: load_pair(metadata, "train"))
        seed_step(seed, -1)
        gtr = build_gtr(metadata, config).to(device)

        def losses(image: Tensor, masks: Tensor, part: Part) -> list[dict[str, Tensor]]:
            image, masks = part.cut(image), part.cut(masks)
            if config.experts == "one":
                masks = one_expert(masks, part)
            logits = gtr(image).rsample(config.mc_samples, antithetic=True, part=part)
            return [{"loss": monte_carlo_nll(logits, masks)}]

        batches = Batches(train, config.batchsize, seed, device, augment if metadata.augment else None)
        fit(gtr, losses, batches,
            functools.partial(validate, gtr_sampler(gtr), held_out, loop, device),
            folder=output(settings) / "GTR",
            content=describe("GTR", metadata, config, seed, None, train.ids, train.fingerprint),
            epochs=config.epochs, lr=config.lr, weight_decay=config.weight_decay, loop=loop, seed=seed,
            ema=config.ema, processes=processes)


@reports_errors
def train_prior(what: str, argv: Sequence[str] | None = None) -> None:
    """Step 2: trains the flow from the frozen GTR (Algorithm 1) into <output_path>/<method>.

    With --alphas a flow for each of them."""
    settings = parse(argv, what, ("metadata", "prior", "loop"), "Step 2 of ATFM: train the flow.")
    config, device = settings.experiment.prior, place(settings.run)
    with joined(device) as processes:
        if not config.alphas:
            train_flow(settings, config, flow_folder(settings, config.method), device, processes)
        for alpha in config.alphas:
            folder = flow_folder(settings, config.method, alpha)
            train_flow(settings, replace(config, alpha=alpha), folder, device, processes)


def train_flow(settings: Settings, config: PriorConfig, folder: Path, device: torch.device,
               processes: Processes) -> None:
    """Trains one flow into `folder`.

    Raises ValueError for a Dice over the batch where each of several processes sees a part of it."""
    metadata, loop, seed = settings.experiment.metadata, settings.experiment.loop, settings.run.seed
    if config.dice_over == "batch" and processes.count > 1:
        raise ValueError(f"--dice_over batch: each of {processes.count} processes sees a part of the batch; "
                         "train with one process, or with --dice_over image")
    gtr = None
    if config.source == "gtr":
        path = gtr_path(settings, config.gtr)
        gtr, content = load_gtr(path, metadata)
        check_size(path, content, metadata)
    train, held_out = processes.first_first(lambda: load_pair(metadata, "train_prior"))

    seed_step(seed, -1)
    atfm = build_atfm(config, gtr).to(device)
    if config.channels_last:
        atfm.net.to(memory_format=torch.channels_last)
    if config.compile:
        atfm.net.compile()

    def validate_flow() -> Validation:
        sample = flow_sampler(atfm, loop.val_steps, "euler", loop.val_samples, ready(atfm.net))
        return validate(sample, held_out, loop, device)

    batches = Batches(train, config.batch_size, seed, device, augment if metadata.augment else None)
    fit(atfm.net, atfm.losses, batches, validate_flow, folder=folder,
        content=describe(config.method, metadata, config, seed, gtr, train.ids, train.fingerprint),
        epochs=config.num_epochs, lr=config.lr, weight_decay=0.0, loop=loop, seed=seed, ema=config.ema,
        processes=processes)


def load_pair(metadata: Metadata, split: str) -> tuple[Slices, Slices]:
    """The images to train on and those to validate on."""
    return data.load(metadata, split), data.load(metadata, "val")


def output(settings: Settings) -> Path:
    """The experiment's folder, which holds a folder per stage."""
    return Path(settings.run.output_path or Path("runs") / settings.experiment.metadata.what)


def gtr_path(settings: Settings, given: str | None) -> Path:
    """The checkpoint of --gtr: the one named, or the best one of this experiment."""
    return checkpoint.find(given or output(settings) / "GTR")


def flow_folder(settings: Settings, method: str, alpha: float | None = None) -> Path:
    """Where a flow is trained: <output_path>/<method>, with its alpha in the name if one of --alphas."""
    return output(settings) / (method if alpha is None else f"{method}_alpha_{alpha:g}")


def validate(sample: Sampler, held_out: Slices, loop: LoopConfig, device: torch.device) -> Validation:
    """GED and HM-IoU on `val_images` held-out images, and a picture of the first four."""
    count = min(loop.val_images, len(held_out))
    chosen = np.unique(np.linspace(0, len(held_out) - 1, count).round().astype(int))
    images = Slices(held_out.cache, held_out.rows[chosen], held_out.crop)
    result = evaluate(sample, images, (loop.val_samples,), (0,), device)
    means = {name: float(values.mean()) for name, values in result.scores.items()}
    return Validation({name: means[f"{name}{loop.val_samples}"] for name in ("GED", "HM-IoU", "Diversity")},
                      picture(sample, images, min(4, len(images)), device))


@torch.no_grad()
def picture(sample: Sampler, images: Slices, count: int, device: torch.device) -> np.ndarray:
    """The first images with their experts and some samples: (h, w, 3) uint8."""
    image, masks = images.batch(range(count), device)
    drawn = sample(image, 4, torch.Generator(device).manual_seed(0)) >= 0.5
    return fig.figure_to_array(fig.validation_picture(image.cpu(), masks.cpu(), drawn.float().cpu()))
