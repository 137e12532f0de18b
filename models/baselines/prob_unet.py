"""Probabilistic U-Net (Kohl et al. 2018, arXiv 1806.05034).

    L = E_{z ~ q(z | x, y)} [ sum over pixels of cross-entropy(y, f(x, z)) ] + beta KL(q(z | x, y), p(z | x))

Deviations: widths are `--dim` times `--dim_mults` (original: 32, 64, 128, 192). Standard deviations are the
softplus of the encoders' output; with the original's exp, the KL overflows at larger learning rates. The
optimizer is the project's (original: Adam 1e-4)."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadata_manager import FlowConfig
from models.baselines.latent import DiagonalGaussian, Encoder, with_planes
from models.baselines.one_shot import OneShot, he_normal, rows_of
from models.energy import energy_score
from models.flow import check_masks
from models.unet import UNet

# Convolutions per block, as in the original.
CONVS = 3


class ProbUNet(OneShot):
    """A U-Net whose last layers also see a latent z, one vector for the whole image.

    condition_channels: how many channels prior and posterior see beside the image."""

    def __init__(self, channels: int, config: FlowConfig,
                 latents: int = 6,  # original
                 beta: float = 10.0,  # original: weight of the divergence
                 condition_channels: int = 0) -> None:
        super().__init__(channels, config)
        self.latents, self.beta = latents, beta
        width, encoder_channels = self.filters[0], channels + condition_channels
        self.unet = UNet(channels, self.filters, CONVS, "avg", "bilinear")
        self.prior = Encoder(encoder_channels, self.filters, latents, CONVS)
        self.posterior = Encoder(encoder_channels + 1, self.filters, latents, CONVS)
        self.combine = nn.Sequential(nn.Conv2d(width + latents, width, 1), nn.ReLU(),
                                     nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, 1, 1))
        self.apply(he_normal)

    def losses(self, image: Tensor, masks: Tensor) -> Iterator[dict[str, Tensor]]:
        """L and its two terms, means over the batch, in one piece; see `OneShot.targets`."""
        targets = self.targets(image, masks)
        rows = rows_of(image, targets.shape[1])
        yield self.elbo(image, targets, self.prior(image).rows(rows), image[rows])

    def elbo(self, image: Tensor, targets: Tensor, prior: DiagonalGaussian, condition: Tensor
             ) -> dict[str, Tensor]:
        """L for targets (b, j, h, w); prior and condition, which the posterior sees too, have b * j rows."""
        y = targets.flatten(0, 1)  # (b * j, h, w)
        posterior = self.posterior(torch.cat([condition, y[:, None]], dim=1))
        # The U-Net sees each image once; only its last layers see z, once per mask.
        features = self.unet(image)[rows_of(image, targets.shape[1])]
        logits = self.decode(features, posterior.rsample())
        # Summed over pixels, as L says, and so beta can be 10; the mean is over masks.
        cross_entropy = F.binary_cross_entropy_with_logits(logits, y, reduction="sum") / len(y)
        kl = posterior.kl(prior).mean()
        return {"loss": cross_entropy + self.beta * kl, "cross_entropy": cross_entropy.detach(),
                "KL": kl.detach()}

    def decode(self, features: Tensor, z: Tensor) -> Tensor:
        """Logits (m, h, w) of features (m, filters[0], h, w) and latents (m, latents)."""
        return self.combine(with_planes(features, z))[:, 0]

    def prior_of_samples(self, image: Tensor, n: int, generator: torch.Generator | None) -> DiagonalGaussian:
        """The prior of each of n samples per image: b * n rows."""
        return self.prior(image).rows(rows_of(image, n))

    def draw(self, image: Tensor, n: int, in_chunks: Callable[..., Tensor],
             generator: torch.Generator | None) -> Tensor:
        features, prior = self.unet(image), self.prior_of_samples(image, n, generator)
        z = prior.at(torch.randn(prior.mean.shape, device=image.device, generator=generator))
        return in_chunks(lambda row, z: self.decode(features[row], z), rows_of(image, n), z)


class EnergyProbUNet(ProbUNet):
    """The same networks without the posterior, trained by the energy score against all experts' masks.

    A control of ours, in no paper: it separates what the loss does from what the model does."""

    per_annotator_loss = False  # the score takes all masks of an image together

    def __init__(self, channels: int, config: FlowConfig,
                 mc_samples: int = 16,  # as in the preset `best` of GTR
                 ) -> None:
        super().__init__(channels, config)
        self.mc_samples = mc_samples
        # The score needs samples only. Left in place, it would be kept in checkpoints untrained.
        del self.posterior

    def losses(self, image: Tensor, masks: Tensor) -> Iterator[dict[str, Tensor]]:
        """The energy score of samples from the prior, the mean over the batch, in one piece."""
        check_masks(image, masks)
        # As in sampling, but with gradients, which need all samples of a batch at once.
        logits = self.draw(image, self.mc_samples, lambda net, *states: net(*states), None)
        samples = logits.sigmoid().view(len(image), self.mc_samples, *image.shape[2:])
        yield {"loss": energy_score(samples, masks)}
