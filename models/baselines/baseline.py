"""What the systems that ATFM is compared with have in common with it, so that all scripts serve them all."""

import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial

import torch
from torch import Tensor, nn

from metadata_manager import FlowConfig, OptimizerConfig
from models.chunks import STATES_ON_CPU, Chunks
from models.gtr import TrainedOn

# Estimated, not measured: about 10 GiB for 256x256 pixels at dim 256.
STATES_ON_GPU = 16
# The settings of a FlowConfig that every baseline takes. None uses `gtr`: it is here so that a loop over
# methods may pass --gtr to all of them.
SETTINGS = {"method", "gtr", "num_epochs", "batch_size", "experts", "dim", "dim_mults",
            *(setting.name for setting in fields(OptimizerConfig))}


class Baseline(nn.Module):
    """A system that is trained in one stage: `losses` for the training loop, `sample` for tests.

    A subclass takes the image's channels, a FlowConfig, and keyword arguments whose defaults are its paper's
    values. To change one, edit the default. Checkpoints do not keep these values: after an edit, an older
    checkpoint is loaded with the new one.

    losses(image (b, c, h, w) in [0, 1], masks (b, k, h, w) of 0/1; style (b, k) if `needs_style`) yields a
    batch's loss in pieces. A piece is a dict of "loss", for backward(), and of terms to log, all scalars.
    Their sums over the pieces are the batch's means. `OneShot` and `Stepwise` have all else but `draw`."""

    losses: Callable[..., Iterator[dict[str, Tensor]]]
    gtr = None
    per_annotator_loss = True  # whether the loss of an annotator's mask does not depend on the others' masks
    needs_style = False  # whether `losses` takes the experts' styles (b, k) too
    settings = SETTINGS  # what it takes of a FlowConfig
    steps: int | None = None  # of a sample, unless told otherwise; None: it does not sample in steps
    most_steps = math.inf  # that a sample can take
    trained_on: TrainedOn  # set where a checkpoint is loaded

    def __init__(self, channels: int, config: FlowConfig) -> None:
        super().__init__()
        self.in_chunks = Chunks()

    @property
    def trainable(self) -> nn.Module:
        """What is trained and kept: all of it."""
        return self

    def for_validation(self, trained: "Baseline") -> "Baseline":
        """The system over other weights, such as averaged ones."""
        return trained

    def nfe(self, steps: int | None = None) -> int:
        """Network evaluations per sample; a decoder counts as the network."""
        return steps or self.steps or 1

    def sample(self, image: Tensor, n: int, steps: int | None = None,
               generator: torch.Generator | None = None, batch_size: int | None = None) -> Tensor:
        """n masks per image (b, c, h, w) as probabilities (b, n, h, w), as `ATFM.sample`.

        steps: ValueError for a system that samples in one."""
        raise NotImplementedError

    def parts(self, image: Tensor, batch_size: int | None) -> Callable[..., Tensor]:
        """in_chunks(net, *states): the net's output, computed for at most `batch_size` states at a time."""
        usual = STATES_ON_CPU if image.device.type == "cpu" else STATES_ON_GPU
        return partial(self.in_chunks, usual if batch_size is None else batch_size)
