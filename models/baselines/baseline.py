"""What the systems that ATFM is compared with have in common with it, so that all scripts serve them all."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from metadata_manager import FlowConfig
from models.gtr import TrainedOn


class Baseline(nn.Module):
    """A system that is trained in one stage: `losses` for the training loop, `sample` for tests.

    A subclass takes the image's channels and a FlowConfig, and keyword arguments with its paper's values.
    losses(image, masks), or (image, masks, style) where it `needs_style`: as `ATFM.losses`."""

    losses: Callable[..., Iterator[dict[str, Tensor]]]
    gtr = None
    apart = True  # whether the loss of an annotator's mask does not depend on the others' masks
    needs_style = False  # whether `losses` takes the experts' styles (b, k) too
    steps: int | None = None  # of a sample, where there are any
    trained_on: TrainedOn  # set where a checkpoint is loaded

    def __init__(self, channels: int, config: FlowConfig) -> None:
        super().__init__()

    @property
    def trainable(self) -> nn.Module:
        """What is trained and kept: all of it."""
        return self

    def for_validation(self, trained: "Baseline") -> "Baseline":
        """The system over other weights, such as averaged ones."""
        return trained

    def evaluations(self, steps: int | None = None) -> int:
        """Of its network, per sample; a decoder counts as its network."""
        return steps or self.steps or 1

    def sample(self, image: Tensor, n: int, steps: int | None = None,
               generator: torch.Generator | None = None, batch_size: int | None = None) -> Tensor:
        """n masks per image (b, c, h, w) as probabilities (b, n, h, w), as `ATFM.sample`.

        steps: ValueError for a system that samples in one."""
        raise NotImplementedError


def check_masks(image: Tensor, masks: Tensor) -> None:
    """Raises ValueError for masks that do not fit the image."""
    if masks.ndim != 4 or len(masks) != len(image) or masks.shape[2:] != image.shape[2:]:
        raise ValueError(f"masks of shape {tuple(masks.shape)} for image of shape {tuple(image.shape)}: "
                         "expected (b, k, h, w) for (b, c, h, w)")


def in_parts(at_once: int, net: Callable[..., Tensor], *states: Tensor) -> Tensor:
    """net(*states), each of them (m, ...), with at most `at_once` of the m at a time, in equal parts."""
    parts = math.ceil(len(states[0]) / at_once)
    return torch.cat([net(*part) for part in zip(*(one.tensor_split(parts) for one in states))])
