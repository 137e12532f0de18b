"""CCDM, conditional categorical diffusion (Zbinden et al., ICCV 2023, arXiv 2303.08888), of two labels.

Noise replaces a pixel's label by a random one: q(x_t = 1 | x_0) = alpha_bar_t x_0 + (1 - alpha_bar_t) / 2.
The net gives p(x_0 | x_t), and p(x_{t-1} | x_t) = sum over x_0 of q(x_{t-1} | x_t, x_0) p(x_0 | x_t). Loss:

    L = E_t KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)),  t uniform on 1, ..., T, the mean over pixels

which at t = 1 is the cross-entropy of x_0. A sample draws every x_{t-1} at random, pixel by pixel; only of
x_0, the last one, it takes the more likely label.

Deviations: ST-Net in place of a U-Net with attention at three resolutions; its one output is the logit of
label 1; learning rate, averaging of weights and augmentation are those of the project's settings.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from metadata_manager import FlowConfig
from models.baselines.stepwise import Diffusion, cosine
from models.st_net import STNet


class CCDM(Diffusion):
    """T: noise levels, and steps of a sample (the paper's LIDC experiments: 250)."""

    def __init__(self, channels: int, config: FlowConfig, *, T: int = 250) -> None:
        super().__init__(channels, config, cosine(T))
        self.net = STNet.of(config, channels)

    def terms(self, image: Tensor, y: Tensor) -> dict[str, Tensor]:
        """loss and KL, the same number."""
        t = self.draw_levels(len(y))
        to_t, to_s = self.at(t), self.at(t - 1)
        x_t = torch.bernoulli(noised(y, to_t))
        log_p = log_reverse(x_t, self.net(x_t, t / self.T, image), to_t, to_s)
        q = posterior(x_t, y, to_t, to_s)
        # KL = sum over both labels of q log q - q log p; xlogy takes 0 log 0 as 0.
        off, on = (torch.xlogy(q_v, q_v) - q_v * log_p_v for q_v, log_p_v in zip((1 - q, q), log_p))
        loss = (off + on).mean()
        return {"loss": loss, "KL": loss}

    def draw(self, image: Tensor, n: int, steps: int, in_chunks: Callable[..., Tensor],
             generator: torch.Generator | None) -> Tensor:
        images = image.repeat_interleave(n, dim=0)  # (b * n, c, h, w)
        # At x_T nothing is left of the mask: both labels are equally likely.
        x = torch.bernoulli(torch.full_like(images[:, :1], 0.5), generator=generator)
        for t, s in pairwise(self.levels(steps)):
            logits = in_chunks(self.net, x, x.new_full((len(x),), t / self.T), images)
            # No noise at the end: of x_0 the more likely label is taken.
            if s:
                _, log_on = log_reverse(x, logits, self.alpha_bar[t], self.alpha_bar[s])
                # Rounding may leave a probability just above 1.
                x = torch.bernoulli(log_on.exp().clamp(max=1), generator=generator)
        return logits.sigmoid()


def noised(x: Tensor, kept: Tensor) -> Tensor:
    """The probability of label 1 if label x is kept with probability `kept` and else drawn anew.

    As noise treats both labels alike, it is also the probability of label x if label 1 is noised."""
    return kept * x + (1 - kept) / 2


def posterior(x_t: Tensor, x_0: Tensor, to_t: Tensor, to_s: Tensor) -> Tensor:
    """q(x_s = 1 | x_t, x_0) by Bayes' rule, s < t; to_t, to_s: alpha_bar at t and s."""
    # q(x_t | x_s = 1) and q(x_s = 1 | x_0), whose product is the numerator.
    back, ahead = noised(x_t, to_t / to_s), noised(x_0, to_s)
    on, off = back * ahead, (1 - back) * (1 - ahead)
    return on / (on + off)


def log_reverse(x_t: Tensor, logits: Tensor, to_t: Tensor, to_s: Tensor) -> tuple[Tensor, Tensor]:
    """log p(x_s = 0 | x_t) and log p(x_s = 1 | x_t), of the logits of p(x_0 = 1 | x_t).

    Finite also where a posterior is 0 or 1, as all are at s = 0."""
    of_0, of_1 = (posterior(x_t, torch.full_like(x_t, label), to_t, to_s) for label in (0.0, 1.0))
    # p(x_s | x_t) is a sum over both x_0, here in logarithms: a net that is sure makes one of them underflow.
    log_0, log_1 = F.logsigmoid(-logits), F.logsigmoid(logits)
    return (torch.logaddexp(log_0 + (1 - of_0).log(), log_1 + (1 - of_1).log()),
            torch.logaddexp(log_0 + of_0.log(), log_1 + of_1.log()))
