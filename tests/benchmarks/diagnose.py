"""Why a flow is no better than the samples it starts from: too little training, x_0 saturated or ignored?

On held-out images, |v - u|^2 (L_FM) at fixed t: a flow that has learned nothing, v = 0, has the number beside
it at every t, and at t = 0 none can get below the last, the variance of an image's expert masks. Then, of 16
samples per image, the share of pixels of x_0 and of results x_1 that are undecided, in (0.1, 0.9); the IoU of
a result with the x_0 that it came from, and with the others; the diversity of x_0, results and experts. A
minute on one core:

    python -m tests.benchmarks.diagnose --gtr runs/LIDC_demo/GTR --prior runs/LIDC_demo/atfm
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

import data
from metadata_manager import experiment
from metrics import diversity, iou_matrix
from models import ATFM, checkpoint, load_flow, load_gtr
from models.flow import linear_path
from tests.benchmarks.measure import report

TIMES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)
SAMPLES, STEPS = 16, 10


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def errors(atfm: ATFM, image: Tensor, masks: Tensor) -> dict[str, float]:
    """Mean |v - u|^2 at each of TIMES on the paths from one x_0 per image to each annotator; its bounds."""
    b, k = masks.shape[:2]
    x_0, condition = atfm.start(image, 1, seeded())
    found = {}
    for t in TIMES:
        path = linear_path(x_0, masks, torch.full((b,), t))
        x_t, t_own = path.x_t.flatten(0, 1)[:, None], torch.full((b * k,), t)
        v = atfm.v(x_t, t_own, condition.repeat_interleave(k, dim=0)).view_as(path.u)
        found[f"t = {t:g}"] = float((v - path.u).square().mean())
    return found | {"v = 0": float((masks - x_0).square().mean()),
                    "least at t = 0": float(masks.var(1, correction=0).mean())}


def of_samples(atfm: ATFM, image: Tensor, masks: Tensor) -> dict[str, float]:
    """How results x_1 relate to the x_0 that they come from, and to the experts."""
    x_0, _ = atfm.start(image, SAMPLES, seeded())
    x_1 = atfm.for_sampling(amp=False).sample(image, SAMPLES, STEPS, generator=seeded())
    starts, ends = x_0 >= 0.5, x_1 >= 0.5
    iou = iou_matrix(starts, ends)
    own = iou.diagonal(dim1=1, dim2=2)
    others = (iou.sum((1, 2)) - own.sum(1)) / (SAMPLES * (SAMPLES - 1))
    undecided = {f"undecided in {name}": float(((x > 0.1) & (x < 0.9)).float().mean())
                 for name, x in (("x_0", x_0), ("x_1", x_1))}
    diverse = {f"diversity of {name}": float(diversity(drawn).mean())
               for name, drawn in (("x_0", starts), ("x_1", ends), ("experts", masks.bool()))}
    return undecided | {"IoU with own x_0": float(own.mean()), "with others": float(others.mean())} | diverse


@torch.no_grad()
def main(flags: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", default="LIDC_demo", help="a dataset of metadata_manager")
    parser.add_argument("--gtr", required=True, help="run folder or checkpoint of step 1")
    parser.add_argument("--prior", required=True, help="run folder or checkpoint of step 2, of method atfm")
    parser.add_argument("--images", type=int, default=40, help="evenly spaced over the validation split")
    arguments = parser.parse_args(flags)
    metadata = experiment(arguments.what).metadata
    gtr = load_gtr(checkpoint.find(arguments.gtr, "GTR"), metadata, same_size=False)
    metadata = replace(metadata, crop=gtr.trained_on.side)
    atfm = load_flow(checkpoint.find(arguments.prior, "atfm"), "atfm", gtr, metadata)
    held_out = data.load(metadata, "val")
    image, masks = held_out.batch(torch.linspace(0, len(held_out) - 1, arguments.images).long().numpy())
    for row in errors(atfm, image, masks), of_samples(atfm, image, masks):
        report([row], prior=arguments.prior, images=arguments.images)


if __name__ == "__main__":
    main()
