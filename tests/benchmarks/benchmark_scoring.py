"""Time to score one 128 x 128 image with 4 experts as the paper's Table 1 does: GED_100, HM-IoU_32, MDM_32.

`metrics` against loops over pairs (tests/oracle.py), on the same masks, with equal results required. The time
of one n is of GED_n, HM-IoU_32 and MDM_32 together. About 20 s:

    python -m tests.benchmarks.benchmark_scoring
"""

import argparse
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from metrics import Overlaps, ged_from, hm_iou_from, mdm_from
from tests import oracle
from tests.benchmarks.measure import machine, medians, report

LARGEST_LOOPED = 200  # samples; the loops take a second beyond


def discs(number: int, size: int, generator: torch.Generator) -> Tensor:
    """Bool (number, size, size): overlapping discs with jittered centres and radii, like masks of one nodule.

    They cover 1 % of the image, as LIDC-IDRI's contours do on average in crops of 128 x 128 pixels."""
    centre = size / 2 + size / 60 * torch.randn(number, 2, generator=generator)
    radius = size / 18 * (1 + 0.3 * torch.randn(number, generator=generator)).clamp(min=0)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    distance = (y - centre[:, 0, None, None]) ** 2 + (x - centre[:, 1, None, None]) ** 2
    return distance < radius[:, None, None] ** 2


def matrix_products(samples: Tensor, masks: Tensor) -> tuple[float, ...]:
    overlaps = Overlaps.of(samples[None], masks[None])
    first = overlaps.prefix(min(32, len(samples)))
    return float(ged_from(overlaps)), float(hm_iou_from(first)), float(mdm_from(first))


def pairwise_loops(samples: Tensor, masks: Tensor) -> tuple[float, ...]:
    first = samples[:32]
    return oracle.ged(samples, masks), oracle.hm_iou(first, masks), oracle.mdm(first, masks)


def require_equal_scores(samples: Tensor, masks: Tensor) -> None:
    expected, scores = pairwise_loops(samples, masks), matrix_products(samples, masks)
    if max(abs(a - b) for a, b in zip(expected, scores)) > 1e-6:
        raise SystemExit(f"scores differ: loops {expected}, matrix products {scores}")


def main(flags: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=(50, 100, 200, 400), help="values of n")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls per median (loops)")
    asked = parser.parse_args(flags)
    torch.set_num_threads(1)
    device, counts = torch.device("cpu"), sorted(asked.counts)
    generator = torch.Generator().manual_seed(0)
    nodule = discs(counts[-1], 128, generator), discs(4, 128, generator)
    noise = tuple(torch.rand(number, 128, 128, generator=generator) < 0.5 for number in (counts[-1], 4))

    rows = []
    for name, way, (samples, masks), repeats in (
            ("pairwise loops", pairwise_loops, nodule, asked.repeats),
            ("matrix products", matrix_products, nodule, 5 * asked.repeats),
            ("matrix products, masks of noise", matrix_products, noise, 5 * asked.repeats)):
        require_equal_scores(samples[:100], masks)
        calls = {str(n): functools.partial(way, samples[:n], masks) for n in counts
                 if way is matrix_products or n <= LARGEST_LOOPED}
        rows += [{"way": name, "n": int(n), "ms": 1e3 * seconds}
                 for n, seconds in medians(calls, repeats, device).items()]
    report(rows, k=4, size=128, **machine(device))


if __name__ == "__main__":
    main()
