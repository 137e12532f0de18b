"""Hours of each stage at its default settings on a GPU, estimated by a roofline from counted operations.

A step of training, and an evaluation of the network in sampling, run here as they are written, on tensors
without data, with what is done on CUDA: --amp auto, the norm over a whole GPU. Of each operation are counted
its floating-point operations, if it is a product or a convolution, and the bytes of what it reads and writes.
It then takes the longer of FLOP / (share x peak) and bytes / (share x bandwidth), but no step is faster than
the host launches its operations. The peaks are the vendors', dense; the two shares and the time of a launch
are assumptions: no number here was measured, but for the authors' in the last row. Left out: loading,
scoring, pictures, GTR's pass in sampling.

    python -m tests.benchmarks.plan
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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
from models.st_net import Norm
from tests.benchmarks.measure import report

# Images to train on and to test on: 64 % and 20 % of 15,096 slices; of 2,000 lesions, a guess at ISIC3's.
IMAGES = {"LIDC": (9661, 3019), "isic3_style_concat": (1280, 400)}
AT_ONCE = 50  # states in sampling: 100 samples in two parts
AUTHORS = {"what": "LIDC", "gpu": "RTX 3090", "samples": 100, "seconds": 113.0}  # paper, GTR and 25 steps
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}


@dataclass(frozen=True)
class GPU:
    """Peaks of dense products in FLOP/s by the type of their factors, and of memory in bytes/s."""

    float32: float
    tf32: float
    bfloat16: float
    bandwidth: float


GPUS = {"RTX 3090": GPU(35.6e12, 35.6e12, 71e12, 936e9), "A100 80 GB": GPU(19.5e12, 156e12, 312e12, 2039e9),
        "H100 SXM": GPU(67e12, 495e12, 989e12, 3350e9), "H200": GPU(67e12, 495e12, 989e12, 4800e9)}


@dataclass(frozen=True)
class Assumed:
    """What a roofline leaves open: shares of the two peaks, seconds of the host per operation, --tf32."""

    products: float = 0.5
    bandwidth: float = 0.8
    launch: float = 8e-6
    tf32: bool = True


@dataclass
class Work:
    """Operations: (FLOP, bytes, whether in bfloat16) of each."""

    operations: list[tuple[float, float, bool]] = field(default_factory=list)

    @property
    def flop(self) -> float:
        return sum(flop for flop, _, _ in self.operations)

    @property
    def bytes(self) -> float:
        return sum(size for _, size, _ in self.operations)

    def seconds(self, gpu: GPU, assumed: Assumed) -> float:
        """On a GPU, estimated."""
        float32 = gpu.tf32 if assumed.tf32 else gpu.float32
        device = sum(max(flop / (assumed.products * (gpu.bfloat16 if half else float32)),
                         size / (assumed.bandwidth * gpu.bandwidth)) for flop, size, half in self.operations)
        return max(device, assumed.launch * len(self.operations))


class Count(TorchDispatchMode):
    """Counts, while it is active, the work of all operations but views."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_view = any(one.alias_info and not one.alias_info.is_write for one in func._schema.returns)
        if is_view or func.namespace != "aten" or func.overloadpacket.__name__ in FREE:
            return result
        tensors = [one for one in tree_leaves((args, kwargs, result)) if isinstance(one, Tensor)]
        of = flop_registry.get(func.overloadpacket)
        flop = of(*args, **(kwargs or {}), out_val=result) if of else 0
        half = any(one.dtype == torch.bfloat16 for one in tensors)
        size = sum(one.numel() * one.element_size() for one in {id(one): one for one in tensors}.values())
        self.work.operations.append((flop, size, half))
        return result


def counted(build: Callable[[], Callable[[], Any]]) -> Work:
    """The work of what build() gives: its call, on tensors without data."""
    with mock.patch.object(Norm, "splits", return_value=True), FakeTensorMode():
        call = build()
        with Count() as count:
            call()
    return count.work


def batch(ours: Experiment, b: int) -> tuple[Tensor, Tensor]:
    """An image (b, c, h, w) and masks (b, k, h, w)."""
    data = ours.metadata
    size = data.side, data.side
    return torch.rand(b, data.channels, *size), torch.rand(b, data.annotators, *size)


def gtr_step(ours: Experiment) -> Work:
    """Of step 1, without the optimizer."""
    def build() -> Callable[[], None]:
        gtr, (image, masks) = GTR.of(ours.gtr, ours.metadata.channels), batch(ours, ours.gtr.batchsize)

        def step() -> None:
            if ours.gtr.loss == "energy":
                loss = energy_score(gtr(image).rsample(ours.gtr.mc_samples).sigmoid(), masks)
            else:
                logits = gtr(image).rsample(ours.gtr.mc_samples, antithetic=True)
                loss = monte_carlo_nll(logits, one_expert(masks))
            loss.backward()
        return step
    return counted(build)


