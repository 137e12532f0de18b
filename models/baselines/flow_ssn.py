"""Flow-SSN, continuous: flow stochastic segmentation networks (Ribeiro et al., 2025, arXiv 2507.18838).

A large net gives the mean of x_0 ~ N(mu(image), 1); a tiny one, which does not see the image, carries x_0 to
a mask. One stage, with gradients through x_0 into mu. With x_t = (1 - t) x_0 + t y and t uniform in [0, 1]:

    L = E_t cross-entropy(f(x_t, t), y),  the mean over pixels

A sample takes Euler steps of v = sigmoid(f(x_t, t)) - x_0, which ends at the mean of the steps' sigmoids.

Deviations: one channel in place of one per label; U-Net of ATFM's appendix (widths dim * dim_mults) in place
of a net of 14 M parameters, ST-Net of 16 channels and two levels (0.14 M) for the tiny one (0.15 M); learning
rate, clipping, averaging of weights and augmentation are those of the project's settings.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadata_manager import FlowConfig
from models.baselines.stepwise import Stepwise, normal_like
from models.flow import euler, linear_path
from models.st_net import STNet
from models.unet import UNet


class FlowSSN(Stepwise):
    """steps: of a sample (the paper: 10 to 50). flow_dim, flow_mults: widths of the tiny net, see `STNet`."""

    def __init__(self, channels: int, config: FlowConfig, *, steps: int = 50, flow_dim: int = 16,
                 flow_mults: tuple[int, ...] = (1, 1)) -> None:
        super().__init__(channels, config, steps)
        filters = [config.dim * mult for mult in config.dim_mults]
        self.mean = nn.Sequential(UNet(channels, filters, convs=2, pool="max", up="transposed"),
                                  nn.Conv2d(filters[0], 1, 1))
        self.net = STNet.of(replace(config, dim=flow_dim, dim_mults=flow_mults), image_channels=0)

    def terms(self, image: Tensor, y: Tensor) -> dict[str, Tensor]:
        """loss and CE, the same number."""
        # The noise is added to mu, not drawn around a constant: gradients reach mu through x_0 (one stage).
        mu, t = self.mean(image), torch.rand(len(y), device=y.device)
        x_t = linear_path(mu + torch.randn_like(mu), y, t).x_t
        # The net predicts the mask, not the velocity. It sees none of the image's channels.
        loss = F.binary_cross_entropy_with_logits(self.net(x_t, t, image[:, :0]), y)
        return {"loss": loss, "CE": loss}

    def draw(self, image: Tensor, n: int, steps: int, in_chunks: Callable[..., Tensor],
             generator: torch.Generator | None) -> Tensor:
        mu = self.mean(image).repeat_interleave(n, dim=0)  # (b * n, 1, h, w)
        x_0 = mu + normal_like(mu, generator)
        # The image has done its part in mu: the tiny net gets zero channels of it.
        no_image = mu[:, :0]

        def velocity(x: Tensor, t: float) -> Tensor:
            return in_chunks(self.net, x, x.new_full((len(x),), t), no_image).sigmoid() - x_0

        # Clamped for rounding only: what Euler ends at is a mean of sigmoids.
        return euler(velocity, x_0, steps).clamp(0, 1)
