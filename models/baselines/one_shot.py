"""What the systems with one network evaluation per mask have in common."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from metadata_manager import FlowConfig
from models.baselines.baseline import Baseline
from models.flow import check_masks, one_expert


class OneShot(Baseline):
    """The checks and the settings of such a system; a subclass has `losses` and `draw`.

    config: dim and dim_mults give the filters of the U-Net's levels, experts the masks of a step."""

    def __init__(self, channels: int, config: FlowConfig) -> None:
        super().__init__(channels, config)
        self.filters = [config.dim * mult for mult in config.dim_mults]
        self.experts = config.experts

    def targets(self, image: Tensor, masks: Tensor) -> Tensor:
        """The masks that a step learns from: of (b, k, h, w) all, or a random expert's, (b, 1, h, w)."""
        check_masks(image, masks)
        return one_expert(masks) if self.experts == "one" else masks

    @torch.no_grad()
    def sample(self, image: Tensor, n: int, steps: int | None = None,
               generator: torch.Generator | None = None, batch_size: int | None = None) -> Tensor:
        """n masks per image (b, c, h, w) as probabilities (b, n, h, w); a mask is where they are >= 0.5.

        batch_size: samples decoded at once; bounds memory and changes results by rounding only.
        Raises ValueError for steps other than 1, or no samples."""
        if steps not in (None, 1) or min(n, 1 if batch_size is None else batch_size) < 1:
            raise ValueError(f"steps={steps}, n={n}, batch_size={batch_size}: expected one step (this system "
                             "has no solver), and the numbers to be at least 1")
        # `draw` makes all random numbers at once, so that samples do not depend on batch_size.
        logits = self.draw(image, n, self.parts(image, batch_size), generator)
        return logits.view(len(image), n, *image.shape[2:]).sigmoid()

    def draw(self, image: Tensor, n: int, in_chunks: Callable[..., Tensor],
             generator: torch.Generator | None) -> Tensor:
        """Logits of n masks per image, (b * n, h, w).

        in_chunks(net, ...): the net's output for a batch, computed a part at a time."""
        raise NotImplementedError


def rows_of(image: Tensor, n: int) -> Tensor:
    """The number of the image that each of n rows per image belongs to: 0, ..., 0, 1, ..., (b * n,)."""
    return torch.arange(len(image), device=image.device).repeat_interleave(n)


def he_normal(module: nn.Module) -> None:
    """He's initialization of a convolution, for `Module.apply`.

    With torch's default, activations shrink from layer to layer, and a latent hardly changes the output."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
