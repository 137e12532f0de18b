"""ATFM: a frozen GTR gives x_0, ST-Net carries it to a mask (paper, Algorithm 1): training and sampling."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from metadata_manager import GREY, Objective
from models.chunks import Chunks, states_at_once
from models.flow import SOLVERS, Velocity, check_masks, draw_time, endpoint, linear_path, one_expert
from models.gtr import GTR, TrainedOn
from models.losses import TERMS, Prediction
from models.sources import SOURCES, source_named


class ATFM(nn.Module):
    """The flow's losses and its sampler, over a frozen `gtr` and the velocity field `net`.

    gtr: may be None where the objective's source needs none, such as x_0 ~ N(0, I).
    net: net(x_t (b, 1, h, w), t (b,), image (b, image_channels, h, w)) -> v (b, 1, h, w).
    objective: see `metadata_manager.Objective`.
    annotators_per_pass, images_per_pass: how many go through the net at once in training; None: all.
    amp: the net runs under bfloat16 autocast; GTR, losses and the ODE's state stay in float32.
    Raises ValueError for an unknown source, for one over GTR without a GTR, or for a source in [0, 1] with
    masks of -1 / 1.
    """

    needs_style = False  # whether `losses` takes the styles of the masks, see `models.baselines.Baseline`
    trained_on: TrainedOn  # set where a checkpoint is loaded

    def __init__(self, gtr: GTR | None, net: nn.Module, objective: Objective | None = None, *,
                 annotators_per_pass: int | None = None, images_per_pass: int | None = None,
                 amp: bool = False) -> None:
        super().__init__()
        self.objective = choice = objective or Objective()
        self.source = source = source_named(choice.source)
        if source.over_gtr and gtr is None:
            raise ValueError(f"--source {choice.source} needs a GTR; train one first, or take one of "
                             f"{', '.join(name for name, other in SOURCES.items() if not other.over_gtr)}")
        # x_0 near 0 is background to such a source, as to masks of 0 / 1. Among masks of -1 / 1 it would be
        # half way to the object.
        if source.unit_range and choice.signed:
            raise ValueError(f"--signed True: x_0 of --source {choice.source} is in [0, 1], the masks would "
                             "be -1 / 1; leave it out, or take another source")
        # None where the source needs none, so that checkpoints do not say that the flow depends on a GTR.
        # Frozen: step 2 trains the net alone.
        self.gtr = gtr.requires_grad_(False) if gtr is not None and source.over_gtr else None
        self.net = net
        self.annotators_per_pass, self.images_per_pass, self.amp = annotators_per_pass, images_per_pass, amp
        self.in_chunks = Chunks()
        self.compiled = self.had_several = False  # see `compile_net`
        self.steps = choice.steps  # of the solver, per sample
        self.per_annotator_loss = choice.per_annotator_loss

    def compile_net(self) -> None:
        """Has torch.compile make one graph of the net, for every number of states that goes through it."""
        self.net.compile()
        self.compiled = True

    def for_sampling(self, amp: bool, channels_last: bool = False, compiled: bool = False) -> "ATFM":
        """A copy whose net has fixed weights, in the precision and memory layout to sample in.

        channels_last, compiled: faster on CUDA, channels_last only together with compiled. Both change
        results by rounding only."""
        net = self.net.with_fixed_weights()
        # The trained net may be in channels_last, which is slow for the uncompiled copy of a validation.
        net.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        copy = ATFM(self.gtr, net, self.objective, amp=amp).eval()
        if compiled:
            copy.compile_net()
        return copy

    def for_validation(self, net: nn.Module) -> "ATFM":
        """The same flow over other weights of the net, such as averaged ones, in Euler steps."""
        # --val_steps counts Euler steps, whatever solver the test takes.
        return ATFM(self.gtr, net, replace(self.objective, solver="euler")).for_sampling(self.amp)

    @property
    def trainable(self) -> nn.Module:
        """What is trained and kept; GTR is frozen."""
        return self.net

    def nfe(self, steps: int | None = None, solver: str | None = None) -> int:
        """Network evaluations per sample; guidance takes two, one of them without the image."""
        per_step = SOLVERS[solver or self.objective.solver].nfe
        return (steps or self.steps) * per_step * (1 if self.objective.guidance == 0 else 2)

    @torch.no_grad()
    def sample_source(self, image: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        """x_0, where the paths of images (b, c, h, w) begin: n samples of the source each, (b, n, h, w)."""
        # GTR runs once per image, however many samples are drawn from its Gaussian.
        gaussian = None if self.gtr is None else self.gtr.truncation(image)
        return self.source.sample(image, gaussian, n, generator)

    def condition(self, image: Tensor) -> Tensor:
        """What the net sees of images (b, c, h, w): all channels, or their grey where the net takes one."""
        return image if image.shape[1] == self.net.image_channels else grey(image)

    def losses(self, image: Tensor, masks: Tensor) -> Iterator[dict[str, Tensor]]:
        """L = L_FM + alpha L_SF of a batch (Algorithm 1), in summands: one for each pass through the net.

        image (b, c, h, w) in [0, 1], masks (b, k, h, w) of 0/1. A pass takes `images_per_pass` images and
        `annotators_per_pass` annotators. It yields the loss and each entry of `models.losses.TERMS` as
        scalars, weighted so that their sums over the passes are the batch's means. Calling backward() on one
        loss before taking the next frees its activations; the gradients add up. Raises ValueError for masks
        of another shape.
        """
        check_masks(image, masks)
        choice = self.objective
        # All experts of an image share x_0 and t (Algorithm 1): this costs one sample of GTR, and their
        # paths differ in the target only.
        x_0 = self.sample_source(image, 1)  # (b, 1, h, w)
        t = draw_time(len(image), image.device)
        # Once per image, before the batch is split: an image is dropped for all its experts or for none.
        condition = self._drop_condition(self.condition(image))
        targets = one_expert(masks) if choice.experts == "one" else masks
        path = linear_path(x_0.expand_as(targets), self._signed(targets), t)
        images, experts = self.images_per_pass or len(targets), self.annotators_per_pass or targets.shape[1]
        # Parts of the images, then of their annotators: each pass keeps the activations of its own part only.
        batch = (targets, path.x_t, path.u, masks, t, condition)
        for *paths, all_masks, t_of_pass, condition_of_pass in zip(*(whole.split(images) for whole in batch)):
            for y, x_t, u in zip(*(path_.split(experts, dim=1) for path_ in paths)):
                prediction = self._predict(y, x_t, u, all_masks, t_of_pass, condition_of_pass)
                # The last part may be smaller: with these weights the parts' means add up to the batch's.
                weight = y.numel() / targets.numel()
                terms = {name: weight * term.loss(prediction, choice) for name, term in TERMS.items()}
                # L = L_FM + alpha L_SF (Algorithm 1). The terms themselves are logged without their weights.
                loss = sum(TERMS[name].weight(choice) * value for name, value in terms.items())
                yield {"loss": loss, **{name: value.detach() for name, value in terms.items()}}

    def _predict(self, target: Tensor, x_t: Tensor, u: Tensor, all_masks: Tensor, t: Tensor, condition: Tensor
                 ) -> Prediction:
        """The net's prediction on the paths to the masks `target`; target, x_t and u are (b, j, h, w)."""
        j = target.shape[1]
        # The net knows no experts: each path is one state, with the t and the condition of its image.
        states = x_t.flatten(0, 1)[:, None]  # (b * j, 1, h, w)
        v = self.v(states, t.repeat_interleave(j), condition.repeat_interleave(j, dim=0)).view_as(target)
        # L_SF compares masks of 0 / 1, whatever range the flow is in.
        return Prediction(v, self._probability(endpoint(x_t, v, t)), target, u, all_masks)

    @torch.no_grad()
    def sample(self, image: Tensor, n: int, steps: int | None = None, solver: str | None = None,
               generator: torch.Generator | None = None, batch_size: int | None = None) -> Tensor:
        """n masks per image (b, c, h, w) as probabilities (b, n, h, w); a mask is where they are >= 0.5.

        steps, solver: the objective's, 25 Euler steps, unless given.
        One pass of GTR, then the net takes the b * n states in equal parts of at most `batch_size` (default:
        `states_at_once`), which bounds memory and changes results by rounding only.
        Raises ValueError for an unknown solver, no steps or no samples.
        """
        steps = self.steps if steps is None else steps
        solver = solver or self.objective.solver
        if solver not in SOLVERS or min(steps, n, 1 if batch_size is None else batch_size) < 1:
            raise ValueError(f"solver={solver!r}, steps={steps}, n={n}, batch_size={batch_size}: expected "
                             f"one of {', '.join(SOLVERS)}, and the numbers to be at least 1")
        conditions = self.condition(image).repeat_interleave(n, dim=0)  # (b * n, image_channels, h, w)
        x_0 = self.sample_source(image, n, generator)
        states = x_0.flatten(0, 1)[:, None]
        at_once = batch_size or states_at_once(image)

        def velocity(x: Tensor, t: float) -> Tensor:
            return self.in_chunks(at_once, lambda part, condition: self._velocity(condition)(part, t),
                                 x, conditions)

        # The ODE dx/dt = v(x, t, image) from x_0 at t = 0 to a mask at t = 1 (paper: 25 Euler steps).
        x_1 = SOLVERS[solver].solve(velocity, states, steps)
        # Nothing bounds the velocity, so x_1 is only about in [0, 1].
        return self._probability(x_1.view_as(x_0)).clamp(0, 1)

    def _velocity(self, condition: Tensor) -> Velocity:
        """v(x, t) for one batch of states, with classifier-free guidance if `guidance` is not zero."""
        w = self.objective.guidance

        def velocity(x: Tensor, t: float) -> Tensor:
            times = torch.full((len(x),), t, device=x.device)
            if w == 0:
                return self.v(x, times, condition)
            # v without an image is v of zeros, which stood for dropped images in training. Both velocities
            # take one call, on a batch of twice the size.
            both = torch.cat([condition, torch.zeros_like(condition)])
            conditional, null = self.v(x.repeat(2, 1, 1, 1), times.repeat(2), both).chunk(2)
            # Away from the velocity without the image (CFM, arXiv 2507.22418).
            return (1 + w) * conditional - w * null

        return velocity

    def v(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The velocity by the net, in float32; the net runs under autocast if `amp`."""
        states = self._for_one_graph(x_t, t, condition) if self.compiled else (x_t, t, condition)
        # Only v comes from bfloat16. The state that a solver adds it to stays in float32: in the 8 bits of
        # bfloat16, small steps would be lost. Where one state went in twice, the second v is cut off.
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.amp):
            return self.net(*states).float()[:len(x_t)]

    def _for_one_graph(self, *states: Tensor) -> list[Tensor]:
        """The same states (m, ...), so that torch.compile needs one graph only.

        It takes any number m > 1 in one graph, but makes another for a single state, which would cost minutes
        at an epoch's last batch. So a single state goes in twice where there were several before."""
        m = len(states[0])
        self.had_several |= m > 1
        if not self.had_several:
            return list(states)
        # Copies, because for a view of another tensor torch.compile makes another graph, too.
        copies = [torch.cat([state, state]) if m == 1 else state.clone(memory_format=torch.contiguous_format)
                  for state in states]
        for state in copies:
            torch._dynamo.maybe_mark_dynamic(state, 0)
        return copies

    def _drop_condition(self, condition: Tensor) -> Tensor:
        """Replaces whole images by zeros, each with probability `condition_dropout`."""
        if self.objective.condition_dropout == 0:
            return condition
        # In this way the net also learns v(zeros), which guidance needs.
        kept = torch.rand(len(condition), 1, 1, 1, device=condition.device)
        return condition * (kept >= self.objective.condition_dropout)

    def _signed(self, mask: Tensor) -> Tensor:
        return 2 * mask - 1 if self.objective.signed else mask

    def _probability(self, x: Tensor) -> Tensor:
        return (x + 1) / 2 if self.objective.signed else x


def grey(image: Tensor) -> Tensor:
    """(b, c, h, w) -> (b, 1, h, w); raises ValueError unless c is 1, or 3, which are taken for RGB."""
    if image.ndim != 4 or image.shape[1] not in (1, 3):
        raise ValueError(f"image of shape {tuple(image.shape)}: expected (b, 1, h, w) or (b, 3, h, w)")
    if image.shape[1] == 1:
        return image
    red, green, blue = (weight * channel for weight, channel in zip(GREY, image.split(1, dim=1)))
    return red + green + blue
