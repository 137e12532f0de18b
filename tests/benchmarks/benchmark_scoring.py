"""Time to score one 128 x 128 image with 4 experts as the paper's Table 1 does: GED_100, HM-IoU_32, MDM_32.

`metrics` against loops over pairs (tests/oracle.py), on the same masks, with equal results required. Prints
one JSON object per measurement and a table of medians. "time ~ n^" fits GED_n, HM-IoU_32 and MDM_32 together,
over the n measured; the matching and the overheads of calls do not grow. About 20 s:

    python -m tests.benchmarks.benchmark_scoring
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from metrics import Overlaps, ged_from, hm_iou_from, mdm_from
from tests import oracle


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
    expected, found = pairwise_loops(samples, masks), matrix_products(samples, masks)
    if max(abs(a - b) for a, b in zip(expected, found)) > 1e-6:
        raise SystemExit(f"scores differ: loops {expected}, matrix products {found}")


def timed(score: Callable, samples: Tensor, masks: Tensor, repeats: int) -> list[float]:
    """Wall seconds of `repeats` calls, after one that warms up and is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        score(samples, masks)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def exponent(counts: Sequence[int], seconds: Sequence[float]) -> float:
    """Slope of log(seconds) on log(n), by least squares."""
    x, y = [math.log(n) for n in counts], [math.log(s) for s in seconds]
    return statistics.linear_regression(x, y).slope


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="torch threads; more need idle cores")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls per median (loops)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = {"processor": processor(), "threads": arguments.threads, "torch": torch.__version__}
    generator = torch.Generator().manual_seed(0)
    nodule = discs(400, 128, generator), discs(4, 128, generator)
    noise = tuple(torch.rand(number, 128, 128, generator=generator) < 0.5 for number in (400, 4))
    cases = (
        ("pairwise loops", pairwise_loops, nodule, arguments.repeats, (50, 100, 200)),
        ("matrix products", matrix_products, nodule, 5 * arguments.repeats, (50, 100, 200, 400)),
        ("on masks of noise", matrix_products, noise, 5 * arguments.repeats, (50, 100, 200, 400)),
    )
    for samples, masks in (nodule, noise):
        require_equal_scores(samples[:100], masks)

    table = []
    for name, way, (samples, masks), repeats, counts in cases:
        medians = []
        for n in counts:
            seconds = timed(way, samples[:n], masks, repeats)
            medians.append(statistics.median(seconds))
            result = {"way": name, "n": n, "k": len(masks), "size": masks.shape[-1], "median_s": medians[-1],
                      "fastest_s": min(seconds), "repeats": repeats}
            print(json.dumps(result | machine))
        table.append((name, medians[counts.index(100)], exponent(counts, medians)))
    print(f"\n{'n = 100':<28} {'ms':>9} {'times faster':>13} {'time ~ n^':>10}")
    for name, median, power in table:
        print(f"{name:<28} {1e3 * median:9.2f} {table[0][1] / median:13.0f} {power:10.2f}")


if __name__ == "__main__":
    main()
