r"""How well a cheap validation ranks the checkpoints of a run: its rank correlation with the full one.

Each checkpoint is scored on many held-out images with 16 samples of 10 steps, and more cheaply: on fewer
images, evenly spaced, fewer samples, fewer steps. The noise is fixed by image and seed, as in training, so
that all checkpoints are compared on the same draws; the last row draws anew for each. Lost: GED16 of the
checkpoint that a row would choose, by the full validation, above that of the best. Training and ranking take
minutes:

    python train_GTR.py --what isic3_demo --preset paper --crop 24 --limit 48 --epochs 8 --output_path $RUN
    python train_prior_ISIC.py --what isic3_demo --preset paper --crop 24 --limit 48 --dim 4 --ema 0 \
        --num_epochs 24 --save_model_step 4 --validate_every 24 --val_images 2 --output_path $RUN
    python -m tests.benchmarks.rank_checkpoints --run $RUN --crop 24
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

import data
from data import ExpertDataset
from metadata_manager import experiment
from metrics import evaluate
from models import ATFM, load_flow, load_gtr
from tests.benchmarks.measure import machine, report

SAMPLES, STEPS = (16, 8, 4), (10, 4)
CHEAPER = ((16, 16, 10), (16, 8, 10), (16, 16, 4), (16, 8, 4), (16, 4, 4), (8, 16, 10), (8, 8, 4), (8, 4, 4))
REDRAWN = (16, 8, 4)  # images, samples, steps, as above


def scores(flow: ATFM, held_out: ExpertDataset, steps: int, seed: int = 0) -> dict[int, np.ndarray]:
    """Number of samples -> GED of a checkpoint on each image; fewer samples are the first of the most."""
    sample = partial(flow.sample, steps=steps, solver="euler", batch_size=max(SAMPLES))
    found = evaluate(sample, held_out, SAMPLES, (seed,)).scores
    return {n: found[f"GED{n}"][0] for n in SAMPLES}


def spread(of_image: np.ndarray, count: int) -> np.ndarray:
    """Mean of scores (checkpoints, images) over `count` images, evenly spaced as `ExpertDataset.spread`."""
    spaced = np.linspace(0, of_image.shape[1] - 1, min(count, of_image.shape[1]))
    return of_image[:, np.unique(spaced.round().astype(int))].mean(1)


def rows_of(flows: Sequence[ATFM], held_out: ExpertDataset) -> list[dict]:
    """A row per validation; cost: its evaluations of the net, in those of the full one."""
    ged = {steps: [scores(flow, held_out, steps) for flow in flows] for steps in STEPS}
    whole = len(held_out), max(SAMPLES), max(STEPS)
    found = {how: spread(np.stack([one[how[1]] for one in ged[how[2]]]), how[0]) for how in (whole, *CHEAPER)}
    images, n, steps = REDRAWN
    anew = np.stack([scores(flow, held_out.spread(images), steps, seed)[n]
                     for seed, flow in enumerate(flows, 1)]).mean(1)
    full = found[whole]
    return [{"validation": "{} images, {} samples, {} steps".format(*how) + words,
             "cost": f"{np.prod(how) / np.prod(whole):.3f}",
             "rank correlation": float(spearmanr(ged, full)[0]),
             "lost GED16": float(full[ged.argmin()] - full.min())}
            for how, words, ged in (*((how, "", one) for how, one in found.items()),
                                    (REDRAWN, ", other noise", anew))]


def main(flags: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", default="isic3_demo", help="a dataset of metadata_manager")
    parser.add_argument("--run", type=Path, required=True, help="its folder, with GTR and atfm/epoch_*.pt")
    parser.add_argument("--images", type=int, default=24, help="of the full validation, at least 16")
    parser.add_argument("--crop", type=int, help="that it was trained on (default: the data set's)")
    arguments = parser.parse_args(flags)
    torch.set_num_threads(1)
    metadata = experiment(arguments.what).metadata
    metadata = replace(metadata, crop=arguments.crop or metadata.crop)
    gtr = load_gtr(arguments.run / "GTR" / "best.pt", metadata)
    paths = sorted((arguments.run / "atfm").glob("epoch_*.pt"))
    if len(paths) < 3:
        raise SystemExit(f"{arguments.run}/atfm: {len(paths)} checkpoints epoch_*.pt, expected at least 3; "
                         "train with --save_model_step 1")
    flows = [load_flow(path, "atfm", gtr, metadata).for_sampling(False) for path in paths]
    held_out = data.load(metadata, "val").spread(arguments.images)
    report(rows_of(flows, held_out), checkpoints=len(paths), **machine(torch.device("cpu")))


if __name__ == "__main__":
    main()
