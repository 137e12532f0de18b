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

STATES_ON_CPU = 8

# (image (b, c, h, w), n, generator) -> (b, n, h, w)
Sampler = Callable[[Tensor, int, torch.Generator], Tensor]


def build_gtr(metadata: Metadata, config: GTRConfig) -> GTR:
    """An untrained GTR of the layout that a config describes."""
    return GTR(metadata.channels, config.num_filters, config.rank, config.convs, config.pool, config.up)


def build_atfm(config: PriorConfig, gtr: GTR | None) -> ATFM:
    """An untrained flow over a frozen GTR, as a config describes it."""
    net = STNet(config.dim, config.dim_mults, config.weight_standardization, config.time_scale,
                config.groups, config.checkpoint)
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
    """Samples of the flow; net: see `ATFM.sample`. batch_size: states at once (default: `states_at_once`)."""

    def sample(image: Tensor, n: int, generator: torch.Generator) -> Tensor:
        nonlocal batch_size
        if batch_size is None:
            batch_size = states_at_once(atfm, image)
        return atfm.sample(image, n, steps, solver, generator, batch_size, net)

    return sample


def states_at_once(atfm: ATFM, image: Tensor) -> int:
    """How many states x_t ST-Net should take at once, for images like this one (1, c, h, w).

    On a GPU as many as `that_fit` in its free memory, by what two of them take; on a CPU 8: more leave its
    caches and are slower."""
    if image.device.type != "cuda":
        return STATES_ON_CPU
    torch.cuda.reset_peak_memory_stats(image.device)
    before = torch.cuda.memory_allocated(image.device)
    atfm.sample(image, 2, steps=1, net=atfm.net)
    each = (torch.cuda.max_memory_allocated(image.device) - before) // 2
    free, _ = torch.cuda.mem_get_info(image.device)
    unused = torch.cuda.memory_reserved(image.device) - torch.cuda.memory_allocated(image.device)
    return that_fit(each, free + unused)


def that_fit(each: int, free: int) -> int:
    """The largest power of two of things of `each` bytes in 70 % of `free` bytes, at least 1.

    A power of two: a little more or less free memory then changes nothing, not even by rounding."""
    return 1 << max(0, (free * 7 // (10 * each)).bit_length() - 1)
