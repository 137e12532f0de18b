"""Sources of the flow: where the paths begin, x_0. A source that is added is one entry of SOURCES."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.gtr import LowRankGaussian

# (image (b, c, h, w), GTR's Gaussian of it or None, n, generator) -> x_0 (b, n, h, w)
SampleSource = Callable[[Tensor, LowRankGaussian | None, int, torch.Generator | None], Tensor]


@dataclass(frozen=True)
class Source:
    """A distribution of x_0 given the image.

    over_gtr: whether it needs a trained GTR. unit_range: whether x_0 is in [0, 1], as masks of 0/1 are."""

    sample: SampleSource
    over_gtr: bool
    unit_range: bool


def truncated(image: Tensor, gaussian: LowRankGaussian | None, n: int,
              generator: torch.Generator | None = None) -> Tensor:
    """The paper's source: x_0 = sigmoid of n samples of GTR's logits per image (Eq. 3), (b, n, h, w)."""
    assert gaussian is not None  # `over_gtr` is checked where the flow is built
    # The sigmoid brings logits to [0, 1], where the masks lie: x_0 is already a rough mask.
    return gaussian.sample(n, generator).sigmoid()


def standard_normal(image: Tensor, gaussian: LowRankGaussian | None, n: int,
                    generator: torch.Generator | None = None) -> Tensor:
    """x_0 ~ N(0, I), without GTR (Table 4, SFM; CFM): (b, n, h, w)."""
    # Of the image only the size is used.
    b, _, h, w = image.shape
    return torch.randn(b, n, h, w, device=image.device, generator=generator)


SOURCES: dict[str, Source] = {
    "gtr": Source(truncated, over_gtr=True, unit_range=True),
    "normal": Source(standard_normal, over_gtr=False, unit_range=False),
}


def source_named(name: str) -> Source:
    """The entry of SOURCES; raises ValueError, naming the flag, for another name."""
    if name not in SOURCES:
        raise ValueError(f"--source {name}: unknown; expected one of {', '.join(SOURCES)}")
    return SOURCES[name]
