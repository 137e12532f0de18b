"""Step 1 of ATFM: train GTR, the Gaussian Truncation Representation (Eq. 3-5), into runs/<what>/GTR.

LIDC:   python train_GTR.py --what LIDC --epochs 1000 --batchsize 256 --save_model True --save_model_step 50
ISIC3:  python train_GTR.py --what isic3_style_concat --epochs 400 --batchsize 8

The same command goes on where it was stopped. Watch with `tensorboard --logdir runs`. All flags: --help.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

import fig
from data import Loader, augmentations, load
from metadata_manager import GTRConfig, LoopConfig, Metadata, RunConfig, stage_folder
from metrics import evaluate
from metrics.program import one_line_errors
from models import GTR, Validation, describe, energy_score, monte_carlo_nll, train_loop
from models.flags import parse
from models.flow import one_expert
from models.processes import INITIALIZATION, join, seed_step

MEMORY = "a smaller --batchsize (in proportion), fewer --mc_samples"


def main(argv: Sequence[str] | None = None) -> None:
    """The experiment; argv: its flags, those of the command line unless given."""
    # Settings: metadata_manager's defaults, then --preset, then flags.
    run, metadata, config, loop = parse(argv, "LIDC", __doc__, RunConfig, Metadata, GTRConfig, LoopConfig)

    with join(run) as processes:
        # Data: 64 % of the patients (LIDC) or images (ISIC3) to train on, 16 % to validate on.
        device = processes.device
        train = processes.in_turn(lambda: load(metadata, "train"))
        held_out = load(metadata, "val").spread(loop.val_images)
        batches = Loader(train, config.batchsize, run.seed, device, augmentations(metadata),
                         processes.rank, processes.count)

        # Network: a U-Net that gives a low-rank Gaussian over logit maps (Eq. 3-4, App. 6).
        seed_step(run.seed, INITIALIZATION)
        gtr = GTR.of(config, metadata.channels).to(device)
        optimizer = torch.optim.AdamW(gtr.parameters(), lr=config.lr, weight_decay=config.weight_decay)

        # Loss: the Monte Carlo likelihood of an expert's mask under antithetic samples (Eq. 5). With --loss
        # energy, after a fraction of the steps, the energy score of independent samples against all masks.
        def losses(done: float, image: Tensor, masks: Tensor) -> Iterator[dict[str, Tensor]]:
            gaussian = gtr(image)
            if config.loss == "energy" and done >= config.nll_first:
                score = energy_score(gaussian.rsample(config.mc_samples).sigmoid(), masks)
                yield {"loss": score, "ES": score}
                return
            targets = one_expert(masks) if config.experts == "one" else masks
            nll = monte_carlo_nll(gaussian.rsample(config.mc_samples, antithetic=True), targets)
            if config.loss == "nll":
                yield {"loss": nll}
            else:
                # The mean over pixels, not the sum: Adam divides by the size of past gradients, and after the
                # change to the energy score, those of sums would make its steps far too small for long.
                yield {"loss": nll / image[0, 0].numel(), "NLL": nll}

        # Validation: the samples themselves, without a flow, against all experts.
        def validate(model: GTR) -> Validation:
            scores = evaluate(model.sample, held_out, (loop.val_samples,), device=device)
            return Validation(scores.means(loop.val_samples, "GED", "HM-IoU", "Diversity"),
                              fig.validation_picture(model.sample, held_out, device))

        train_loop(gtr, losses, optimizer, batches, validate,
                   folder=Path(run.output_path) / stage_folder("GTR", run.preset), epochs=config.epochs,
                   config=loop, seed=run.seed, about=describe("GTR", metadata, config, run, train),
                   optimization=config, processes=processes)


if __name__ == "__main__":
    with one_line_errors(MEMORY):
        main()
