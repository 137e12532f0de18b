"""PHiSeg (Baumgartner et al. 2019, arXiv 1906.04045): a hierarchy of latents, one map per level.

    L = sum_l [ sum over pixels of cross-entropy(y, a_l) + 4^l KL(q(z_l | z_>l, x, y), p(z_l | z_>l, x)) ]

Level l = 0 is the finest. a_l is the sum of the logits of level l and of all coarser ones, enlarged. A sample
is a_0.
Deviations: GroupNorm of one group instead of batch norm, as the project's loop has one mode. A resolution
per entry of `--dim_mults` (original: 7, of 32, 64, 128, 192, 192, 192, 192 filters); 5 latent levels as in
the original, or as many as there are resolutions. A latent is enlarged to its level's size in one bilinear
step (original: by 2, with convolutions between). The optimizer is the project's (original: Adam 1e-3)."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadata_manager import FlowConfig
from models.baselines.latent import DiagonalGaussian
from models.baselines.one_shot import OneShot, rows_of
from models.unet import descend


class NormBlock(nn.Sequential):
    """`convs` 3x3 convolutions, each followed by GroupNorm and ReLU: (m, in, h, w) -> (m, out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, convs: int) -> None:
        layers: list[nn.Module] = []
        for i in range(convs):
            layers += [nn.Conv2d(in_channels if i == 0 else out_channels, out_channels, 3, padding=1),
                       nn.GroupNorm(1, out_channels), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class Ladder(nn.Module):
    """The prior p(z_l | z_>l, x), or the posterior, if it sees a mask, too: an encoder and a head per level.

    Here level 0 is the coarsest."""

    def __init__(self, in_channels: int, filters: Sequence[int], levels: int, latents: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(NormBlock(*channels, 3)
                                    for channels in pairwise([in_channels, *filters]))
        widths = filters[::-1][:levels]
        self.heads = nn.ModuleList(
            nn.Sequential(NormBlock(width + (latents if level else 0), width, 2),
                          nn.Conv2d(width, 2 * latents, 1)) for level, width in enumerate(widths))

    def maps(self, image: Tensor) -> list[Tensor]:
        """The encoder's maps, the coarsest first."""
        return descend(image, self.blocks, F.avg_pool2d)[::-1]

    def gaussian(self, level: int, maps: Sequence[Tensor], latents: Sequence[Tensor]) -> DiagonalGaussian:
        """The Gaussian of z (m, latents, h', w') at a level, given the coarser z."""
        # It sees the last of them only, and none at the coarsest level.
        joined = torch.cat([maps[level], *(enlarge(z, 2) for z in latents[-1:])], dim=1)
        return DiagonalGaussian.of(self.heads[level](joined))


class Likelihood(nn.Module):
    """The latents of all levels -> their logits, each enlarged and added to those of the coarser levels."""

    def __init__(self, filters: Sequence[int], enlarged: int, latents: int) -> None:
        super().__init__()
        widths = filters[::-1]
        self.enlarged = enlarged  # how many times larger a level's logits are than its latent
        self.rise = nn.ModuleList(NormBlock(latents, width, 2) for width in widths)
        self.join = nn.ModuleList(NormBlock(below + width, width, 2)
                                  for below, width in pairwise(widths))
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1) for width in widths)

    def forward(self, latents: Sequence[Tensor]) -> Tensor:
        """Latents (m, latents, h', w') of each level -> a (m, levels, h, w); both the coarsest first."""
        logits: list[Tensor] = []
        x = self.rise[0](enlarge(latents[0], self.enlarged))
        for level, head in enumerate(self.heads):
            if level:
                y = self.rise[level](enlarge(latents[level], self.enlarged))
                x = self.join[level - 1](torch.cat([enlarge(x, 2), y], dim=1))
            # At full size, so that logits of different levels can be added up.
            logits.append(enlarge(head(x), 2 ** (len(self.heads) - 1 - level)))
        return torch.cat(logits, dim=1).cumsum(1)


class PHiSeg(OneShot):
    """Prior and posterior over the latents of all levels, and the likelihood of a mask given them."""

    def __init__(self, channels: int, config: FlowConfig,
                 latent_levels: int = 5,  # original
                 latents: int = 2,  # original: channels of a latent
                 ) -> None:
        super().__init__(channels, config)
        resolutions = len(self.filters)
        self.levels, self.latents = min(latent_levels, resolutions), latents
        self.prior = Ladder(channels, self.filters, self.levels, latents)
        self.posterior = Ladder(channels + 1, self.filters, self.levels, latents)
        self.likelihood = Likelihood(self.filters[:self.levels], 2 ** (resolutions - self.levels), latents)

    def losses(self, image: Tensor, masks: Tensor) -> Iterator[dict[str, Tensor]]:
        """L and its two terms, means over the batch, in one piece; see `OneShot.targets`."""
        targets = self.targets(image, masks)
        rows, y = rows_of(image, targets.shape[1]), targets.flatten(0, 1)[:, None]  # (b * j, 1, h, w)
        of_prior = [level_map[rows] for level_map in self.prior.maps(image)]
        of_posterior = self.posterior.maps(torch.cat([image[rows], y], dim=1))
        latents: list[Tensor] = []
        kl = image.new_zeros(())
        for level in range(self.levels):
            posterior = self.posterior.gaussian(level, of_posterior, latents)
            # 4^l, where l counts from the finest level and `level` from the coarsest.
            weight = 4 ** (self.levels - 1 - level)
            kl = kl + weight * posterior.kl(self.prior.gaussian(level, of_prior, latents)).mean()
            # Finer levels of prior and posterior both see z of the posterior.
            latents.append(posterior.rsample())
        logits = self.likelihood(latents)  # (b * j, levels, h, w)
        # Every level has to match the mask, so that coarse latents hold what is coarse.
        cross_entropy = F.binary_cross_entropy_with_logits(logits, y.expand_as(logits),
                                                           reduction="sum") / len(y)
        yield {"loss": cross_entropy + kl, "cross_entropy": cross_entropy.detach(), "KL": kl.detach()}

    def draw(self, image: Tensor, n: int, in_chunks: Callable[..., Tensor],
             generator: torch.Generator | None) -> Tensor:
        maps, rows = self.prior.maps(image), rows_of(image, n)
        shapes = [(len(rows), self.latents, *level_map.shape[2:]) for level_map in maps[:self.levels]]
        # Drawn for all rows here, so that the samples do not depend on how many are decoded at once.
        noise = [torch.randn(shape, device=image.device, generator=generator) for shape in shapes]

        def decode(row: Tensor, *noise: Tensor) -> Tensor:
            latents: list[Tensor] = []
            maps_of_rows = [level_map[row] for level_map in maps]
            for level, normal in enumerate(noise):
                latents.append(self.prior.gaussian(level, maps_of_rows, latents).at(normal))
            # The last is the finest, a_0.
            return self.likelihood(latents)[:, -1]

        return in_chunks(decode, rows, *noise)


def enlarge(x: Tensor, factor: int) -> Tensor:
    """(m, c, h, w) -> (m, c, factor h, factor w), bilinear."""
    return F.interpolate(x, scale_factor=factor, mode="bilinear") if factor > 1 else x
