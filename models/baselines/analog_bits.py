"""AB, Analog Bits with self-conditioning (Chen, Zhang and Hinton, ICLR 2023, arXiv 2208.04202), on masks.

A label is a real number, -1 or 1: x_0 = 2 y - 1, x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) z. Loss:

    L = E_t (f(x_t, t, image, guess) - x_0)^2,  t uniform on 1, ..., T, the mean over pixels

guess: with probability 1/2 zeros, else f(x_t, t, image, zeros) without gradient. A sample takes steps of
DDPM's posterior, in which the guess is f of the step before. A mask is where the last x_0 is >= 0.

Deviations: ST-Net in place of a U-Net with attention at three resolutions; T levels in place of continuous
time, as in comparisons on LIDC; f is clipped to [-1, 1] in sampling; learning rate, averaging of weights and
augmentation are those of the project's settings.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from metadata_manager import FlowConfig
from models.baselines.stepwise import Diffusion, cosine, gaussian_step, normal_like
from models.st_net import STNet


class AnalogBits(Diffusion):
    """T: noise levels, and steps of a sample (250 in ATFM's comparison on LIDC)."""

    def __init__(self, channels: int, config: FlowConfig, *, T: int = 250) -> None:
        super().__init__(channels, config, cosine(T))
        self.net = STNet.of(config, channels + 1)  # the image and the guess

    def terms(self, image: Tensor, y: Tensor) -> dict[str, Tensor]:
        """loss and MSE, the same number."""
        x_0, t = 2 * y - 1, self.draw_levels(len(y))
        to_t = self.at(t)
        x_t = to_t.sqrt() * x_0 + (1 - to_t).sqrt() * torch.randn_like(x_0)
        guess = torch.zeros_like(x_0)
        # Once for the whole batch: half of the steps then take a single pass through the net.
        if torch.rand(()) < 0.5:
            with torch.no_grad():
                guess = self.net(x_t, t / self.T, torch.cat([image, guess], dim=1))
        loss = (self.net(x_t, t / self.T, torch.cat([image, guess], dim=1)) - x_0).square().mean()
        return {"loss": loss, "MSE": loss}

    def draw(self, image: Tensor, n: int, steps: int, in_chunks: Callable[..., Tensor],
             generator: torch.Generator | None) -> Tensor:
        images = image.repeat_interleave(n, dim=0)  # (b * n, c, h, w)
        x = normal_like(images[:, :1], generator)
        # The first step has no guess yet: zeros, as in half of the training steps.
        guess = torch.zeros_like(x)
        for t, s in pairwise(self.levels(steps)):
            times = x.new_full((len(x),), t / self.T)
            # Clipped, because a wrong x_0 far outside would be carried through all steps that follow.
            guess = in_chunks(self.net, x, times, torch.cat([images, guess], dim=1)).clamp(-1, 1)
            x = gaussian_step(x, guess, self.alpha_bar[t], self.alpha_bar[s], normal_like(x, generator))
        # From -1 / 1 to a probability. At s = 0 the state is the guess itself.
        return (guess + 1) / 2
