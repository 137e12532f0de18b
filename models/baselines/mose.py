"""MoSE, a mixture of stochastic experts (Gao et al. 2023, arXiv 2212.07328).

    y ~ f(x, z),  z ~ N(mu_e, sigma_e^2) with probability gate_e(x)
    L = sum_ij P_ij (1 - IoU(s_i, y_j)) + weight KL(P's mass of each component, gate(x))

s_i are samples of every component, y_j the experts' masks. P couples them: y_j gives away mass 1/k, s_i takes
at most gamma, the cheapest pairs come first. The mixture's experts are `components` here, since experts are
annotators.
Deviations: widths are `--dim` times `--dim_mults`; GroupNorm of the features instead of batch norm. Gamma
stays 1/2 (original: 1 later in training). The components' first means, from -1 to 1, the first influence of z
and the weight of the gate's term are ours. Samples are drawn by the gate and count equally (original: so, or
weighted by the gate). The optimizer is the project's (original: Adam 1e-3, halved on a plateau).
Meant for `--experts all`: with one mask per step, P couples all samples to that mask. Where experts mark two
places, the union of both is a compromise that IoU rewards: on a toy set only 1 of 3 runs sampled both masks.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from metadata_manager import FlowConfig
from models.baselines.one_shot import OneShot, he_normal, rows_of
from models.unet import UNet, descend

# Mass below this is rounding and counts as none.
ENOUGH = 1e-6
# How strongly z first acts on features of standard deviation 1. At 1 the components stay alike.
INFLUENCE = 10.0


class MoSE(OneShot):
    """A U-Net whose features are shifted by a scalar latent, of the component that the gate draws."""

    per_annotator_loss = False  # the masks are coupled to the samples together

    def __init__(self, channels: int, config: FlowConfig,
                 components: int = 4,  # original
                 component_samples: int = 4,  # original: samples of each component in training
                 gamma: float = 0.5,  # original, at first
                 gate_weight: float = 1.0) -> None:
        super().__init__(channels, config)
        self.component_samples, self.gamma, self.gate_weight = component_samples, gamma, gate_weight
        width, deepest = self.filters[0], self.filters[-1]
        self.unet = UNet(channels, self.filters, 2, "max", "transposed")
        self.gate = nn.Sequential(nn.Linear(deepest, deepest), nn.ReLU(), nn.Linear(deepest, components))
        self.mean = nn.Parameter(torch.linspace(-1, 1, components))
        self.log_std = nn.Parameter(torch.full((components,), math.log(1 / 8)))  # original
        self.norm = nn.GroupNorm(1, width)
        self.shift = nn.Linear(1, width)
        self.combine = nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(),
                                     nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, 1, 1))
        self.apply(he_normal)
        nn.init.normal_(self.shift.weight, std=INFLUENCE)

    def losses(self, image: Tensor, masks: Tensor) -> Iterator[dict[str, Tensor]]:
        """L and its two terms, means over the batch, in one piece; see `OneShot.targets`."""
        targets = self.targets(image, masks)
        features, log_gate = self.features(image)
        # All components are sampled, not those that the gate draws, so that each can be taught by some mask.
        component = torch.arange(len(self.mean), device=image.device)
        component = component.repeat_interleave(self.component_samples)
        component = component.repeat(len(image))  # (b * m,), m = components * component_samples
        noise = torch.randn(component.shape, device=image.device)
        rows = rows_of(image, len(self.mean) * self.component_samples)
        samples = self.decode(features[rows], component, noise).sigmoid().unflatten(0, (len(image), -1))
        cost = 1 - soft_iou(samples[:, :, None], targets[:, None])  # (b, m, j)
        # The coupling is chosen, not learned: gradients go through the cost alone.
        coupling = greedy_coupling(cost.detach(), self.gamma)
        transport = (coupling * cost).sum((1, 2)).mean()
        # The gate learns how much of the masks' mass each component takes.
        mass = coupling.sum(2).unflatten(1, (-1, self.component_samples)).sum(2)  # (b, components)
        kl = (torch.xlogy(mass, mass) - mass * log_gate).sum(1).mean()
        yield {"loss": transport + self.gate_weight * kl, "transport": transport.detach(), "KL": kl.detach()}

    def features(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Features (b, filters[0], h, w) and the logarithm of the gate (b, components)."""
        maps = descend(image, self.unet.down_blocks, self.unet.pool)
        return self.norm(self.unet.ascend(maps)), self.gate(maps[-1].mean((2, 3))).log_softmax(1)

    def decode(self, features: Tensor, component: Tensor, noise: Tensor) -> Tensor:
        """Logits (m, h, w) of features (m, filters[0], h, w), components (m,) and normal noise (m,)."""
        z = self.mean[component] + self.log_std.exp()[component] * noise
        return self.combine(features + self.shift(z[:, None])[:, :, None, None])[:, 0]

    def draw(self, image: Tensor, n: int, in_chunks: Callable[..., Tensor],
             generator: torch.Generator | None) -> Tensor:
        features, log_gate = self.features(image)
        component = torch.multinomial(log_gate.exp(), n, replacement=True, generator=generator).flatten()
        noise = torch.randn(component.shape, device=image.device, generator=generator)
        return in_chunks(lambda row, *z: self.decode(features[row], *z), rows_of(image, n), component, noise)


def soft_iou(predicted: Tensor, mask: Tensor) -> Tensor:
    """IoU of maps (..., h, w) in [0, 1]: (...). With 1 added to both parts, two empty maps score 1."""
    overlap = (predicted * mask).sum((-2, -1))
    return (overlap + 1) / (predicted.sum((-2, -1)) + mask.sum((-2, -1)) - overlap + 1)


def greedy_coupling(cost: Tensor, gamma: float) -> Tensor:
    """Mass P (b, m, j) between m samples and j masks, by costs (b, m, j).

    Columns sum to 1 / j, rows to at most gamma. The cheapest pair with mass left gets all it can, then the
    next. With gamma >= 1 every mask takes its nearest sample, which is optimal; with less, P need not be.
    Raises ValueError if m samples cannot take mass 1."""
    b, m, j = cost.shape
    if gamma * m < 1:
        raise ValueError(f"gamma={gamma} for {m} samples: expected gamma * samples of at least 1")
    rows, columns = cost.new_full((b, m), gamma), cost.new_full((b, j), 1 / j)
    coupling, image = torch.zeros_like(cost), torch.arange(b, device=cost.device)
    # Each time round, a mask or a sample is used up: j masks, and as many samples as mass 1 can fill.
    for _ in range(j + int(1 / gamma)):
        done = (rows < ENOUGH)[:, :, None] | (columns < ENOUGH)[:, None]
        pair = cost.masked_fill(done, math.inf).flatten(1).argmin(1)
        row, column = pair // j, pair % j
        mass = torch.minimum(rows[image, row], columns[image, column])
        coupling[image, row, column] += mass
        rows[image, row] -= mass
        columns[image, column] -= mass
    return coupling
