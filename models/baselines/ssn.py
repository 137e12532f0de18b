"""SSN, stochastic segmentation networks (Monteiro et al. 2020, arXiv 2006.06015), the ancestor of GTR.

    logits ~ N(mu(x), D(x) D(x)^T + L(x)),   L = -log 1/M sum_m prod_pixels p(y | logits_m),   M = 20

Deviations: the U-Net is GTR's, with widths `--dim` times `--dim_mults`, and so is the smallest variance.
The original samples independent pixels where the covariance cannot be factorised; here nothing is factorised.
The optimizer is the project's (original: Adam 1e-3)."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from metadata_manager import FlowConfig
from models.baselines.one_shot import OneShot
from models.gtr import GTR, monte_carlo_nll


class SSN(OneShot):
    """Image -> low-rank Gaussian over logit maps, which is GTR's, without a flow after it."""

    def __init__(self, channels: int, config: FlowConfig,
                 rank: int = 10,  # original
                 mc_samples: int = 20,  # original: M, 10 samples and their negatives
                 ) -> None:
        super().__init__(channels, config)
        self.net = GTR(channels, self.filters, rank)
        self.mc_samples = mc_samples

    def losses(self, image: Tensor, masks: Tensor) -> Iterator[dict[str, Tensor]]:
        """The negative log likelihood, the mean over the batch, in one piece; see `OneShot.targets`."""
        # All annotators of an image are scored under the same samples of it.
        targets = self.targets(image, masks)
        logits = self.net(image).rsample(self.mc_samples, antithetic=True)
        yield {"loss": monte_carlo_nll(logits, targets)}

    def draw(self, image: Tensor, n: int, in_chunks: Callable[..., Tensor],
             generator: torch.Generator | None) -> Tensor:
        # Nothing for `in_chunks`: a sample costs no pass through the network.
        return self.net(image).sample(n, generator).flatten(0, 1)
