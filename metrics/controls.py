"""The control: what simple post-processing of Act. GTR does, which a flow's gain must beat.

A control takes a sampler of probabilities, images to choose its settings on (validation patients, never those
of the test) and the device, and gives a sampler.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metrics.evaluation import Images, draw
from metrics.scores import ged

SAMPLES = 16  # per image, by whose GED the threshold is chosen
FRACTIONS = np.linspace(0, 0.6, 25)  # quantiles of the size of samples that are not empty

Sample = Callable[..., Tensor]  # (image (b, c, h, w), n, generator=None) -> (b, n, h, w) in [0, 1]


def emptied(sample: Sample, images: Images, device: torch.device | str = "cpu") -> Sample:
    """Samples of few pixels become empty; the threshold is that of the least GED on `images`."""
    pairs = []
    for index, name in enumerate(images.ids):
        image, masks = images[index]
        # Always seed 0, so that the same validation images give the same threshold.
        samples = draw(sample, image[None].to(device), SAMPLES, 0, name)
        pairs.append((samples, masks[None].to(device).bool()))
    sizes = torch.cat([samples.sum((2, 3)).flatten() for samples, _ in pairs]).cpu().numpy()
    # Where most samples are empty, most quantiles of all sizes would be 0.
    sizes = sizes[sizes > 0]
    # 0 among them: it may be that nothing should be emptied.
    thresholds = np.unique([0, *np.quantile(sizes, FRACTIONS).astype(int)]) if len(sizes) else [0]
    ged_at = {int(pixels): float(np.mean([ged(_without_small(samples, pixels), masks).item()
                                          for samples, masks in pairs])) for pixels in thresholds}
    # Thresholds ascend: of several with the least GED, the one that changes the fewest samples is taken.
    best = min(ged_at, key=lambda pixels: ged_at[pixels])
    print(f"act-gtr-emptied: samples of fewer than {best} pixels, by {len(images)} validation images")

    def without_small(*arguments: Any, **settings: Any) -> Tensor:
        return _without_small(sample(*arguments, **settings) >= 0.5, best).float()

    return without_small


def _without_small(samples: Tensor, pixels: int) -> Tensor:
    """samples (b, n, h, w) bool, those of fewer pixels empty."""
    return samples & (samples.sum((2, 3), keepdim=True) >= pixels)


CONTROLS = {"act-gtr-emptied": emptied}


def control(method: str, sample: Sample, validation: Callable[[], Images], device: torch.device | str
            ) -> Sample:
    """The sampler of one of CONTROLS; validation: loads the images that it chooses its settings on."""
    # The images are loaded only here, as most tests have no control.
    return CONTROLS[method](sample, validation(), device)
