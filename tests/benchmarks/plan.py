"""What the papers' tables cost: hours and dollars of each stage on a GPU, from counted operations.

Operations are counted on tensors without data, so this runs anywhere, in a minute. A backward pass counts as
two forward passes. Hours = operations / (peak x utilization): an assumption, not a measurement. The peaks are
the vendors', dense, of TF32 for GTR and training, and of bfloat16 (--amp True) for the test; a flow that is
memory-bound reaches less. Saved memory is counted as in benchmark_memory.

    python -m tests.benchmarks.plan --utilization 0.3
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from metadata_manager import experiment
from models import GTR, STNet
from models.flow import NFE_PER_STEP
from tests.benchmarks.measure import report

# Images to train on and to test on: 64 % and 20 % of 15,096 slices; of 2,000 lesions, a guess at ISIC3's.
IMAGES = {"LIDC": (9661, 3019), "isic3_style_concat": (1280, 400)}
BACKWARD = 3  # forward and backward pass, in forward passes


@dataclass(frozen=True)
class GPU:
    """Peak of dense products in FLOP/s, and an hour's price in dollars, as of November 2026 by assumption."""

    tf32: float
    bf16: float
    price: float


GPUS = {"RTX 3090": GPU(35.6e12, 71e12, 0.25), "A100": GPU(156e12, 312e12, 1.5),
        "H100": GPU(495e12, 990e12, 2.5)}


def operations(model: torch.nn.Module, *inputs: torch.Tensor) -> int:
    """Floating-point operations of one forward pass, a multiplication and an addition counting two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops()


def stages(what: str, preset: str, method: str) -> dict[str, tuple[float, str]]:
    """Stage -> its operations, and in which precision."""
    ours = experiment(what, preset, method)
    flow = ours.flow
    train, test = IMAGES[what]
    side, channels = ours.metadata.side, ours.metadata.channels
    with torch.device("meta"):
        gtr = operations(GTR.of(ours.gtr, channels).unet, torch.empty(1, channels, side, side))
        x = torch.empty(1, 1, side, side)
        net = operations(STNet(flow.dim, flow.dim_mults), x, torch.empty(1), x)
    paths = 1 if flow.experts == "one" else ours.metadata.annotators
    evaluations = flow.steps * NFE_PER_STEP[flow.solver] * (1 if flow.guidance == 0 else 2)
    samples = max(ours.evaluation.samples) * len(ours.evaluation.seeds)
    return {"GTR": (float(BACKWARD) * gtr * train * ours.gtr.epochs, "tf32"),
            "flow": (float(BACKWARD) * net * train * paths * flow.num_epochs, "tf32"),
            f"test, {evaluations} evaluations": (float(net) * evaluations * samples * test, "bf16")}


def main(flags: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--utilization", type=float, default=0.3, help="share of the peak that is reached")
    arguments = parser.parse_args(flags)
    rows = []
    for what in IMAGES:
        for preset, method in (("paper", "atfm"), ("best", "atfm"), ("paper", "cfm")):
            for stage, (count, precision) in stages(what, preset, method).items():
                row = {"what": what, "preset": preset, "method": method, "stage": stage,
                       "FLOP": f"{count:.1e}"}
                for name, gpu in GPUS.items():
                    hours = count / (getattr(gpu, precision) * arguments.utilization) / 3600
                    row |= {f"{name}, h": round(hours, 1), f"{name}, $": round(hours * gpu.price, 1)}
                if not (stage == "GTR" and (preset, method) != ("paper", "atfm")):
                    rows.append(row)
    report(rows, utilization=arguments.utilization)


if __name__ == "__main__":
    main()