def flow_of(ours: Experiment, amp: bool) -> ATFM:
    gtr = GTR.of(ours.gtr, ours.metadata.channels) if ours.flow.source == "gtr" else None
    flow = ours.flow
    return ATFM(gtr, STNet.of(flow, ours.metadata.flow_channels), flow, amp=amp,
                annotators_per_pass=flow.annotators_per_pass, images_per_pass=flow.images_per_pass)


def passes_per_step(ours: Experiment) -> int:
    """Forward and backward passes of step 2 in one step, all of the same size but for rests."""
    flow = ours.flow
    paths = 1 if flow.experts == "one" else ours.metadata.annotators
    return math.ceil(paths / flow.annotators_per_pass) * math.ceil(flow.batch_size / (
        flow.images_per_pass or flow.batch_size))


def flow_pass(ours: Experiment, amp: bool) -> Work:
    """One of the passes of step 2, without the optimizer."""
    def build() -> Callable[[], None]:
        atfm, inputs = flow_of(ours, amp), batch(ours, ours.flow.batch_size)
        return lambda: next(atfm.losses(*inputs))["loss"].backward()
    return counted(build)


def evaluation(ours: Experiment, amp: bool, states: int = AT_ONCE) -> Work:
    """One evaluation of the flow's network for `states` states, as in sampling."""
    def build() -> Callable[[], Tensor]:
        # As `STNet.with_fixed_weights` does, whose copy tensors without data do not bear.
        atfm = flow_of(replace(ours, flow=replace(ours.flow, weight_standardization="none")), amp)
        image, _ = batch(ours, states)
        condition, x = atfm.condition(image), torch.rand(states, 1, *image.shape[2:])
        return torch.no_grad()(lambda: atfm.v(x, torch.rand(states), condition))
    return counted(build)


def update(parameters: int, averaged: bool) -> Work:
    """Adam: weights, gradients and two moments are read, three written; an average is read and written."""
    return Work([(0.0, parameters * 4 * (7 + 3 * averaged), False)])


def parameters_of(build: Callable[[], torch.nn.Module]) -> int:
    with torch.device("meta"):
        return sum(one.numel() for one in build().parameters())


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


def stages(ours: Experiment, train: int, test: int) -> list[Stage]:
    """Both steps, with the flow's validations, and the test, of so many images; at the settings `ours`."""
    gtr_steps = math.ceil(train / ours.gtr.batchsize) * ours.gtr.epochs
    steps = math.ceil(train / ours.flow.batch_size) * ours.flow.num_epochs
    amp = ours.flow.amp != "False"
    network = evaluation(ours, amp)
    nfe = nfe_of(ours)
    loop, asked = ours.loop, ours.evaluation
    validations = math.ceil(ours.flow.num_epochs / loop.validate_every)
    in_validation = validations * loop.val_images * loop.val_samples * loop.val_steps * nfe(1, "euler")
    in_test = test * len(asked.seeds) * max(asked.samples) * nfe(ours.flow.steps, ours.flow.solver)
    of_gtr = parameters_of(lambda: GTR.of(ours.gtr, ours.metadata.channels))
    of_net = parameters_of(lambda: STNet.of(ours.flow, ours.metadata.flow_channels))
    return [
        Stage("GTR", ((gtr_step(ours), gtr_steps), (update(of_gtr, ours.gtr.ema > 0), gtr_steps))),
        Stage("flow", ((flow_pass(ours, amp), steps * passes_per_step(ours)),
                       (update(of_net, ours.flow.ema > 0), steps), (network, in_validation / AT_ONCE))),
        Stage(f"test, {nfe(ours.flow.steps, ours.flow.solver)} NFE", ((network, in_test / AT_ONCE),)),
    ]


def nfe_of(ours: Experiment) -> Callable[[int, str], int]:
    """NFE per sample by steps and solver."""
    with torch.device("meta"):
        return flow_of(ours, False).nfe


def authors_row(assumed: Assumed) -> dict[str, Any]:
    """The paper's 100 samples of one image, beside estimates in each precision."""
    ours, gpu = experiment(AUTHORS["what"], "released"), GPUS[AUTHORS["gpu"]]
    times = nfe_of(ours)(ours.flow.steps, ours.flow.solver) * AUTHORS["samples"] / AT_ONCE
    ways = {"float32": (False, False), "TF32": (False, True), "bfloat16": (True, True)}
    found = {f"{name}, s (estimated)": times * evaluation(ours, amp).seconds(gpu, replace(assumed, tf32=tf32))
             for name, (amp, tf32) in ways.items()}
    return {"100 samples of one LIDC image on an RTX 3090": "25 steps", **found,
            "authors, s (measured, precision unknown)": AUTHORS["seconds"]}


def main(flags: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, why in (("products", "share of the peak of products"),
                      ("bandwidth", "share of the memory's peak"),
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
                row = {"what": what, "preset": preset, "method": method, "stage": stage.name,
                       "FLOP": f"{stage.flop:.1e}"}
                rows.append(row | {f"{name}, h (estimated)": round(stage.hours(gpu, assumed), 1)
                                   for name, gpu in GPUS.items()})
    report(rows, **vars(assumed))
    report([authors_row(assumed)], **vars(assumed))


if __name__ == "__main__":
    main()
