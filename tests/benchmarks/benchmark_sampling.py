"""Time of drawing n masks of one image: `ATFM.sample` against a straightforward sampler, on embedded data.

Straightforward: one sample after another, float32, weights standardized at every evaluation of ST-Net. Ours:
`ATFM.for_sampling().sample`, many states at once, weights standardized once. From the same x_0 both must give
masks that agree on 99.9 % of the pixels, with GED within 0.001. Rows in bfloat16, or of solvers with fewer
evaluations, state how far theirs agree; that tells about a trained flow only (--gtr, --prior; default: random
weights). "of peak" is the share of what a product of large matrices reaches on the same device in the same
type. A second table has the time against n, steps, size and dim, and that of scoring against the number of
test images. With a GPU also torch.compile. Ten minutes on a CPU core, less with --n 4:

    python -m tests.benchmarks.benchmark_sampling
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import data
from metrics import evaluate, ged
from models import ATFM, GTR, STNet, checkpoint, load_flow, load_gtr
from models.flags import experiment
from models.flow import SOLVERS
from tests.benchmarks import straightforward
from tests.benchmarks.measure import exponent, flops, machine, matmul_peak, medians, report

SEED = 0
BASELINE = "straightforward"
FEWER = (("euler", 10), ("ab2", 10), ("midpoint", 5))  # at most half the paper's 25 evaluations


@dataclass(frozen=True)
class Way:
    """A sampler of one image, its evaluations of ST-Net per sample, whether it must repeat the baseline."""

    sample: Callable[[], Tensor]  # probabilities (1, n, h, w)
    nfe: int
    exact: bool = False
    dtype: torch.dtype = torch.float32


def ours(atfm: ATFM, image: Tensor, n: int, steps: int, solver: str = "euler", *,
         batch_size: int | None = None, **options: bool) -> Callable[[], Tensor]:
    """`ATFM.sample` on an image (1, c, h, w), all n states at once unless told otherwise."""
    fast = atfm.for_sampling(**({"amp": False} | options))
    return lambda: fast.sample(image, n, steps, solver, torch.Generator(image.device).manual_seed(SEED),
                               batch_size or n)


def ways(atfm: ATFM, image: Tensor, n: int, steps: int, more: bool) -> dict[str, Way]:
    """All samplers to compare; more: also compiled ones."""
    def one_by_one() -> Tensor:
        generator = torch.Generator(image.device).manual_seed(SEED)
        return straightforward.sample(atfm, image, n, steps, generator)

    def exact(**options: bool | int) -> Way:
        return Way(ours(atfm, image, n, steps, **options), steps, exact=True)

    def bfloat16(**options: bool) -> Way:
        return Way(ours(atfm, image, n, steps, amp=True, **options), steps, dtype=torch.bfloat16)

    found = {
        BASELINE: Way(one_by_one, steps, exact=True),
        "ours": exact(),
        "ours, 8 states at a time": exact(batch_size=8),
        "ours, bfloat16": bfloat16(),
    }
    if more:
        found["ours, compiled"] = exact(compiled=True)
        found["ours, bfloat16, compiled"] = bfloat16(compiled=True)
    for solver, few in FEWER:
        evaluations = few * SOLVERS[solver].nfe
        found[f"ours, {solver}, {few} steps"] = Way(ours(atfm, image, n, few, solver), evaluations)
    return found


def compared(found: dict[str, Way], masks: Tensor, repeats: int, device: torch.device, flop: int
             ) -> Iterator[dict]:
    """A row per way; raises SystemExit if an exact one differs. flop: of one evaluation of one state."""
    drawn = {name: way.sample() >= 0.5 for name, way in found.items()}
    times = medians({name: way.sample for name, way in found.items()}, repeats, device, warm_up=False)
    peaks = {dtype: matmul_peak(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    first, expected = drawn[BASELINE], ged(drawn[BASELINE], masks)
    for name, way in found.items():
        agreement = float((drawn[name] == first).float().mean())
        difference = float(ged(drawn[name], masks) - expected)
        if way.exact and (agreement < 0.999 or abs(difference) > 0.001):
            raise SystemExit(f"{name}: masks agree on {agreement:.3%} of pixels, GED {difference:+.2g} off")
        rate = flop * first.shape[1] * way.nfe / times[name]
        yield {"way": name, "nfe": way.nfe, "s": times[name],
               "times faster": times[BASELINE] / times[name], "TFLOP/s": rate / 1e12,
               "of peak": f"{rate / peaks[way.dtype]:.0%}", "masks agree": f"{agreement:.2%}",
               "GED differs": f"{difference:+.4f}"}


def scaling(image: Tensor, repeats: int, device: torch.device) -> Iterator[dict]:
    """Time as one size grows fourfold and the others stay, and the exponent that fits."""
    scale = 4 if device.type == "cuda" else 1
    base = {"n": 4, "steps": 4, "size": 32 * scale, "dim": 16 * scale}
    for name in base:
        sizes = [base[name] * factor for factor in (1, 2, 3, 4)]
        calls = [untrained(image, **(base | {name: size})) for size in sizes]
        fixed = ", ".join(f"{other} {value}" for other, value in base.items() if other != name)
        yield growth(f"sampling: {name}", fixed, sizes, calls, repeats, device)
    sizes = [25, 50, 75, 100]
    calls = [scoring(size, device) for size in sizes]
    yield growth("scoring: test images", "n 16, size 64, 4 experts", sizes, calls, repeats, device)


def growth(name: str, fixed: str, sizes: list[int], calls: list[Callable], repeats: int, device: torch.device
           ) -> dict:
    """A row of the second table: calls[i] does the work of sizes[i]."""
    times = list(medians(dict(zip(map(str, sizes), calls)), repeats, device).values())
    return {"grows": name, "fixed": fixed, "sizes": " ".join(map(str, sizes)),
            "ms": " ".join(f"{1e3 * time:.0f}" for time in times), "time ~ size ^": exponent(sizes, times)}


def untrained(image: Tensor, n: int, steps: int, size: int, dim: int) -> Callable[[], Tensor]:
    """`ATFM.sample` of an untrained flow."""
    atfm = random_flow(image.shape[1], dim).to(image.device)
    return ours(atfm, resized(image, size), n, steps)


class NoiseImages(list):
    """`number` images with masks of noise, as `evaluate` takes them."""

    def __init__(self, number: int) -> None:
        super().__init__([(torch.rand(1, 64, 64), (torch.rand(4, 64, 64) < 0.5).float())] * number)
        self.ids = [str(i) for i in range(number)]


def scoring(number: int, device: torch.device) -> Callable[[], object]:
    """`evaluate` over that many images, of a sampler that costs next to nothing."""
    images, samples = NoiseImages(number), torch.rand(1, 16, 64, 64, device=device)
    return lambda: evaluate(lambda *_, **__: samples, images, samples=(16,), device=device)


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
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gtr", help="run folder or checkpoint of a trained GTR")
    parser.add_argument("--prior", help="run folder or checkpoint of a flow trained over it")
    parser.add_argument("--n", type=int, default=16, help="samples")
    parser.add_argument("--steps", type=int, default=25, help="Euler steps (paper: 25)")
    parser.add_argument("--size", type=int, help="image size (default: 64; with a GPU 128)")
    parser.add_argument("--dim", type=int, help="width of an untrained ST-Net (default: 32; with a GPU 128)")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls per median")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; more need idle cores")
    parser.add_argument("--more", action="store_true", help="torch.compile on a CPU too")
    arguments = parser.parse_args(flags)
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    size, dim = (128, 128) if device.type == "cuda" else (64, 32)
    size, dim = arguments.size or size, arguments.dim or dim

    metadata = experiment(arguments.what).metadata
    metadata = replace(metadata, crop=min(size, metadata.size))  # as in training; larger ones are stretched
    image, masks = data.load(metadata, "test").batch([0], device)
    image, masks = resized(image, size), resized(masks, size) >= 0.5
    atfm = random_flow(metadata.channels, dim)
    if arguments.prior is not None:
        gtr = load_gtr(checkpoint.find(arguments.gtr, "GTR"), metadata, same_size=False)
        path = checkpoint.find(arguments.prior, "atfm")
        atfm = load_flow(path, "atfm", gtr, metadata, same_size=False)
    atfm = atfm.to(device)
    found = ways(atfm, image, arguments.n, arguments.steps, arguments.more or device.type == "cuda")
    common = {"weights": str(arguments.prior or "random"), "repeats": arguments.repeats, **machine(device)}
    rows = list(compared(found, masks, arguments.repeats, device, flops(atfm.net.dim, size)))
    report(rows, n=arguments.n, size=size, dim=atfm.net.dim, **common)
    report(list(scaling(image, arguments.repeats, device)), **common)


if __name__ == "__main__":
    main()
