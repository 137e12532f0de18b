"""CIMD, a diffusion with a latent of ambiguity (Rahman et al., CVPR 2023, arXiv 2304.04745).

A diffusion over masks, x_0 = 2 y - 1, x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) z, whose net also
sees a latent e. With Gaussians p(e | image) and q(e | image, y) of two encoders the loss is

    L = E_t (f(x_t, t, image, e) - z)^2 + beta KL(q || p),  e ~ q, t uniform on 1, ..., T

its first term a mean over pixels. A sample draws e from p once, then takes T steps of DDPM's posterior.

Deviations: p sees the image alone, as in Prob. U-Net (the paper describes its second encoder as one that sees
the diffusion's output too); e enters as constant planes beside the image; ST-Net in place of a U-Net of 128
channels; encoders have ST-Net's widths and end in a global average; their standard deviations have a lower
bound, which keeps the KL finite; the predicted x_0 is clipped to [-1, 1] in sampling; a step's variance is
the posterior's, not learned; learning rate and batch size are those of the project's settings.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from metadata_manager import FlowConfig
from models.baselines.latent import Encoder, with_planes
from models.baselines.stepwise import Diffusion, gaussian_step, linear, normal_like
from models.st_net import STNet


class CIMD(Diffusion):
    """latents: numbers in e (as in Prob. U-Net). T: noise levels, and steps of a sample (the original: 1000).

    beta: weight of the KL, about Prob. U-Net's 10 divided by 128 x 128: its other term sums over pixels, this
    one's is their mean."""

    def __init__(self, channels: int, config: FlowConfig, *, T: int = 1000, latents: int = 6,
                 beta: float = 1e-3) -> None:
        super().__init__(channels, config, linear(T))
        filters = [config.dim * mult for mult in config.dim_mults]
        self.prior = Encoder(channels, filters, latents, convs=2)
        self.posterior = Encoder(channels + 1, filters, latents, convs=2)
        self.net = STNet.of(config, channels + latents)
        self.beta = beta

    def terms(self, image: Tensor, y: Tensor) -> dict[str, Tensor]:
        """loss, MSE and KL; the KL is summed over latents, and its mean taken over images."""
        # The posterior sees the mask, as -1 / 1, and only in training.
        p, q = self.prior(image), self.posterior(torch.cat([image, 2 * y - 1], dim=1))
        t, z = self.draw_levels(len(y)), torch.randn_like(y)
        to_t = self.at(t)
        x_t = to_t.sqrt() * (2 * y - 1) + (1 - to_t).sqrt() * z
        mse = (self.net(x_t, t / self.T, with_planes(image, q.rsample())) - z).square().mean()
        kl = q.kl(p).mean()
        return {"loss": mse + self.beta * kl, "MSE": mse, "KL": kl}

    def draw(self, image: Tensor, n: int, steps: int, in_chunks: Callable[..., Tensor],
             generator: torch.Generator | None) -> Tensor:
        # One latent per sample, for all its steps: it says which of the experts' opinions this sample has.
        p = self.prior(image)
        mean, std = p.mean.repeat_interleave(n, dim=0), p.std.repeat_interleave(n, dim=0)
        e = mean + std * normal_like(mean, generator)
        condition = with_planes(image.repeat_interleave(n, dim=0), e)  # (b * n, c + latents, h, w)
        x = normal_like(condition[:, :1], generator)
        for t, s in pairwise(self.levels(steps)):
            to_t, to_s = self.alpha_bar[t], self.alpha_bar[s]
            z = in_chunks(self.net, x, x.new_full((len(x),), t / self.T), condition)
            # x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) z, solved for x_0.
            x_0 = ((x - (1 - to_t).sqrt() * z) / to_t.sqrt()).clamp(-1, 1)
            x = gaussian_step(x, x_0, to_t, to_s, normal_like(x, generator))
        # From -1 / 1 to a probability.
        return (x_0 + 1) / 2
