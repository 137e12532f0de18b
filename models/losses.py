"""Loss terms of the flow, L = L_FM + alpha L_SF (paper, Algorithm 1). Each is an entry of TERMS."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metadata_manager import Objective


@dataclass(frozen=True)
class Prediction:
    """What the network gives on the paths to some experts' masks; all (b, j, h, w), all_masks (b, k, h, w).

    v: the velocity; u: the one to be predicted. x_1t: the mask x_1^t that v leads to, about in [0, 1].
    target: the masks of 0/1 that the paths lead to, out of all_masks."""

    v: Tensor
    x_1t: Tensor
    target: Tensor
    u: Tensor
    all_masks: Tensor


@dataclass(frozen=True)
class Term:
    """A term of the loss, a scalar mean over images and annotators, and its weight."""

    loss: Callable[[Prediction, Objective], Tensor]
    weight: Callable[[Objective], float]


def flow_matching_loss(prediction: Prediction, choice: Objective) -> Tensor:
    """L_FM, the mean of (v - u)^2 over pixels, annotators and images, a scalar (Algorithm 1)."""
    # No weight over time: t is drawn uniformly, and every t counts alike.
    return (prediction.v - prediction.u).square().mean()


def semantic_loss(prediction: Prediction, choice: Objective) -> Tensor:
    """L_SF: the mean of 1 - Dice(x_1^t, y), a scalar (Algorithm 1).

    choice.dice: "soft" keeps the gradient; "thresholded" cuts it, as the released code does.
    choice.dice_over: see `dice`. choice.semantic_target: "own" compares x_1^t with the mask that its path
    leads to, "all" with every expert's mask."""
    soft = choice.dice == "soft"
    # Nothing bounds x_1^t, and outside [0, 1] Dice does not measure overlap. A thresholded x_1^t has no
    # gradient: L_SF is then only logged, it changes nothing in training.
    predicted = (prediction.x_1t.clamp(0, 1) if soft
                 else (prediction.x_1t.detach() >= 0.5).to(prediction.target.dtype))
    if choice.semantic_target == "own":
        return 1 - dice(predicted, prediction.target, choice.dice_over).mean()
    # The paper's text: every prediction is compared with every expert's mask, whichever its path leads to.
    return 1 - torch.stack([dice(predicted, y[:, None].expand_as(predicted), choice.dice_over).mean()
                            for y in prediction.all_masks.unbind(1)]).mean()


def dice(predicted: Tensor, mask: Tensor, over: str) -> Tensor:
    """Soft Dice, in (0, 1], of maps (b, k, h, w) in [0, 1].

    over: "image" gives one for each image and annotator, (b, k); "batch" one for each annotator, (k,).
    One is added to numerator and denominator, so that two empty maps score 1.
    """
    # The released code also sums over the images of the batch, so that large masks count most.
    dims = (-2, -1) if over == "image" else (0, -2, -1)
    overlap, total = (predicted * mask).sum(dims), (predicted + mask).sum(dims)
    return (2 * overlap + 1) / (total + 1)


# A term that is added is one entry here; it is logged under its name. L_FM has weight 1 (Algorithm 1).
TERMS: dict[str, Term] = {
    "L_FM": Term(flow_matching_loss, lambda choice: 1.0),
    "L_SF": Term(semantic_loss, lambda choice: choice.alpha),
}
