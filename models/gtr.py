"""GTR, the Gaussian Truncation Representation (paper, Eq. 3-5): step 1 of ATFM."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadata_manager import GTRConfig
from models.unet import UNet

# Added to the diagonal of L, as in the released code. At variance 0 the gradient of sqrt(L) is infinite.
MIN_VARIANCE = 2e-5


@dataclass(frozen=True)
class LowRankGaussian:
    """The truncation distribution X_Ttrunc ~ N(mu, D D^T + L) over all pixels of the logit map (Eq. 3-4).

    mean: mu, (b, h, w). cov_factor: D, (b, r, h, w). cov_diag: the diagonal of L, (b, h, w), positive.
    Sampling never factorises a matrix, so it cannot fail on an ill-conditioned covariance.
    """

    mean: Tensor
    cov_factor: Tensor
    cov_diag: Tensor

    def rsample(self, n: int, antithetic: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """n logit maps mu + D e + sqrt(L) w with e, w standard normal: (b, n, h, w), differentiable.

        antithetic: n / 2 residuals about the mean, then their negatives, which lowers the variance of Monte
        Carlo means; raises ValueError if n is odd.
        """
        if n < 1 or antithetic and n % 2:
            raise ValueError(f"{n} samples: expected at least one, and an even number of antithetic ones "
                             "(--mc_samples)")
        # D e and sqrt(L) w have the covariances D D^T and L. They are independent, so the sum has D D^T + L.
        b, rank, h, w = self.cov_factor.shape
        m = n // 2 if antithetic else n
        like: dict[str, Any] = {"device": self.mean.device, "dtype": self.mean.dtype, "generator": generator}
        e, noise = torch.randn(b, m, rank, **like), torch.randn(b, m, h, w, **like)
        # e has r numbers for a whole map, which D spreads over the pixels: this is what correlates them.
        correlated = torch.bmm(e, self.cov_factor.flatten(2)).view(b, m, h, w)
        residual = correlated + self.cov_diag.sqrt()[:, None] * noise
        if antithetic:
            # The Gaussian is symmetric, so a negative is as good a sample, though not an independent one.
            residual = torch.cat([residual, -residual], dim=1)
        return self.mean[:, None] + residual

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n logit maps without gradient: (b, n, h, w)."""
        return self.rsample(n, generator=generator)

    def tempered(self, temperature: float) -> "LowRankGaussian":
        """The same mean, with all standard deviations multiplied by `temperature`."""
        # D holds standard deviations, L variances.
        return LowRankGaussian(self.mean, temperature * self.cov_factor, temperature**2 * self.cov_diag)


@dataclass(frozen=True)
class TrainedOn:
    """What a model was trained on and how. path: its file."""

    side: int  # pixels per side of the images
    channels: int
    ids: tuple[str, ...] = ()
    patients: tuple[str, ...] = ()
    preset: str = "custom"
    settings: dict[str, Any] = field(default_factory=dict)
    path: Path = Path()


def unet(channels: int, config: GTRConfig) -> nn.Module:
    """The paper's backbone (App. 6), or that of the released code, by the settings."""
    return UNet(channels, config.num_filters, config.convs, config.pool, config.up)


# Networks that give GTR's features: (image channels, settings) -> a module, see `GTR`. A network that is
# added is one entry here.
BACKBONES: dict[str, Callable[[int, GTRConfig], nn.Module]] = {"unet": unet}


