"""What a GPU gives: is each system right on it, how long do steps and samples take, and what do they hold?

For the day that there is a card, in under ten minutes on one; rows that --minutes leave no time for say so.

    right     each system at small size on the CPU and on the device, from the same weights, batch and draws:
              its loss, gradient and samples, in float32
    measured  a step of GTR, a step of the flow, and 100 samples of an image at full size, by each choice of
              norm, bfloat16, cudnn.benchmark and torch.compile: median seconds and the
              allocator's peak, beside the seconds that tests/benchmarks/plan.py estimates for the default
              choice. Samples are timed over one step of the solver and multiplied by the steps.

Prints JSON lines and the tables for docs/performance.md. Exits with code 1 if a system is wrong.

    python -m tests.benchmarks.gpu
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from metadata_manager import BASELINES, FLOWS, Experiment, FlowConfig
from metrics.program import CANNOT_COMPILE, out_of_gpu_memory
from models import ATFM, GTR, STNet, baseline, energy_score, monte_carlo_nll
from models.baselines import Baseline
from models.flags import experiment
from models.flow import one_expert
from models.processes import device_of, in_bfloat16
from models.st_net import Norm
from tests.benchmarks import plan
from tests.benchmarks.measure import machine, medians, report

GIB = 2**30
RIGHT = {"loss": 1e-3, "gradient": 1e-2, "masks": 0.02}  # largest relative difference, and share of pixels
DRAWS = ("rand", "bernoulli", "normal", "uniform", "exponential", "multinomial")
SIDE = 32  # of the images of the first table


class DrawnOnCPU(TorchDispatchMode):
    """While it is active random numbers are the CPU's on every device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if torch.Tag.nondeterministic_seeded not in func.tags or not name.startswith(DRAWS):
            return func(*args, **kwargs)
        device = kwargs.get("device") or next(one.device for one in args if isinstance(one, Tensor))
        on_cpu, settings = tree_map(lambda one: one.cpu() if isinstance(one, Tensor) else one, (args, kwargs))
        settings |= {"device": torch.device("cpu")} if "device" in kwargs else {}
        drawn = func(*on_cpu, **settings).to(device)
        return args[0].copy_(drawn) if name.endswith("_") else drawn


# Is it right?

def systems() -> Iterator[tuple[str, Callable[[], GTR | ATFM | Baseline]]]:
    """Each system, untrained and small, for images of three channels."""
    yield "gtr", lambda: GTR(3, (4, 8), rank=2)
    for method in FLOWS:
        flow = experiment("isic3_style_concat", "paper", method).flow
        flow = replace(flow, dim=8, dim_mults=(1, 2), images_per_pass=None)
        yield method, lambda flow=flow: ATFM(GTR(3, (4, 8), rank=2), STNet.of(flow), flow)
    for method in BASELINES:
        widths = (1,) * 4 if method == "phiseg" else (1, 2)
        config = replace(FlowConfig(), method=method, dim=8, dim_mults=widths, experts="one")
        yield method, lambda method=method, config=config: baseline(method, 3, config)


def results(system: GTR | ATFM | Baseline, device: torch.device) -> dict[str, Tensor]:
    """Loss, gradient and binary samples of a small batch, on the CPU."""
    random = torch.Generator().manual_seed(1)
    image = torch.rand(2, 3, SIDE, SIDE, generator=random).to(device)
    masks = (torch.rand(2, 3, SIDE, SIDE, generator=random) < 0.4).float().to(device)
    system = system.to(device)
    with DrawnOnCPU():
        torch.manual_seed(2)
        if isinstance(system, GTR):
            samples = system(image).rsample(4)
            losses = [monte_carlo_nll(samples, masks) / SIDE**2 + energy_score(samples.sigmoid(), masks)]
        else:
            style = (torch.tensor([[0, 1, 2]] * 2, device=device),) if system.needs_style else ()
            losses = [piece["loss"] for piece in system.losses(image, masks, *style)]
        sum(losses).backward()
        torch.manual_seed(3)
        steps = {"steps": 2} if getattr(system, "steps", None) else {}
        at_once = {} if isinstance(system, GTR) else {"batch_size": 8}
        drawn = system.eval().sample(image, 4, **steps, **at_once) >= 0.5
    gradients = [one.grad.flatten() for one in system.parameters() if one.grad is not None]
    found = {"loss": sum(losses).detach(), "gradient": torch.cat(gradients), "masks": drawn}
    return {name: value.cpu() for name, value in found.items()}


