"""Controls: what simple post-processing of Act. GTR does, which a flow's gain must beat.

Each takes a sampler of probabilities, images to choose its settings on (validation patients, never those of
the test), the device, and gives a sampler.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metrics.evaluation import Images, draw
from metrics.scores import ged

DRAWN = 16  # samples per image, by whose GED the threshold is chosen
SHARES = np.linspace(0, 0.6, 25)  # of the samples that mark something, the thresholds to choose from

Sample = Callable[..., Tensor]  # (image (b, c, h, w), n, generator=None) -> (b, n, h, w) in [0, 1]


def emptied(sample: Sample, images: Images, device: torch.device | str = "cpu") -> Sample:
    """Samples that mark few pixels become empty; how few, gives the least GED on `images`."""
    drawn, sizes, masks = [], [], []
    for index, name in enumerate(images.ids):
        image, of_experts = images[index]
        drawn.append(draw(sample, image[None].to(device), DRAWN, 0, name))
        sizes.append(drawn[-1].sum((2, 3)))
        masks.append(of_experts[None].to(device).bool())
    pixels_of_all = torch.cat(sizes).flatten().cpu().numpy()
    marked = pixels_of_all[pixels_of_all > 0]
    pixels = np.unique([0, *np.quantile(marked, SHARES).astype(int)]) if len(marked) else [0]
    found = {int(below): float(np.mean([ged(_without_small(each, below), of).item()
                                        for each, of in zip(drawn, masks)])) for below in pixels}
    best = min(found, key=lambda below: found[below])
    print(f"act-gtr-emptied: samples of fewer than {best} pixels, by {len(images)} validation images")

    def without_small(*arguments: Any, **settings: Any) -> Tensor:
        return _without_small(sample(*arguments, **settings) >= 0.5, best).float()

    return without_small


def smoothed(sample: Sample, images: Images, device: torch.device | str = "cpu") -> Sample:
    """Logits are replaced by their mean over 3 x 3 pixels; nothing is chosen."""

    def smooth(*arguments: Any, **settings: Any) -> Tensor:
        logits = sample(*arguments, **settings).logit(eps=1e-6)
        return F.avg_pool2d(logits, 3, stride=1, padding=1, count_include_pad=False).sigmoid()

    return smooth


def _without_small(samples: Tensor, below: int) -> Tensor:
    return samples & (samples.sum((2, 3), keepdim=True) >= below)


CONTROLS = {"act-gtr-emptied": emptied, "act-gtr-smoothed": smoothed}


def control(method: str, sample: Sample, validation: Callable[[], Images], device: torch.device | str
            ) -> Sample:
    """The sampler of one of CONTROLS; validation: loads the images that it chooses its settings on."""
    return CONTROLS[method](sample, validation(), device)
