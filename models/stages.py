"""What the five scripts call: the data, the model and the loop of each stage put together."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import data
import fig
from data import Batches, Slices
from metadata_manager import GTRConfig, LoopConfig, Metadata, PriorConfig
from metrics import evaluate
from models import ATFM, GTR, STNet, checkpoint, monte_carlo_nll
from models.command_line import Settings, parse
from models.training import NonFiniteLoss, Validation, fit, place, seed_step

# Settings that may change when a run is continued: they do not alter what the steps compute.
FREE = {"data_path", "epochs", "num_epochs", "gtr"}

Sampler = Callable[[Tensor, int, torch.Generator], Tensor]


def reports_errors(stage: Callable[..., None]) -> Callable[..., None]:
    """Ends a script with one line for what a user can put right, instead of a traceback."""

    @functools.wraps(stage)
    def script(*arguments: Any) -> None:
        try:
            stage(*arguments)
        except (ValueError, OSError, NonFiniteLoss) as error:
            sys.exit(f"error: {error}")

    return script


@reports_errors
def train_gtr(what: str, argv: Sequence[str] | None = None) -> None:
    """Step 1: trains GTR by the Monte Carlo likelihood (Eq. 5) into <output_path>/GTR."""
    settings = parse(argv, what, ("metadata", "gtr", "loop"), "Step 1 of ATFM: train GTR.")
    metadata, config, loop = settings.experiment.metadata, settings.experiment.gtr, settings.experiment.loop
    device, seed = place(settings.run.device), settings.run.seed
    train, held_out = data.load(metadata, "train"), data.load(metadata, "val")

    seed_step(seed, -1)
    gtr = build_gtr(metadata, config).to(device)

    def losses(image: Tensor, masks: Tensor) -> list[dict[str, Tensor]]:
        if config.experts == "one":
            masks = masks[torch.arange(len(masks)), torch.randint(masks.shape[1], (len(masks),))]
        return [{"loss": monte_carlo_nll(gtr(image).rsample(config.mc_samples, antithetic=True), masks)}]

    fit(gtr, losses, Batches(train, config.batchsize, seed, device, augmentation(metadata)),
        functools.partial(validate, functools.partial(sample_gtr, gtr), held_out, loop, device),
        folder=output(settings) / "GTR", content=describe("GTR", settings, train, config),
        epochs=config.epochs, lr=config.lr, weight_decay=config.weight_decay, loop=loop, seed=seed)


@reports_errors
def train_prior(what: str, argv: Sequence[str] | None = None) -> None:
    """Step 2: trains the flow from the frozen GTR (Algorithm 1) into <output_path>/<method>."""
    settings = parse(argv, what, ("metadata", "prior", "loop"), "Step 2 of ATFM: train the flow.")
    metadata, config, loop = settings.experiment.metadata, settings.experiment.prior, settings.experiment.loop
    device, seed = place(settings.run.device), settings.run.seed
    gtr = load_gtr(config.gtr or output(settings) / "GTR", metadata) if config.source == "gtr" else None
    train, held_out = data.load(metadata, "train_prior"), data.load(metadata, "val")

    seed_step(seed, -1)
    atfm = build_atfm(config, gtr).to(device)
    sample = functools.partial(sample_flow, atfm, loop.val_steps, "euler", None)

    fit(atfm.net, atfm.losses, Batches(train, config.batch_size, seed, device, augmentation(metadata)),
        functools.partial(validate, sample, held_out, loop, device),
        folder=output(settings) / config.method, content=describe(config.method, settings, train, config),
        epochs=config.num_epochs, lr=config.lr, weight_decay=0.0, loop=loop, seed=seed)


def build_gtr(metadata: Metadata, config: GTRConfig) -> GTR:
    """An untrained GTR of the layout that a config describes."""
    return GTR(metadata.channels, config.num_filters, config.rank, config.convs, config.pool, config.up)


def build_atfm(config: PriorConfig, gtr: GTR | None) -> ATFM:
    """An untrained flow over a frozen GTR, as a config describes it."""
    net = STNet(config.dim, config.dim_mults, config.weight_standardization, config.time_scale)
    return ATFM(gtr, net, source=config.source, alpha=config.alpha, dice=config.dice, dice_over=config.dice_over,
                semantic_target=config.semantic_target, experts=config.experts, signed=config.signed,
                condition_dropout=config.condition_dropout, guidance=config.guidance)


def load_gtr(place: str | Path, metadata: Metadata) -> GTR:
    """A trained GTR from a run folder or a checkpoint; raises ValueError if it is for other images."""
    path = checkpoint.find(place)
    content = checkpoint.load(path, "GTR")
    if content["config"]["channels"] != metadata.channels:
        raise ValueError(f"{path}: trained on {content['config']['channels']}-channel images of "
                         f"{content['config']['what']}, but {metadata.what} has {metadata.channels}; check --gtr")
    gtr = build_gtr(metadata, restore(GTRConfig, content))
    checkpoint.fill(gtr, content, path)
    return gtr.eval()


def load_atfm(place: str | Path, method: str, gtr: GTR | None) -> ATFM:
    """A trained flow from a run folder or a checkpoint, over the GTR that gives its x_0."""
    path = checkpoint.find(place)
    content = checkpoint.load(path, method)
    atfm = build_atfm(restore(PriorConfig, content), gtr)
    checkpoint.fill(atfm.net, content, path)
    return atfm.eval()


def restore(kind: type, content: dict[str, Any]) -> Any:
    """The stage's config, of dataclass `kind`, that a checkpoint was trained with."""
    return kind(**{f.name: content["config"][f.name] for f in dataclasses.fields(kind) if f.name not in FREE})


def describe(stage: str, settings: Settings, train: Slices, config: GTRConfig | PriorConfig) -> dict[str, Any]:
    """What each checkpoint of a run says about itself."""
    named = dataclasses.asdict(settings.experiment.metadata) | dataclasses.asdict(config)
    kept = {name: value for name, value in named.items() if name not in FREE}
    return {
        "stage": stage,
        "config": {**kept, "seed": settings.run.seed, "training_images": train.fingerprint},
        "training_ids": train.ids,
        "versions": {"python": sys.version.split()[0], "torch": str(torch.__version__), "numpy": np.__version__},
    }


def output(settings: Settings) -> Path:
    """The experiment's folder, which holds a folder per stage."""
    return Path(settings.run.output_path or Path("runs") / settings.experiment.metadata.what)


def augmentation(metadata: Metadata) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """What training does to image and masks together, if anything."""
    if not metadata.augment:
        return None
    from data.augment import augment

    return augment


def sample_gtr(gtr: GTR, image: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Act. GTR: samples of the truncation distribution themselves, as probabilities (b, n, h, w)."""
    return gtr(image).sample(n, generator).sigmoid()


def sample_flow(atfm: ATFM, steps: int, solver: str, batch_size: int | None,
                image: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """The flow's samples, as probabilities (b, n, h, w)."""
    return atfm.sample(image, n, steps, solver, generator, batch_size)


def validate(sample: Sampler, held_out: Slices, loop: LoopConfig, device: torch.device) -> Validation:
    """GED and HM-IoU on `val_images` held-out images, and a picture of the first four."""
    chosen = np.unique(np.linspace(0, len(held_out) - 1, min(loop.val_images, len(held_out))).round().astype(int))
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
