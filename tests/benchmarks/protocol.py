"""By how much others' ways of scoring the same samples differ from ours: the table of docs/protocol.md.

The samples are of GTR alone, as a flow's would differ in the same way. A minute on one core:

    python -m tests.benchmarks.protocol --gtr runs/LIDC/GTR --data_path <lidc .h5 file or pickle folder>
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from data import load
from metrics import Overlaps, ged, hm_iou
from metrics.evaluation import draw
from metrics.program import one_line_errors
from models import checkpoint, load_gtr
from models.flags import experiment
from tests.benchmarks.measure import report


def without_self_pairs(samples: Tensor, masks: Tensor) -> float:
    """GED whose diversities leave out the pairs of a mask with itself (i = i')."""
    overlaps = Overlaps.of(samples, masks)
    n, k = samples.shape[1], masks.shape[1]
    among = (1 - overlaps.iou_ss.mean()) * n / (n - 1) + (1 - overlaps.iou_yy.mean()) * k / max(k - 1, 1)
    return float(2 * (1 - overlaps.iou_sy.mean()) - among)


def without_empty_masks(score: Callable[[Tensor, Tensor], Tensor], samples: Tensor, masks: Tensor) -> float:
    """A score against the experts who marked something; nan if none did."""
    marked = masks[:, masks.flatten(2).any(2)[0]]
    return float(score(samples, marked)) if marked.shape[1] else float("nan")


def rectangular(samples: Tensor, masks: Tensor) -> float:
    """Mean IoU of the best matching of k of the n samples to the k masks, which ignores the others."""
    iou = Overlaps.of(samples, masks).iou_sy[0].numpy()
    return float(iou[linear_sum_assignment(iou, maximize=True)].mean())


WAYS: dict[str, tuple[str, Callable[[Tensor, Tensor], float]]] = {
    "ours": ("GED", lambda samples, masks: float(ged(samples, masks))),
    "without the pairs i = i'": ("GED", without_self_pairs),
    "empty experts' masks left out": ("GED", lambda *both: without_empty_masks(ged, *both)),
    "ours, both sets tiled": ("HM-IoU", lambda samples, masks: float(hm_iou(samples, masks))),
    "the best k of n samples matched": ("HM-IoU", rectangular),
    "empty experts' masks left out ": ("HM-IoU", lambda *both: without_empty_masks(hm_iou, *both)),
}


def main(flags: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gtr", type=Path, required=True, help="run folder or checkpoint of step 1")
    parser.add_argument("--data_path", required=True, help="LIDC: an .h5 file or the folder of pickles")
    parser.add_argument("--limit", type=int, default=240, help="test images")
    parser.add_argument("--samples", type=int, default=16, help="n")
    arguments = parser.parse_args(flags)
    path = checkpoint.find(arguments.gtr, "GTR")
    trained = checkpoint.load(path, "GTR")["config"]
    metadata = replace(experiment("LIDC").metadata, data_path=arguments.data_path, crop=trained["crop"],
                       limit=arguments.limit)
    gtr, test = load_gtr(path, metadata), load(metadata, "test")
    scores: dict[str, list[float]] = {name: [] for name in WAYS}
    for index, name in enumerate(test.ids):
        image, masks = test[index]
        samples = draw(gtr.sample, image[None], arguments.samples, 0, name)
        for way, (_, score) in WAYS.items():
            scores[way].append(score(samples, masks[None].bool()))
    report([{"score": score, "way": way, "mean": float(np.nanmean(scores[way])),
             "images": int(np.isfinite(scores[way]).sum())} for way, (score, _) in WAYS.items()])


if __name__ == "__main__":
    with one_line_errors():
        main()
