"""What the systems that ATFM is compared with have in common with it, so that all scripts serve them all."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from metadata_manager import FlowConfig
from models.gtr import TrainedOn


class Baseline(nn.Module):
    """A system that is trained in one stage: `losses` for the training loop, `sample` for tests.

    channels: of the image. Each has its own keyword arguments after these, with its paper's values.
    Raises ValueError for settings that only ATFM's flows have."""

    gtr = None
    apart = True  # whether the loss of an annotator's mask does not depend on the others' masks
    needs_style = False  # whether `losses` takes the experts' styles (b, k) too
    steps: int | None = None  # of a sample, where there are any
    trained_on: TrainedOn  # set where a checkpoint is loaded

    def __init__(self, channels: int, config: FlowConfig) -> None:
        super().__init__()
        for name in ("amp", "channels_last", "compile"):
            if getattr(config, name):
                raise ValueError(f"--{name} True: expected False for --method {config.method}; only flows of "
                                 "ATFM have it")
        self.config, self.channels = config, channels

    @property
    def net(self) -> nn.Module:
        """What is trained: all of it."""
        return self

    def for_validation(self, net: "Baseline") -> "Baseline":
        """The system over other weights, such as averaged ones."""
        return net

    def evaluations(self, steps: int | None = None, solver: str | None = None) -> int:
        """Of its network, per sample. One: a decoder is counted as its network."""
        return steps or self.steps or 1

    def losses(self, image: Tensor, masks: Tensor) -> Iterator[dict[str, Tensor]]:
        """As `ATFM.losses`: image (b, c, h, w) in [0, 1], masks (b, k, h, w) of 0/1."""
        raise NotImplementedError

    def sample(self, image: Tensor, n: int, steps: int | None = None,
               generator: torch.Generator | None = None, batch_size: int | None = None) -> Tensor:
        """n masks per image (b, c, h, w) as probabilities (b, n, h, w), as `ATFM.sample`.

        steps: for systems that have any (default: `steps`); ValueError for others."""
        raise NotImplementedError

    def without_steps(self, steps: int | None) -> None:
        """Raises ValueError for a number of steps, of a system that samples in one."""
        if steps not in (None, 1):
            raise ValueError(f"--steps {steps}: {self.config.method} samples in one step")

