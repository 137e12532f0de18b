"""Time of drawing n masks of one image: `ATFM.sample` against a straightforward sampler, on embedded data.

Straightforward: one sample after another, float32, weights standardized at every evaluation of ST-Net. Ours:
`ATFM.for_sampling().sample`, many states at once, weights standardized once. From the same x_0 both must give
masks that agree on 99.9 % of the pixels, with GED within 0.001. Rows in bfloat16, or of solvers with fewer
network evaluations (NFE), state how far theirs agree; that tells about a trained flow only (--gtr, --prior;
default: random weights). A second table has the time against n, steps, size and dim. Ten minutes on a CPU
core, less with --n 4:

    python -m tests.benchmarks.benchmark_sampling
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import data
from metrics import ged
from models import ATFM, GTR, STNet, checkpoint, load_flow, load_gtr
from models.flags import experiment
from models.flow import SOLVERS
from tests.benchmarks import straightforward
from tests.benchmarks.measure import exponent, machine, medians, report

SEED = 0
BASELINE = "straightforward"
FEWER = (("euler", 10), ("ab2", 10), ("midpoint", 5))  # at most half the paper's 25 NFE
GROWING = {"n": 4, "steps": 4, "size": 32, "dim": 16}  # of the second table, each up to four times that


@dataclass(frozen=True)
class Way:
    """A sampler of one image, its NFE per sample, whether it must repeat the baseline."""

    sample: Callable[[], Tensor]  # probabilities (1, n, h, w)
    nfe: int
    exact: bool = False


def ours(atfm: ATFM, image: Tensor, n: int, steps: int, solver: str = "euler", amp: bool = False,
         batch_size: int | None = None) -> Callable[[], Tensor]:
    """`ATFM.sample` on an image (1, c, h, w), all n states at once unless told otherwise."""
    sampler = atfm.for_sampling(amp)
    return lambda: sampler.sample(image, n, steps, solver, torch.Generator(image.device).manual_seed(SEED),
                                  batch_size or n)


def ways(atfm: ATFM, image: Tensor, n: int, steps: int) -> dict[str, Way]:
    """All samplers to compare."""
    def one_by_one() -> Tensor:
        generator = torch.Generator(image.device).manual_seed(SEED)
        return straightforward.sample(atfm, image, n, steps, generator)

    return {
        BASELINE: Way(one_by_one, steps, exact=True),
        "ours": Way(ours(atfm, image, n, steps), steps, exact=True),
        "ours, 8 states at a time": Way(ours(atfm, image, n, steps, batch_size=8), steps, exact=True),
        "ours, bfloat16": Way(ours(atfm, image, n, steps, amp=True), steps),
        **{f"ours, {solver}, {few} steps": Way(ours(atfm, image, n, few, solver), few * SOLVERS[solver].nfe)
           for solver, few in FEWER},
    }


def compared(samplers: dict[str, Way], masks: Tensor, repeats: int, device: torch.device) -> Iterator[dict]:
    """A row per way; raises SystemExit if an exact one differs."""
    drawn = {name: way.sample() >= 0.5 for name, way in samplers.items()}
    times = medians({name: way.sample for name, way in samplers.items()}, repeats, device, warm_up=False)
    expected = ged(drawn[BASELINE], masks)
    for name, way in samplers.items():
        agreement = float((drawn[name] == drawn[BASELINE]).float().mean())
        difference = float(ged(drawn[name], masks) - expected)
        if way.exact and (agreement < 0.999 or abs(difference) > 0.001):
            raise SystemExit(f"{name}: masks agree on {agreement:.3%} of pixels, GED {difference:+.2g} off")
        yield {"way": name, "NFE": way.nfe, "s": times[name], "times faster": times[BASELINE] / times[name],
               "masks agree": f"{agreement:.2%}", "GED differs": f"{difference:+.4f}"}


def growth(name: str, image: Tensor, repeats: int, device: torch.device) -> dict:
    """A row of the second table: time as one number grows fourfold and the others stay."""
    sizes = [GROWING[name] * factor for factor in (1, 2, 3, 4)]
    calls = {str(size): untrained(image, **(GROWING | {name: size})) for size in sizes}
    times = medians(calls, repeats, device)
    fixed = ", ".join(f"{other} {value}" for other, value in GROWING.items() if other != name)
    return {"grows": name, "fixed": fixed, "sizes": " ".join(times),
            "ms": " ".join(f"{1e3 * time:.0f}" for time in times.values()),
            "time ~ size ^": exponent(sizes, list(times.values()))}


def untrained(image: Tensor, n: int, steps: int, size: int, dim: int) -> Callable[[], Tensor]:
    """`ATFM.sample` of an untrained flow."""
    return ours(random_flow(image.shape[1], dim).to(image.device), resized(image, size), n, steps)


def random_flow(channels: int, dim: int) -> ATFM:
    """An untrained flow."""
    torch.manual_seed(SEED)
    return ATFM(GTR(channels), STNet(dim)).eval()


def resized(pixels: Tensor, size: int) -> Tensor:
    """(b, c, h, w) -> (b, c, size, size), nearest."""
    return F.interpolate(pixels, size=(size, size))


def main(flags: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", default="LIDC_demo", help="a dataset, for one image and its masks")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gtr", help="run folder or checkpoint of a trained GTR")
    parser.add_argument("--prior", help="run folder or checkpoint of a flow trained over it")
    parser.add_argument("--n", type=int, default=16, help="samples")
    parser.add_argument("--steps", type=int, default=25, help="Euler steps (paper: 25)")
    parser.add_argument("--size", type=int, default=64, help="image size, pixels per side")
    parser.add_argument("--dim", type=int, default=32, help="width of an untrained ST-Net")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls per median")
    asked = parser.parse_args(flags)
    torch.set_num_threads(1)
    device = torch.device(asked.device)

    metadata = experiment(asked.what).metadata
    metadata = replace(metadata, crop=min(asked.size, metadata.size))  # larger images are stretched
    image, masks = data.load(metadata, "test").batch([0], device)
    image, masks = resized(image, asked.size), resized(masks, asked.size) >= 0.5
    atfm = random_flow(metadata.channels, asked.dim)
    if asked.prior is not None:
        gtr = load_gtr(checkpoint.find(asked.gtr, "GTR"), metadata, same_size=False)
        path = checkpoint.find(asked.prior, "atfm")
        atfm = load_flow(path, "atfm", lambda: gtr, metadata, same_size=False)
    atfm = atfm.to(device)
    rows = compared(ways(atfm, image, asked.n, asked.steps), masks, asked.repeats, device)
    common = {"weights": asked.prior or "random", "repeats": asked.repeats, **machine(device)}
    report(list(rows), n=asked.n, size=asked.size, dim=atfm.net.dim, **common)
    report([growth(name, image, asked.repeats, device) for name in GROWING], **common)


if __name__ == "__main__":
    main()
