"""c-SSN and c-Prob. U-Net, which know the annotation style of a mask (Zepf et al. 2023, arXiv 2303.15850).

    p(y | x, s) for the style s of each mask;   a sample's style is random: p(y | x) = 1/3 sum_s p(y | x, s)

The losses are those of SSN and of the Probabilistic U-Net. The style, as planes of 0 and 1, is joined to
SSN's features by a 1x1 convolution before the heads, or to what prior and posterior see of the image.
Deviations: those of the two systems. The optimizer is the project's (original: AdamW 1e-4)."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadata_manager import FlowConfig
from models.baselines.latent import DiagonalGaussian, with_planes
from models.baselines.one_shot import OneShot, rows_of
from models.baselines.prob_unet import ProbUNet
from models.baselines.ssn import SSN
from models.flow import check_masks, one_expert
from models.gtr import LowRankGaussian, monte_carlo_nll

# f, m and p in the names of ISIC3's files.
STYLES = 3


class ConditionedSSN(SSN):
    """SSN whose Gaussian depends on the style."""

    needs_style = True

    def __init__(self, channels: int, config: FlowConfig, rank: int = 10, mc_samples: int = 20) -> None:
        super().__init__(channels, config, rank, mc_samples)
        self.fuse = nn.Sequential(nn.Conv2d(self.filters[0] + STYLES, self.filters[0], 1), nn.ReLU())

    def losses(self, image: Tensor, masks: Tensor, style: Tensor  # type: ignore[override]
               ) -> Iterator[dict[str, Tensor]]:
        """As SSN's, with the style (b, k) of 0, 1, 2 of each mask."""
        targets, style = targets_with_style(self, image, masks, style)
        # The U-Net sees each image once; the style comes in after it, once per mask.
        features = self.net.unet(image)[rows_of(image, targets.shape[1])]
        logits = self.gaussian(features, style.flatten()).rsample(self.mc_samples, antithetic=True)
        yield {"loss": monte_carlo_nll(logits, targets.flatten(0, 1))}

    def gaussian(self, features: Tensor, style: Tensor) -> LowRankGaussian:
        """Of logit maps (m, h, w) for features (m, filters[0], h, w) and styles (m,)."""
        return self.net.heads(self.fuse(with_style(features, style)))

    def draw(self, image: Tensor, n: int, in_chunks: Callable[..., Tensor],
             generator: torch.Generator | None) -> Tensor:
        styles, rows = random_styles(image, n, generator)
        gaussian = self.gaussian(self.net.unet(image)[rows_of(image, STYLES)], styles)  # b * 3 rows
        # n samples of every style, of which one in three is taken: heads for each sample would cost more.
        samples = gaussian.sample(n, generator)  # (b * 3, n, h, w)
        return samples[rows.view(-1, n), torch.arange(n, device=image.device)].flatten(0, 1)


class ConditionedProbUNet(ProbUNet):
    """Probabilistic U-Net whose prior and posterior see the style."""

    needs_style = True

    def __init__(self, channels: int, config: FlowConfig, latents: int = 6, beta: float = 10.0) -> None:
        super().__init__(channels, config, latents, beta, STYLES)

    def losses(self, image: Tensor, masks: Tensor, style: Tensor  # type: ignore[override]
               ) -> Iterator[dict[str, Tensor]]:
        """As the Probabilistic U-Net's, with the style (b, k) of 0, 1, 2 of each mask."""
        targets, style = targets_with_style(self, image, masks, style)
        condition = with_style(image[rows_of(image, targets.shape[1])], style.flatten())
        yield self.elbo(image, targets, self.prior(condition), condition)

    def prior_of_samples(self, image: Tensor, n: int, generator: torch.Generator | None) -> DiagonalGaussian:
        # Three passes of the prior per image, whatever n is.
        styles, rows = random_styles(image, n, generator)
        return self.prior(with_style(image[rows_of(image, STYLES)], styles)).rows(rows)


def targets_with_style(system: OneShot, image: Tensor, masks: Tensor, style: Tensor) -> tuple[Tensor, Tensor]:
    """The masks that a step learns from, (b, j, h, w), all or one random expert's, and their styles (b, j).

    Raises ValueError unless there is a style of 0, 1 or 2 for each mask."""
    check_masks(image, masks)
    if style.shape != masks.shape[:2] or not ((0 <= style) & (style < STYLES)).all():
        raise ValueError(f"style of shape {tuple(style.shape)} with values {style.unique().tolist()}: "
                         f"expected {tuple(masks.shape[:2])} of 0 to {STYLES - 1}, one for each mask, as "
                         "ISIC3 has")
    if system.experts == "all":
        return masks, style
    # Experts' numbers stand in for their masks, so that mask and style are of the same random expert.
    experts = torch.arange(masks.shape[1], device=masks.device).expand(masks.shape[:2])
    chosen = one_expert(experts)
    return masks.take_along_dim(chosen[..., None, None], 1), style.take_along_dim(chosen, 1)


def random_styles(image: Tensor, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """The three styles of every image, (b * 3,), and for b * n samples a random row of their image's."""
    b = len(image)
    styles = torch.arange(STYLES, device=image.device).repeat(b)
    chosen = torch.randint(STYLES, (b * n,), device=image.device, generator=generator)
    return styles, STYLES * rows_of(image, n) + chosen


def with_style(maps: Tensor, style: Tensor) -> Tensor:
    """Maps (m, c, h, w) with styles (m,) as three planes, one of ones and two of zeros: (m, c + 3, h, w)."""
    return with_planes(maps, F.one_hot(style.long(), STYLES).float())