class GTR(nn.Module):
    """Image -> truncation distribution: a U-Net, three 1x1 convolutions for mu, log L and D (Eq. 3, App. 6).

    The defaults are the paper's layout; convs=3, pool="avg", up="bilinear" is the released one.
    """

    trained_on: TrainedOn  # set where a checkpoint is loaded

    def __init__(self, in_channels: int = 1, num_filters: Sequence[int] = (32, 64, 128, 192), rank: int = 10,
                 convs: int = 2, pool: str = "max", up: str = "transposed", backbone: nn.Module | None = None,
                 temperature: float = 1.0, tta: bool = False) -> None:
        """An untrained GTR.

        backbone: another network in the U-Net's place, (b, in_channels, h, w) -> (b, num_filters[0], h, w).
        temperature, tta: of `sample`; Eq. 3 has 1 and no test-time augmentation."""
        super().__init__()
        self.in_channels, self.temperature, self.tta = in_channels, temperature, tta
        # `unet` whatever network it is, because the names of weights in checkpoints begin with it.
        self.unet = UNet(in_channels, num_filters, convs, pool, up) if backbone is None else backbone
        # The three heads read the same features Z (Eq. 3): a 1x1 convolution each.
        self.mean = nn.Conv2d(num_filters[0], 1, 1)
        self.log_cov_diag = nn.Conv2d(num_filters[0], 1, 1)
        self.cov_factor = nn.Conv2d(num_filters[0], rank, 1)

    @classmethod
    def of(cls, config: GTRConfig, channels: int) -> "GTR":
        """An untrained GTR as a config describes it, for images of `channels` channels.

        Raises ValueError, naming the flag, for a backbone that is not in BACKBONES."""
        if config.backbone not in BACKBONES:
            raise ValueError(f"--backbone {config.backbone}: unknown; expected one of {', '.join(BACKBONES)}")
        return cls(channels, config.num_filters, config.rank, config.convs, config.pool, config.up,
                   BACKBONES[config.backbone](channels, config), config.temperature, config.tta)

    def forward(self, image: Tensor) -> LowRankGaussian:
        """image (b, c, h, w) in [0, 1]; raises ValueError for other channels or an indivisible size."""
        if image.ndim != 4 or image.shape[1] != self.in_channels:
            raise ValueError(f"image of shape {tuple(image.shape)}: expected (b, {self.in_channels}, h, w)")
        return self.heads(self.unet(image))

    def heads(self, features: Tensor) -> LowRankGaussian:
        """The Gaussian of features Z (b, num_filters[0], h, w)."""
        # In float32 even under autocast: exp and sums over all pixels overflow half precision.
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            # The head gives log L: exp makes every variance positive without a constraint.
            cov_diag = self.log_cov_diag(features).exp() + MIN_VARIANCE
            return LowRankGaussian(self.mean(features)[:, 0], self.cov_factor(features), cov_diag[:, 0])

    @torch.no_grad()
    def sample(self, image: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        """sigmoid of n logit maps per image (b, c, h, w): (b, n, h, w), the paper's x_0.

        Thresholded at 0.5, without a flow, they are what the paper calls Act. GTR (Table 4)."""
        if self.tta:
            return sample_with_tta(self._draw, image, n, generator)
        return self._draw(image, n, generator)

    def _draw(self, image: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        """The same without test-time augmentation."""
        return self.truncation(image).sample(n, generator).sigmoid()

    def truncation(self, image: Tensor) -> LowRankGaussian:
        """The Gaussian that samples are drawn from, at the temperature of sampling."""
        # Not in `forward`: Eq. 5 trains the Gaussian as it is, the temperature only changes the samples.
        return self(image).tempered(self.temperature)


def sample_with_tta(sample: Callable[..., Tensor], image: Tensor, n: int,
                    generator: torch.Generator | None = None) -> Tensor:
    """n samples per image (b, c, h, w), each of the image in one of its eight positions, turned back.

    sample(image, n, generator=None) -> (b, n, h, w). The position, flipped or not and a number of quarter
    turns, is drawn for each sample, so that they are independent samples of a mixture. Its energy score is
    at most the mean of the parts', because the score is convex in the distribution."""
    positions = torch.randint(8, (n,), device=image.device, generator=generator)
    drawn: list[Tensor] = []  # by position
    for position, count in enumerate(positions.bincount(minlength=8).tolist()):  # one wait for a GPU
        if count:
            flips, turns = [-1] * (position // 4), position % 4
            moved = torch.rot90(image.flip(flips), turns, (-2, -1))
            back = torch.rot90(sample(moved, count, generator=generator), -turns, (-2, -1)).flip(flips)
            drawn.append(back)
    # To the places that were drawn: else the first samples would be those of the first positions.
    return torch.cat(drawn, dim=1)[:, positions.argsort(stable=True).argsort()]


def monte_carlo_nll(logits: Tensor, mask: Tensor) -> Tensor:
    """Negative Monte Carlo log likelihood (Eq. 5): - mean_b [ logsumexp_m log p(y | logits_m) - log M ].

    logits (b, m, h, w); mask (b, h, w) of 0/1, or (b, k, h, w): the mean over the k annotators' masks.
    log p sums log Bernoulli over pixels: y * logit - softplus(logit).
    """
    masks = mask[:, None] if mask.ndim == 3 else mask
    if masks.ndim != 4 or masks.shape[0] != logits.shape[0] or masks.shape[2:] != logits.shape[2:]:
        raise ValueError(f"mask of shape {tuple(mask.shape)} does not fit logits of shape "
                         f"{tuple(logits.shape)}")
    flat = logits.flatten(2)  # (b, m, h * w)
    # The sum of y * logit over pixels is a product of matrices: no (b, m, k, h, w) is held for the gradient.
    inside = flat @ masks.flatten(2).transpose(1, 2)  # (b, m, k)
    # log p is y * logit - softplus(logit), of which the second part does not depend on the mask.
    log_p = inside - F.softplus(flat).sum(2, keepdim=True)
    # log (1/M sum_m p), without leaving logarithms: p is a product over all pixels and underflows. All images
    # have the same log M, so it stays outside the mean.
    return math.log(logits.shape[1]) - log_p.logsumexp(dim=1).mean()