def differences(make: Callable[[], GTR | ATFM | Baseline], device: torch.device) -> dict[str, float]:
    """Between the CPU and the device: of loss and gradient relative ones, of masks the share of pixels."""
    both = []
    for where in (torch.device("cpu"), device):
        torch.manual_seed(0)
        both.append(results(make(), where))
    ours, theirs = both
    found = {name: float((theirs[name] - ours[name]).norm() / ours[name].norm())
             for name in ("loss", "gradient")}
    return found | {"masks": float((theirs["masks"] != ours["masks"]).float().mean())}


def correctness(device: torch.device) -> list[dict[str, Any]]:
    """A row for each system."""
    with settings(tf32=False):
        rows = []
        for name, make in systems():
            found = differences(make, device)
            right = all(found[what] <= most for what, most in RIGHT.items())
            rows.append({"system": name, **found, "right": right})
        return rows


# How long does it take, and how much does it hold?

@dataclass(frozen=True)
class Way:
    """A choice of what is fast. split: the norm over a whole GPU; None: as ST-Net decides."""

    name: str
    amp: bool
    split: bool | None = None
    cudnn_benchmark: bool = False
    compile: bool = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        patch = mock.patch.object(Norm, "splits", return_value=self.split) if self.split is not None else (
            mock.patch.object(Norm, "splits", Norm.splits))
        with settings(cudnn_benchmark=self.cudnn_benchmark), patch:
            yield
        if self.compile:
            torch._dynamo.reset()


WAYS = (
    Way("float32, torch's norm", False, split=False), Way("float32", False, split=True),
    Way("bfloat16, torch's norm", True, split=False), Way("bfloat16 (default)", True, split=True),
    Way("bfloat16, cudnn.benchmark", True, split=True, cudnn_benchmark=True),
    Way("bfloat16, compile", True, compile=True),
)
DEFAULT = "bfloat16 (default)"


@contextmanager
def settings(tf32: bool = True, cudnn_benchmark: bool = False) -> Iterator[None]:
    """torch's global switches, while the block runs."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = False, tf32, cudnn_benchmark
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def gtr_step(ours: Experiment, device: torch.device) -> Callable[[], None]:
    """A step of GTR at a data set's sizes."""
    gtr = GTR.of(ours.gtr, ours.metadata.channels).to(device)
    image, masks = (one.to(device) for one in plan.batch(ours, ours.gtr.batchsize))
    optimizer = torch.optim.AdamW(gtr.parameters(), lr=1e-4)

    def step() -> None:
        logits = gtr(image).rsample(ours.gtr.mc_samples, antithetic=True)
        monte_carlo_nll(logits, one_expert(masks.round())).backward()
        update(optimizer)
    return step


def flow_step(ours: Experiment, way: Way, device: torch.device) -> Callable[[], None]:
    """A step of the flow."""
    atfm = flow(ours, way, device)
    image, masks = (one.to(device) for one in plan.batch(ours, ours.flow.batch_size))
    optimizer = torch.optim.AdamW(atfm.net.parameters(), lr=1e-4)

    def step() -> None:
        for piece in atfm.losses(image, masks.round()):
            piece["loss"].backward()
        update(optimizer)
    return step


def samples(ours: Experiment, way: Way, n: int, device: torch.device) -> Callable[[], Tensor]:
    """n samples of an image by one step of Euler's."""
    atfm = flow(ours, replace(way, compile=False), device)
    atfm = atfm.for_sampling(way.amp, way.compile)
    image, _ = plan.batch(ours, 1)
    return lambda: atfm.sample(image.to(device), n, 1, "euler")


