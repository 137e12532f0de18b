"""Hours of each stage at its default settings on a GPU, estimated by a roofline from counted operations.

A step of training, and an evaluation of the network in sampling, run here as they are written, on tensors
without data, with what is done on CUDA: bfloat16 (--amp auto), else TF32, the norm over a whole GPU. Of each
operation are counted its floating-point operations, if it is a product or a convolution, and the bytes of
what it reads and writes. It then takes the longer of FLOP / (fraction x peak) and bytes / (fraction x
bandwidth), but no step is faster than the host launches its operations. The peaks are the vendors', dense;
the two fractions and the time of a launch are assumptions: no number here was measured, but for the authors'
in the last row. Left out: loading, scoring, pictures, GTR's pass in sampling.

    python -m tests.benchmarks.plan
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from metadata_manager import Experiment
from models import ATFM, GTR, STNet, energy_score, monte_carlo_nll
from models.flags import experiment
from models.flow import one_expert
from models.norm import Norm
from tests.benchmarks.measure import report

# Images to train on and to test on: 64 % and 20 % of 15,096 slices; of 2,000 lesions, a guess at ISIC3's.
IMAGES = {"LIDC": (9661, 3019), "isic3_style_concat": (1280, 400)}
AT_ONCE = 50  # states in sampling: 100 samples in two parts
AUTHORS_SECONDS = 113.0  # the paper's, GTR and 25 steps, 100 samples of a LIDC image on an RTX 3090
# Operations that compute nothing.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}


@dataclass(frozen=True)
class GPU:
    """Peaks of dense products in FLOP/s by the type of their factors, and of memory in bytes/s."""

    tf32: float
    bfloat16: float
    bandwidth: float


GPUS = {"RTX 3090": GPU(35.6e12, 71e12, 936e9), "A100 80 GB": GPU(156e12, 312e12, 2039e9),
        "H100 SXM": GPU(495e12, 989e12, 3350e9), "H200": GPU(495e12, 989e12, 4800e9)}


@dataclass(frozen=True)
class Assumed:
    """What a roofline leaves open: fractions of the two peaks, seconds of the host per operation."""

    products: float = 0.5
    bandwidth: float = 0.8
    launch: float = 8e-6


@dataclass
class Work:
    """Operations: (FLOP, bytes, whether in bfloat16) of each."""

    operations: list[tuple[float, float, bool]]

    @property
    def flop(self) -> float:
        return sum(flop for flop, _, _ in self.operations)

    def seconds(self, gpu: GPU, assumed: Assumed) -> float:
        """On a GPU, estimated."""
        device = sum(max(flop / (assumed.products * (gpu.bfloat16 if bfloat16 else gpu.tf32)),
                         size / (assumed.bandwidth * gpu.bandwidth))
                     for flop, size, bfloat16 in self.operations)
        return max(device, assumed.launch * len(self.operations))


class Count(TorchDispatchMode):
    """Counts, while it is active, the work of all operations but views."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work([])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_view = any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns)
        if is_view or func.namespace != "aten" or func.overloadpacket.__name__ in FREE:
            return result
        # A tensor that an operation takes twice, or changes in place, is moved once.
        tensors = {id(leaf): leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)}
        flop_of = flop_registry.get(func.overloadpacket)
        flop = flop_of(*args, **(kwargs or {}), out_val=result) if flop_of else 0
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        bfloat16 = any(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
        self.work.operations.append((flop, size, bfloat16))
        return result


def counted(build: Callable[[], Callable[[], Any]]) -> Work:
    """The work of what build() gives: its call, on tensors without data."""
    with mock.patch.object(Norm, "splits", return_value=True), FakeTensorMode():
        call = build()
        with Count() as count:
            call()
    return count.work


def batch(settings: Experiment, b: int) -> tuple[Tensor, Tensor]:
    """Images (b, c, h, w) and soft masks (b, k, h, w)."""
    data = settings.metadata
    return (torch.rand(b, data.channels, data.side, data.side),
            torch.rand(b, data.annotators, data.side, data.side))


def gtr_of(settings: Experiment) -> GTR:
    return GTR.of(settings.gtr, settings.metadata.channels)


def flow_of(settings: Experiment, amp: bool) -> ATFM:
    flow = settings.flow
    return ATFM(gtr_of(settings) if flow.source == "gtr" else None,
                STNet.of(flow, settings.metadata.flow_channels), flow, amp=amp,
                annotators_per_pass=flow.annotators_per_pass, images_per_pass=flow.images_per_pass)


def gtr_step(settings: Experiment) -> Work:
    """A step of GTR, without the optimizer."""
    def build() -> Callable[[], None]:
        gtr, (image, masks) = gtr_of(settings), batch(settings, settings.gtr.batchsize)

        def step() -> None:
            if settings.gtr.loss == "energy":
                loss = energy_score(gtr(image).rsample(settings.gtr.mc_samples).sigmoid(), masks)
            else:
                logits = gtr(image).rsample(settings.gtr.mc_samples, antithetic=True)
                loss = monte_carlo_nll(logits, one_expert(masks))
            loss.backward()
        return step
    return counted(build)


def passes_per_step(settings: Experiment) -> int:
    """Forward and backward passes of the flow in one step, all of the same size but for rests."""
    flow = settings.flow
    paths = 1 if flow.experts == "one" else settings.metadata.annotators
    return math.ceil(paths / flow.annotators_per_pass) * math.ceil(flow.batch_size / (
        flow.images_per_pass or flow.batch_size))


def flow_pass(settings: Experiment, amp: bool) -> Work:
    """One of the passes of a step of the flow, without the optimizer."""
    def build() -> Callable[[], None]:
        atfm, inputs = flow_of(settings, amp), batch(settings, settings.flow.batch_size)
        return lambda: next(atfm.losses(*inputs))["loss"].backward()
    return counted(build)


def evaluation(settings: Experiment, amp: bool) -> Work:
    """One evaluation of the flow's network for AT_ONCE states, as in sampling."""
    def build() -> Callable[[], Tensor]:
        # As `STNet.with_fixed_weights` does, whose copy tensors without data do not bear.
        fixed = replace(settings.flow, weight_standardization="none")
        atfm, (image, _) = flow_of(replace(settings, flow=fixed), amp), batch(settings, AT_ONCE)
        condition, x = atfm.condition(image), torch.rand(AT_ONCE, 1, *image.shape[2:])
        return torch.no_grad()(lambda: atfm.v(x, torch.rand(AT_ONCE), condition))
    return counted(build)


def update(model: torch.nn.Module, averaged: bool) -> Work:
    """Adam: weights, gradients and two moments are read, three written; an average is read and written."""
    weights = sum(weight.numel() for weight in model.parameters())
    return Work([(0.0, weights * 4 * (7 + 3 * averaged), False)])


@dataclass(frozen=True)
class Stage:
    """Pieces of work and how often each is done."""

    name: str
    parts: tuple[tuple[Work, float], ...]

    @property
    def flop(self) -> float:
        return sum(work.flop * times for work, times in self.parts)

    def hours(self, gpu: GPU, assumed: Assumed) -> float:
        return sum(work.seconds(gpu, assumed) * times for work, times in self.parts) / 3600


def stages(settings: Experiment, train: int, test: int) -> list[Stage]:
    """Both steps, with the flow's validations, and the test, of so many images."""
    flow, loop, asked = settings.flow, settings.loop, settings.evaluation
    gtr_steps = math.ceil(train / settings.gtr.batchsize) * settings.gtr.epochs
    steps = math.ceil(train / flow.batch_size) * flow.num_epochs
    with torch.device("meta"):
        gtr, atfm = gtr_of(settings), flow_of(settings, amp=False)
    amp = flow.amp != "False"
    network, nfe = evaluation(settings, amp), atfm.nfe(flow.steps, flow.solver)
    validations = math.ceil(flow.num_epochs / loop.validate_every)
    in_validation = (validations * loop.val_images * loop.val_samples * loop.val_steps) * atfm.nfe(1, "euler")
    in_test = test * len(asked.seeds) * max(asked.samples) * nfe
    return [
        Stage("GTR", ((gtr_step(settings), gtr_steps), (update(gtr, settings.gtr.ema > 0), gtr_steps))),
        Stage("flow", ((flow_pass(settings, amp), steps * passes_per_step(settings)),
                       (update(atfm.net, flow.ema > 0), steps), (network, in_validation / AT_ONCE))),
        Stage(f"test, {nfe} NFE", ((network, in_test / AT_ONCE),)),
    ]


def authors_row(assumed: Assumed) -> dict[str, Any]:
    """The paper's 100 samples of one image, beside estimates in each precision."""
    settings = experiment("LIDC", "released")
    times = settings.flow.steps * 100 / AT_ONCE
    estimates = {f"{name}, s (estimated)":
                 times * evaluation(settings, amp).seconds(GPUS["RTX 3090"], assumed)
                 for name, amp in (("TF32", False), ("bfloat16", True))}
    return {"100 samples of one LIDC image on an RTX 3090": "25 steps", **estimates,
            "authors, s (measured, precision unknown)": AUTHORS_SECONDS}


def main(flags: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, why in (("products", "fraction of the peak of products"),
                      ("bandwidth", "fraction of the memory's peak"),
                      ("launch", "seconds of the host per operation")):
        parser.add_argument(f"--{name}", type=float, default=getattr(Assumed, name), help=why)
    parser.add_argument("--what", nargs="+", default=list(IMAGES), help="data sets, of metadata_manager")
    asked = parser.parse_args(flags)
    assumed = Assumed(asked.products, asked.bandwidth, asked.launch)
    rows = []
    for what in asked.what:
        for preset, method in (("paper", "atfm"), ("best", "atfm"), ("paper", "cfm")):
            for stage in stages(experiment(what, preset, method), *IMAGES.get(what, (100, 20))):
                if stage.name == "GTR" and method != "atfm":  # it has none
                    continue
                rows.append({"what": what, "preset": preset, "method": method, "stage": stage.name,
                             "FLOP": f"{stage.flop:.1e}",
                             **{f"{name}, h (estimated)": round(stage.hours(gpu, assumed), 1)
                                for name, gpu in GPUS.items()}})
    report(rows, **vars(assumed))
    report([authors_row(assumed)], **vars(assumed))


if __name__ == "__main__":
    main()
