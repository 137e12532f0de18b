"""What a GPU gives: is each system right on it, how long do steps and samples take, and what do they hold?

In under ten minutes; rows that --minutes leave no time for say so.

    right     each system at small size on the CPU and on the device, from the same weights, batch and random
              numbers: its loss, gradient and samples, in float32
    measured  a step of GTR, a step of the flow, and 100 samples of an image at full size, by each choice of
              norm, bfloat16, cudnn.benchmark, torch.compile and channels_last: median seconds and the
              allocator's peak, beside the seconds that tests/benchmarks/plan.py estimates for the default
              choice. Samples are timed over one step of the solver and multiplied by the steps.

Prints JSON lines and tables. Exits with code 1 if a system is wrong.

    python -m tests.benchmarks.gpu
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from models.norm import Norm
from models.processes import device_of, in_bfloat16
from tests.benchmarks import plan
from tests.benchmarks.measure import machine, medians, report

GIB = 2**30
RIGHT = {"loss": 1e-3, "gradient": 1e-2, "masks": 0.02}  # largest relative difference, fraction of pixels
RANDOM = ("rand", "bernoulli", "normal", "uniform", "exponential", "multinomial")
SIDE = 32  # of the images of the first table, pixels


class DrawnOnCPU(TorchDispatchMode):
    """While it is active random numbers are the CPU's on every device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if torch.Tag.nondeterministic_seeded not in func.tags or not name.startswith(RANDOM):
            return func(*args, **kwargs)
        device = kwargs.get("device") or next(value.device for value in args if isinstance(value, Tensor))
        args_on_cpu, kwargs_on_cpu = tree_map(
            lambda value: value.cpu() if isinstance(value, Tensor) else value, (args, kwargs))
        kwargs_on_cpu |= {"device": torch.device("cpu")} if "device" in kwargs else {}
        numbers = func(*args_on_cpu, **kwargs_on_cpu).to(device)
        return args[0].copy_(numbers) if name.endswith("_") else numbers


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
    gradients = [weight.grad.flatten() for weight in system.parameters() if weight.grad is not None]
    return {"loss": sum(losses).detach().cpu(), "gradient": torch.cat(gradients).cpu(), "masks": drawn.cpu()}


def differences(make: Callable[[], GTR | ATFM | Baseline], device: torch.device) -> dict[str, float]:
    """Between the CPU and the device: of loss and gradient relative ones, of masks the fraction of pixels."""
    both = []
    for place in (torch.device("cpu"), device):
        torch.manual_seed(0)
        both.append(results(make(), place))
    expected, result = both
    relative = {name: float((result[name] - expected[name]).norm() / expected[name].norm())
                for name in ("loss", "gradient")}
    return relative | {"masks": float((result["masks"] != expected["masks"]).float().mean())}


def correctness(device: torch.device) -> list[dict[str, Any]]:
    """A row for each system."""
    rows = []
    for name, make in systems():
        with backends(tf32=False):
            errors = differences(make, device)
        right = all(errors[what] <= most for what, most in RIGHT.items())
        rows.append({"system": name, **errors, "right": right})
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
    channels_last: bool = False

    def flow(self, settings: Experiment, device: torch.device) -> ATFM:
        """An untrained flow."""
        atfm = plan.flow_of(settings, self.amp).to(device)
        if self.channels_last:
            atfm.net.to(memory_format=torch.channels_last)
        return atfm

    @contextmanager
    def active(self) -> Iterator[None]:
        """torch's switches and the norm as chosen, while the block runs."""
        splits = Norm.splits if self.split is None else lambda *_: self.split
        with backends(cudnn_benchmark=self.cudnn_benchmark), mock.patch.object(Norm, "splits", splits):
            yield
        if self.compile:
            torch._dynamo.reset()


DEFAULT = Way("bfloat16 (default)", True, split=True)
WAYS = (
    Way("float32, torch's norm", False, split=False), Way("float32", False, split=True),
    Way("bfloat16, torch's norm", True, split=False), DEFAULT,
    Way("bfloat16, cudnn.benchmark", True, split=True, cudnn_benchmark=True),
    # Last, as they take minutes.
    Way("bfloat16, compile", True, compile=True),
    Way("bfloat16, compile, channels_last", True, compile=True, channels_last=True),
)


@contextmanager
def backends(tf32: bool = True, cudnn_benchmark: bool = False) -> Iterator[None]:
    """torch's global switches, while the block runs."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = False, tf32, cudnn_benchmark
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


@dataclass(frozen=True)
class Job:
    """build(): a call to time, `times` of which make what `name` says. planned(): its work and how often."""

    name: str
    build: Callable[[], Callable[[], Any]]
    planned: Callable[[], tuple[plan.Work, float]]
    times: int = 1


def jobs(settings: Experiment, way: Way, n: int, device: torch.device) -> Iterator[Job]:
    """What is timed of a data set by a way; a step of GTR, which has none of the choices, by the first."""
    def gtr_step() -> Callable[[], None]:
        gtr = plan.gtr_of(settings).to(device)

        def losses(image: Tensor, masks: Tensor) -> list[Tensor]:
            logits = gtr(image).rsample(settings.gtr.mc_samples, antithetic=True)
            return [monte_carlo_nll(logits, one_expert(masks))]
        return training_step(gtr, losses, settings, settings.gtr.batchsize, device)

    def flow_step() -> Callable[[], None]:
        atfm = way.flow(settings, device)
        if way.compile:
            atfm.compile_net()
        return training_step(atfm.net, lambda *batch: (piece["loss"] for piece in atfm.losses(*batch)),
                             settings, settings.flow.batch_size, device)

    def samples() -> Callable[[], Tensor]:
        sampler = way.flow(settings, device).for_sampling(way.amp, way.channels_last, way.compile)
        image, _ = plan.batch(settings, 1)
        return lambda: sampler.sample(image.to(device), n, 1, "euler")

    steps = settings.flow.steps
    if way == WAYS[0]:
        yield Job("GTR step", gtr_step, lambda: (plan.gtr_step(settings), 1))
    yield Job("flow step", flow_step,
              lambda: (plan.flow_pass(settings, True), plan.passes_per_step(settings)))
    yield Job(f"{n} samples, {steps} steps", samples,
              lambda: (plan.evaluation(settings, True), steps * n / plan.AT_ONCE), steps)


def training_step(model: torch.nn.Module, losses: Callable[[Tensor, Tensor], Iterable[Tensor]],
                  settings: Experiment, b: int, device: torch.device) -> Callable[[], None]:
    """A step of b images: losses(image, masks) yields pieces of the loss."""
    image, masks = (values.to(device) for values in plan.batch(settings, b))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        for loss in losses(image, masks.round()):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


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
    """A row for each data set, way and job."""
    rows = []
    for way in WAYS:
        for what in whats:
            for job in jobs(experiment(what), way, n, device):
                of_gtr = job.name == "GTR step"
                row = {"what": what, "work": job.name, "way": "-" if of_gtr else way.name}
                if time.monotonic() > until:
                    rows.append(row | {"s": "not run: no time left", "peak GiB": None})
                    continue
                with way.active():
                    row |= measured(job.build, repeats, device)
                if isinstance(row["s"], float):
                    row["s"] *= job.times
                if device.type == "cuda" and (of_gtr or way == DEFAULT):
                    row["estimated s"] = estimate(*job.planned(), device)
                rows.append(row)
    return sorted(rows, key=lambda row: (whats.index(row["what"]), row["work"]))


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