def flow(ours: Experiment, way: Way, device: torch.device) -> ATFM:
    atfm = plan.flow_of(ours, way.amp).to(device)
    if way.compile:
        atfm.net.compile()
    return atfm


def update(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measured(build: Callable[[], Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, Any]:
    """Median seconds of a call, and the allocator's peak, or why there are none."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()  # what the last row held is free by now
    try:
        call = build()
        call()  # makes Adam's moments, compiles, chooses algorithms
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        seconds = medians({"call": call}, repeats, device, warm_up=False)["call"]
        return {"s": seconds, "peak GiB": torch.cuda.max_memory_allocated(device) / GIB if on_gpu else None}
    except RuntimeError as error:
        if out_of_gpu_memory(error):
            return {"s": "out of memory", "peak GiB": None}
        if CANNOT_COMPILE.search(str(error)):
            return {"s": "not run: no compiler", "peak GiB": None}
        raise


def estimate(work: plan.Work, times: float, device: torch.device) -> float | None:
    """Seconds by the plan's roofline on this card; None if it has no such card."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    gpu = next((gpu for known, gpu in plan.GPUS.items()
                if known.removeprefix("RTX ").split()[0] in name), None)
    return None if gpu is None else work.seconds(gpu, plan.Assumed()) * times


def timings(whats: Sequence[str], n: int, repeats: int, device: torch.device, until: float
            ) -> list[dict[str, Any]]:
    """A row for each data set, kind of work and way; what compiles comes last, as it takes minutes."""
    rows = []
    for way in sorted(WAYS, key=lambda way: way.compile):
        for what in whats:
            ours = experiment(what)
            steps = ours.flow.steps
            kinds: dict[str, tuple[Callable[[], Callable[[], Any]], int]] = {
                "flow step": (partial(flow_step, ours, way, device), 1),
                f"{n} samples, {steps} steps": (partial(samples, ours, way, n, device), steps)}
            if way == WAYS[0]:  # GTR has none of the choices
                kinds = {"GTR step": (partial(gtr_step, ours, device), 1)} | kinds
            for kind, (build, times) in kinds.items():
                name = "-" if kind == "GTR step" else way.name
                row: dict[str, Any] = {"what": what, "work": kind, "way": name}
                if time.monotonic() > until:
                    rows.append(row | {"s": "not run: no time left", "peak GiB": None})
                    continue
                with way():
                    found = measured(build, repeats, device)
                if isinstance(found["s"], float):
                    found["s"] *= times
                rows.append(row | found | {"estimated s": estimated(ours, kind, way, n, device)})
    return sorted(rows, key=lambda row: (list(whats).index(row["what"]), row["work"]))


def estimated(ours: Experiment, kind: str, way: Way, n: int, device: torch.device) -> float | None:
    """The plan's seconds for GTR's step, and for the default way of the others."""
    if device.type != "cuda":
        return None
    if kind == "GTR step":
        return estimate(plan.gtr_step(ours), 1, device)
    if way.name != DEFAULT:
        return None
    if kind == "flow step":
        return estimate(plan.flow_pass(ours, True), plan.passes_per_step(ours), device)
    return estimate(plan.evaluation(ours, True), ours.flow.steps * n / plan.AT_ONCE, device)


def main(flags: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--what", nargs="+", default=list(plan.IMAGES), help="data sets, for their sizes")
    parser.add_argument("--samples", type=int, default=100, help="of an image")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=8, help="after which no other row is begun")
    asked = parser.parse_args(flags)
    until = time.monotonic() + 60 * asked.minutes
    device = device_of(asked.device)
    about = machine(device) | {"bfloat16": in_bfloat16("auto", device)}
    right = correctness(device)
    report(right, **about)
    report(timings(asked.what, asked.samples, asked.repeats, device, until), **about)
    wrong = [row["system"] for row in right if not row["right"]]
    if wrong:
        sys.exit(f"{device}: {', '.join(wrong)} differ from the CPU by more than {RIGHT}")


if __name__ == "__main__":
    main()
