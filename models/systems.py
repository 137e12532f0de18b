"""From settings and checkpoints to models, and from models to samplers."""

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metadata_manager import GTRConfig, Metadata, PriorConfig
from models import checkpoint
from models.atfm import ATFM, Field
from models.gtr import GTR
from models.st_net import STNet

# (image (b, c, h, w), n, generator) -> (b, n, h, w)
Sampler = Callable[[Tensor, int, torch.Generator], Tensor]


def build_gtr(metadata: Metadata, config: GTRConfig) -> GTR:
    """An untrained GTR of the layout that a config describes."""
    return GTR(metadata.channels, config.num_filters, config.rank, config.convs, config.pool, config.up)


def build_atfm(config: PriorConfig, gtr: GTR | None) -> ATFM:
    """An untrained flow over a frozen GTR, as a config describes it."""
    net = STNet(config.dim, config.dim_mults, config.weight_standardization, config.time_scale,
                config.checkpoint)
    return ATFM(gtr, net, source=config.source, alpha=config.alpha, dice=config.dice,
                dice_over=config.dice_over, semantic_target=config.semantic_target, experts=config.experts,
                signed=config.signed, condition_dropout=config.condition_dropout, guidance=config.guidance,
                annotators_per_pass=config.annotators_per_pass, amp=config.amp)


def load_gtr(path: Path, metadata: Metadata) -> tuple[GTR, dict[str, Any]]:
    """A trained GTR and its checkpoint's content; raises ValueError if it is for images of other channels."""
    content = checkpoint.load(path, "GTR")
    if content["config"]["channels"] != metadata.channels:
        raise ValueError(f"{path}: trained on {content['config']['channels']}-channel images of "
                         f"{content['config']['what']}, but {metadata.what} has {metadata.channels}; "
                         "check --gtr")
    gtr = build_gtr(metadata, _restore(GTRConfig, content))
    checkpoint.fill(gtr, content, path)
    return gtr.eval(), content


def load_atfm(path: Path, method: str, gtr: GTR | None) -> tuple[ATFM, PriorConfig, dict[str, Any]]:
    """A trained flow over the GTR that gives its x_0, its settings and its checkpoint's content.

    Prints a line if it was trained over another GTR."""
    content = checkpoint.load(path, method)
    config = _restore(PriorConfig, content)
    atfm = build_atfm(config, gtr)
    checkpoint.fill(atfm.net, content, path)
    if content["config"]["gtr_weights"] != fingerprint(atfm.gtr):
        print(f"warning: {path} was trained over another GTR than the one given")
    return atfm.eval(), config, content


def check_size(path: Path, content: dict[str, Any], metadata: Metadata) -> None:
    """Raises ValueError if a checkpoint was trained on images of another size than a dataset's, cropped."""
    theirs, ours = trained_size(content["config"]), metadata.crop or metadata.size
    if theirs != ours:
        raise ValueError(f"{path}: trained on {theirs} x {theirs} pixels, but images have {ours} x {ours} "
                         "here; pass the same --crop to all stages")


def trained_size(config: dict[str, Any]) -> int:
    """Pixels per side of the images that a checkpoint's config says it was trained on."""
    return config["crop"] or config["size"]


def _restore(kind: type, content: dict[str, Any]) -> Any:
    """The stage's config, of dataclass `kind`, that a checkpoint was trained with."""
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in content["config"].items() if name in known})


def describe(stage: str, metadata: Metadata, config: GTRConfig | PriorConfig, seed: int, gtr: GTR | None,
             training_ids: Sequence[str], training_fingerprint: str) -> dict[str, Any]:
    """What each checkpoint of a run says about itself. `gtr`: the one that the flow is trained over."""
    return {
        "stage": stage,
        "config": {**dataclasses.asdict(metadata), **dataclasses.asdict(config), "seed": seed,
                   "training_images": training_fingerprint, "gtr_weights": fingerprint(gtr)},
        "training_ids": list(training_ids),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of what computes the results."""
    return {"python": sys.version.split()[0], "torch": str(torch.__version__), "numpy": np.__version__}


def fingerprint(module: nn.Module | None) -> str | None:
    """16 hex digits that change with any weight."""
    if module is None:
        return None
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in module.state_dict().items():
        digest.update(name.encode() + weight.cpu().numpy().tobytes())
    return digest.hexdigest()


def gtr_sampler(gtr: GTR) -> Sampler:
    """Act. GTR: samples of the truncation distribution themselves, without a flow (paper, Table 4)."""
    return lambda image, n, generator: gtr(image).sample(n, generator).sigmoid()


def flow_sampler(atfm: ATFM, steps: int, solver: str, batch_size: int | None = None,
                 net: Field | None = None) -> Sampler:
    """Samples of the flow; net: see `ATFM.sample`."""
    return lambda image, n, generator: atfm.sample(image, n, steps, solver, generator, batch_size, net)
