"""Diagonal Gaussians over latents, and the encoder that gives one for an image: prior and posterior."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.unet import ConvBlock, descend

# Keeps the KL finite.
MIN_STD = 1e-3


@dataclass(frozen=True)
class DiagonalGaussian:
    """N(mean, diag(std^2)), one for each of m rows: mean and std (m, ...), std positive."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, parameters: Tensor) -> "DiagonalGaussian":
        """From a network's output (m, 2 l, ...): the mean, then standard deviations before softplus."""
        # softplus, because exp overflows at larger learning rates.
        mean, raw = parameters.chunk(2, dim=1)
        return cls(mean, F.softplus(raw) + MIN_STD)

    def at(self, noise: Tensor) -> Tensor:
        """mean + std * noise, a sample where the noise (m, ...) is standard normal; differentiable."""
        return self.mean + self.std * noise

    def rsample(self) -> Tensor:
        """A sample per row from torch's global generator."""
        return self.at(torch.randn_like(self.mean))

    def rows(self, index: Tensor) -> "DiagonalGaussian":
        """The Gaussians of the rows `index` (m',)."""
        return DiagonalGaussian(self.mean[index], self.std[index])

    def kl(self, other: "DiagonalGaussian") -> Tensor:
        """KL(self, other) in nats, summed over all but the rows: (m,)."""
        # Per dimension (ratio^2 + shift^2 - 1) / 2 - log ratio.
        ratio = self.std / other.std
        shift = (self.mean - other.mean) / other.std
        return ((ratio.square() + shift.square() - 1) / 2 - ratio.log()).flatten(1).sum(1)


class Encoder(nn.Module):
    """Image -> Gaussian of `latents` dimensions: a U-Net's way down, the global average, a linear layer."""

    def __init__(self, in_channels: int, num_filters: Sequence[int], latents: int, convs: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ConvBlock(before, filters, convs) for before, filters in pairwise([in_channels, *num_filters]))
        self.parameters_of_z = nn.Linear(num_filters[-1], 2 * latents)

    def forward(self, x: Tensor) -> DiagonalGaussian:
        """x (m, in_channels, h, w) -> Gaussian with mean and std (m, latents)."""
        # The average over all pixels makes z independent of the image's size.
        deepest = descend(x, self.blocks, F.avg_pool2d)[-1]
        return DiagonalGaussian.of(self.parameters_of_z(deepest.mean((2, 3))))


def with_planes(maps: Tensor, z: Tensor) -> Tensor:
    """Maps (m, c, h, w) with each number of z (m, latents) as a constant plane: (m, c + latents, h, w)."""
    return torch.cat([maps, z[:, :, None, None].expand(-1, -1, *maps.shape[2:])], dim=1)
