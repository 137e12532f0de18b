"""Systems that sample in steps: losses over the experts' masks, samples, diffusion schedules.

Notation of diffusions: t = 0, ..., T counts noise levels, x_0 is the mask (not the flow's source), x_T noise;
alpha_bar_t is the fraction of x_0 that is left at t, alpha_bar_0 = 1; s < t is the level that a step goes to.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from metadata_manager import FlowConfig
from models.baselines.baseline import SETTINGS, Baseline
from models.flow import check_masks, one_expert

# The most noise of a single step: near t = T the cosine would have 1 (arXiv 2102.09672, Sec. 3.2).
MAX_BETA = 0.999


class Stepwise(Baseline):
    """A system whose sampler takes `steps` steps unless told otherwise; its net is an `STNet`.

    channels: of its images. config: `experts` is "one" for a random one per image and step, or "all" for the
    mean over them. A subclass has `terms` and `draw`."""

    settings = SETTINGS | {"weight_standardization", "time_scale", "recompute"}

    def __init__(self, channels: int, config: FlowConfig, steps: int) -> None:
        super().__init__(channels, config)
        self.channels, self.experts = channels, config.experts
        self.steps: int = steps

    def terms(self, image: Tensor, y: Tensor) -> dict[str, Tensor]:
        """The loss and its parts, as scalars, for images (b, c, h, w) with a mask (b, 1, h, w) each."""
        raise NotImplementedError

    def draw(self, image: Tensor, n: int, steps: int, in_chunks: Callable[..., Tensor],
             generator: torch.Generator | None) -> Tensor:
        """n masks per image as probabilities, (b * n, 1, h, w).

        in_chunks(net, ...): the net's output for a batch, computed a part at a time."""
        raise NotImplementedError

    def losses(self, image: Tensor, masks: Tensor) -> Iterator[dict[str, Tensor]]:
        """Pieces of a batch's loss, see `Baseline`, one per expert.

        Raises ValueError for an image of other channels, or masks of another shape."""
        self._check_channels(image)
        check_masks(image, masks)
        targets = one_expert(masks) if self.experts == "one" else masks
        # One expert at a time, which keeps the activations of one pass only.
        for y in targets.split(1, dim=1):
            terms = {name: value / targets.shape[1] for name, value in self.terms(image, y).items()}
            yield {name: value if name == "loss" else value.detach() for name, value in terms.items()}

    @torch.no_grad()
    def sample(self, image: Tensor, n: int, steps: int | None = None,
               generator: torch.Generator | None = None, batch_size: int | None = None) -> Tensor:
        """n masks per image (b, c, h, w) as probabilities (b, n, h, w); a mask is where they are >= 0.5.

        batch_size: states that go through the net at once; it changes results by rounding only.
        Raises ValueError for an image of other channels, an empty batch, no samples, no steps, or more steps
        than there are."""
        self._check_channels(image)
        steps = self.steps if steps is None else steps
        if min(len(image), n, steps, 1 if batch_size is None else batch_size) < 1 or steps > self.most_steps:
            raise ValueError(f"{len(image)} images, n={n}, steps={steps}, batch_size={batch_size}: expected "
                             f"at least 1 of each, and at most {self.most_steps} steps")
        probabilities = self.draw(image, n, steps, self.parts(image, batch_size), generator)
        return probabilities.view(len(image), n, *image.shape[2:])

    def _check_channels(self, image: Tensor) -> None:
        if image.ndim != 4 or image.shape[1] != self.channels:
            raise ValueError(f"image of shape {tuple(image.shape)}: expected (b, {self.channels}, h, w)")


class Diffusion(Stepwise):
    """A system over noise levels t = 1, ..., T with a schedule alpha_bar (T + 1,); it samples in T steps.

    Fewer steps go through every (T / steps)-th level."""

    alpha_bar: Tensor

    def __init__(self, channels: int, config: FlowConfig, alpha_bar: Tensor) -> None:
        self.T = len(alpha_bar) - 1
        super().__init__(channels, config, steps=self.T)
        self.most_steps = self.T
        # A buffer goes to the device with the module. Not persistent: it is no weight of a checkpoint.
        self.register_buffer("alpha_bar", alpha_bar, persistent=False)

    def draw_levels(self, b: int) -> Tensor:
        """A random t for each image, (b,), uniform on 1, ..., T."""
        return torch.randint(1, self.T + 1, (b,), device=self.alpha_bar.device)

    def at(self, t: Tensor) -> Tensor:
        """alpha_bar at t (b,), as (b, 1, 1, 1)."""
        return self.alpha_bar[t][:, None, None, None]

    def levels(self, steps: int) -> list[int]:
        """From T down to 0, both included, in `steps` steps."""
        return [self.T * i // steps for i in range(steps, -1, -1)]


def normal_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise of x's shape and device."""
    return torch.randn(x.shape, device=x.device, generator=generator)


def cosine(T: int) -> Tensor:
    """alpha_bar (T + 1,): f(t) / f(0), f(t) = cos^2((t / T + 0.008) / 1.008 * pi / 2) (arXiv 2102.09672)."""
    # In float64, because near t = 0 the ratios of f are close to 1.
    angle = (torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2
    f = angle.cos().square()
    return of_betas(1 - f[1:] / f[:-1])


def linear(T: int) -> Tensor:
    """alpha_bar (T + 1,) of betas from 1e-4 to 0.02 (arXiv 2006.11239), times 1000 / T if T is not 1000."""
    # The factor keeps alpha_bar_T about the same for every T.
    return of_betas(torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T)


def of_betas(betas: Tensor) -> Tensor:
    """alpha_bar_0 = 1, ..., alpha_bar_T, the running product of 1 - beta; betas (T,)."""
    kept = (1 - betas.clamp(max=MAX_BETA)).cumprod(0)
    return torch.cat([kept.new_ones(1), kept]).float()


def gaussian_step(x_t: Tensor, x_0: Tensor, to_t: Tensor, to_s: Tensor, noise: Tensor) -> Tensor:
    """A sample of q(x_s | x_t, x_0) where q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, 1 - alpha_bar_t).

    to_t, to_s: alpha_bar at t and s. noise: standard normal, as x_t. At s = 0 this is x_0. DDPM's Eq. 6-7
    (arXiv 2006.11239)."""
    # The part of x_s that is left in x_t: alpha of all levels between.
    kept = to_t / to_s
    mean = (to_s.sqrt() * (1 - kept) * x_0 + kept.sqrt() * (1 - to_s) * x_t) / (1 - to_t)
    # The variance is the posterior's. At s = 0 it vanishes.
    return mean + ((1 - kept) * (1 - to_s) / (1 - to_t)).sqrt() * noise
