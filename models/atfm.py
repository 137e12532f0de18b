"""ATFM: a frozen GTR gives x_0, ST-Net carries it to a mask (paper, Algorithm 1). Step 2, and inference."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from metadata_manager import PriorConfig
from models.flow import draw_time, endpoint, linear_path, one_expert, semantic_loss
from models.gtr import GTR
from models.parallel import Part, whole
from models.solvers import SOLVERS, Velocity
from models.st_net import STNet, standardize

Field = Callable[[Tensor, Tensor, Tensor], Tensor]  # v(x_t, t, image), as STNet.forward
GREY = (0.299, 0.587, 0.114)  # weights of R, G, B in the grey image that ST-Net sees


class ATFM(nn.Module):
    """The flow's objective and its sampler, over a frozen `gtr` and the velocity field `net`.

    gtr: may be None when source is "normal", which draws x_0 ~ N(0, I) instead.
    alpha, dice, dice_over, semantic_target: the weight and form of L_SF, see `semantic_loss`.
    experts: "all" trains on the paths to every annotator of an image, "one" on a random one.
    signed: masks are -1 / 1 within the flow rather than 0 / 1.
    condition_dropout, guidance: CFM's classifier-free guidance (arXiv 2507.22418): the share of images that
    are zeros in training, and w in (1 + w) v(image) - w v(zeros) in sampling.
    annotators_per_pass: how many annotators' paths go through the net at once in training; None: all.
    amp: the net runs under bfloat16 autocast; GTR, losses and the ODE's state stay in float32.
    Raises ValueError for a choice that does not exist, or source "gtr" without a GTR.
    """

    def __init__(self, gtr: GTR | None, net: STNet, *, source: str = "gtr", alpha: float = 1e-3,
                 dice: str = "soft", dice_over: str = "image", semantic_target: str = "own",
                 experts: str = "all", signed: bool = False, condition_dropout: float = 0.0,
                 guidance: float = 0.0, annotators_per_pass: int | None = None, amp: bool = False) -> None:
        super().__init__()
        check_choices(source=source, dice=dice, dice_over=dice_over, semantic_target=semantic_target,
                      experts=experts)
        if source == "gtr" and gtr is None:
            raise ValueError("source='gtr' needs a GTR; train one first or take source='normal'")
        self.gtr = gtr.requires_grad_(False) if gtr is not None and source == "gtr" else None
        self.net = net
        self.alpha, self.dice, self.dice_over, self.semantic_target = alpha, dice, dice_over, semantic_target
        self.experts, self.signed = experts, signed
        self.condition_dropout, self.guidance = condition_dropout, guidance
        self.annotators_per_pass, self.amp = annotators_per_pass, amp

    @torch.no_grad()
    def source(self, image: Tensor, n: int, generator: torch.Generator | None = None,
               part: Part | None = None) -> Tensor:
        """n draws of x_0 per image (b, c, h, w): (b, n, h, w), sigmoid of GTR's logits or standard normal.

        part: the rows of a larger batch that these images are."""
        if self.gtr is not None:
            return self.gtr(image).sample(n, generator, part).sigmoid()
        b, _, h, w = image.shape
        part = part or whole(b)
        return part.cut(torch.randn(part.b, n, h, w, device=image.device, generator=generator))

    def losses(self, image: Tensor, masks: Tensor, part: Part | None = None) -> Iterator[dict[str, Tensor]]:
        """The terms of L = L_FM + alpha L_SF for a batch, in pieces whose sums are the batch's terms.

        image (b, c, h, w) in [0, 1], masks (b, k, h, w) of 0/1. Each piece holds scalars loss, L_FM, L_SF
        over `annotators_per_pass` annotators; calling backward() on one piece's loss before taking the next
        frees its activations, and the gradients add up to those of a single pass. part: the rows of the batch
        to compute, all by default. Raises ValueError for masks of another shape.
        """
        if masks.ndim != 4 or len(masks) != len(image) or masks.shape[2:] != image.shape[2:]:
            raise ValueError(f"masks of shape {tuple(masks.shape)} for image of shape {tuple(image.shape)}: "
                             "expected (b, k, h, w) for (b, c, h, w)")
        part = part or whole(len(image))
        image, masks = part.cut(image), part.cut(masks)
        x_0 = self.source(image, 1, part=part)  # (b, 1, h, w), shared by all annotators, as is t
        t = part.cut(draw_time(part.b, image.device))
        condition = self._drop_condition(grey(image), part)
        if self.experts == "one":
            masks = one_expert(masks, part)
        for own in masks.split(self.annotators_per_pass or masks.shape[1], dim=1):
            share = own.shape[1] / masks.shape[1]
            l_fm, l_sf = self._terms(x_0, own, masks, t, condition)
            l_fm, l_sf = share * l_fm, share * l_sf
            yield {"loss": l_fm + self.alpha * l_sf, "L_FM": l_fm.detach(), "L_SF": l_sf.detach()}

    def _terms(self, x_0: Tensor, own: Tensor, masks: Tensor, t: Tensor, condition: Tensor
               ) -> tuple[Tensor, Tensor]:
        """L_FM and L_SF on the paths from x_0 (b, 1, h, w) to the annotators `own` (b, j, h, w)."""
        j = own.shape[1]
        path = linear_path(x_0, 2 * own - 1 if self.signed else own, t)
        x_t = path.x_t.flatten(0, 1)[:, None]  # (b * j, 1, h, w)
        v = self._field(self.net, x_t, t.repeat_interleave(j), condition.repeat_interleave(j, dim=0))
        v = v.view_as(path.x_t)
        l_fm = (v - path.u).square().mean()
        x_1t = self._probability(endpoint(path.x_t, v, t))
        return l_fm, semantic_loss(x_1t, own, masks, self.dice, self.dice_over, self.semantic_target)

    @torch.no_grad()
    def sample(self, image: Tensor, n: int, steps: int = 25, solver: str = "euler",
               generator: torch.Generator | None = None, batch_size: int | None = None,
               net: Field | None = None) -> Tensor:
        """n masks per image (b, c, h, w) as probabilities (b, n, h, w); a mask is where they are >= 0.5.

        One pass of GTR, then the b * n states are integrated in equal parts of at most `batch_size` (default:
        all at once), which bounds memory and changes results by rounding only.
        net: `ready(self.net)`, to make it once for many calls.
        Raises ValueError for an unknown solver, no steps, no samples or an empty batch.
        """
        at_once = len(image) * n if batch_size is None else batch_size
        if solver not in SOLVERS or min(steps, n, at_once) < 1:
            raise ValueError(f"solver={solver!r}, steps={steps}, n={n}, batch_size={batch_size}: expected "
                             f"one of {', '.join(SOLVERS)}, and the numbers to be at least 1")
        conditions = grey(image).repeat_interleave(n, dim=0)  # (b * n, 1, h, w)
        x_0 = self.source(image, n, generator)  # (b, n, h, w)
        states = x_0.flatten(0, 1)[:, None]
        net = ready(self.net) if net is None else net
        parts = math.ceil(len(states) / at_once)
        ends = [SOLVERS[solver](self._velocity(net, condition), state, steps)
                for state, condition in zip(states.tensor_split(parts), conditions.tensor_split(parts))]
        return self._probability(torch.cat(ends).view_as(x_0)).clamp(0, 1)

    def _velocity(self, net: Field, condition: Tensor) -> Velocity:
        """v(x, t) for one batch of states; guided, if `guidance` is not zero: both fields in one call."""

        def velocity(x: Tensor, t: float) -> Tensor:
            times = torch.full((len(x),), t, device=x.device)
            if self.guidance == 0:
                return self._field(net, x, times, condition)
            both = torch.cat([condition, torch.zeros_like(condition)])
            conditional, null = self._field(net, x.repeat(2, 1, 1, 1), times.repeat(2), both).chunk(2)
            return (1 + self.guidance) * conditional - self.guidance * null

        return velocity

    def _field(self, net: Field, x_t: Tensor, t: Tensor,
               condition: Tensor) -> Tensor:
        """v in float32, the net itself under autocast if `amp`."""
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.amp):
            v = net(x_t, t, condition)
        return v.float()

    def _drop_condition(self, condition: Tensor, part: Part) -> Tensor:
        """Replaces whole images by zeros, each with probability `condition_dropout`."""
        if self.condition_dropout == 0:
            return condition
        kept = torch.rand(part.b, 1, 1, 1, device=condition.device) >= self.condition_dropout
        return condition * part.cut(kept)

    def _probability(self, x: Tensor) -> Tensor:
        return (x + 1) / 2 if self.signed else x


def check_choices(**chosen: str) -> None:
    """Raises ValueError for a value that is not among the choices of its field of PriorConfig."""
    allowed = {field.name: field.metadata["choices"] for field in dataclasses.fields(PriorConfig)}
    for name, value in chosen.items():
        if value not in allowed[name]:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(allowed[name])}")


def grey(image: Tensor) -> Tensor:
    """The image that ST-Net sees: (b, c, h, w) -> (b, 1, h, w); raises ValueError unless c is 1 or 3."""
    if image.ndim != 4 or image.shape[1] not in (1, 3):
        raise ValueError(f"image of shape {tuple(image.shape)}: expected (b, 1, h, w) or (b, 3, h, w)")
    if image.shape[1] == 1:
        return image
    return torch.einsum("bchw,c->bhw", image, image.new_tensor(GREY))[:, None]


def ready(net: STNet, channels_last: bool = False, compiled: bool = False) -> Field:
    """A copy of `net` for sampling: its weights standardized once instead of at every evaluation.

    channels_last: the memory layout that CUDA's convolutions are fastest in. compiled: by torch.compile, at
    first use. Either changes results by rounding only."""
    net = copy.deepcopy(net).requires_grad_(False)
    for block in net.standardized():
        block.weight.copy_(standardize(block.weight, block.method))
        block.method = "none"
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    return torch.compile(net) if compiled else net
