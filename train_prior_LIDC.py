"""Step 2 of ATFM on LIDC: train the flow from the frozen GTR (Algorithm 1), into runs/LIDC/atfm.

python train_prior_LIDC.py

The same command goes on where it was stopped. Watch with `tensorboard --logdir runs`. All flags: --help.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

import fig
from data import Loader, augmentations, load
from metadata_manager import BASELINES, FlowConfig, LoopConfig, Metadata, RunConfig, stage_folder
from metrics import evaluate
from metrics.program import one_line_errors
from models import (
    GTR,
    Validation,
    baseline,
    checkpoint,
    describe,
    flow_of,
    load_gtr,
    settle_precision,
    train_loop,
)
from models.flags import parse
from models.processes import FLOW_MEMORY, INITIALIZATION, Processes, join, seed_step


def main(argv: Sequence[str] | None = None) -> None:
    """The experiment; argv: its flags, those of the command line unless given."""
    # Settings: metadata_manager's defaults, then --preset, then --method, then flags.
    run, metadata, config, loop = parse(argv, "LIDC", __doc__, RunConfig, Metadata, FlowConfig, LoopConfig)
    with join(run) as processes:
        for flow in config.per_alpha():
            train_system(run, metadata, flow, loop, processes)


def train_system(run: RunConfig, metadata: Metadata, config: FlowConfig, loop: LoopConfig,
                 processes: Processes) -> None:
    """Trains one flow, or a system that the paper compares it with, into <output_path>/<method>."""
    # Data: the patients that GTR was trained on, with all four experts' masks; 16 % to validate on.
    device = processes.device
    # "train_prior" is the same as "train", except under --split released.
    train = processes.in_turn(lambda: load(metadata, "train_prior"))
    held_out = load(metadata, "val").spread(loop.val_images)

    # Precision: bfloat16 in ST-Net on a GPU that has it, unless --amp or a resumed run says otherwise.
    folder = Path(run.output_path) / config.folder(run.preset)
    config = settle_precision(config, folder, device)

    # System: the flow of Algorithm 1, or an ablation. Its x_0 is the sigmoid of a sample of the frozen GTR
    # (Eq. 3), its velocity v(x_t, t, image) ST-Net (App. 6).
    def gtr() -> GTR:
        stage = stage_folder("GTR", run.preset)
        return load_gtr(checkpoint.find(config.gtr or Path(run.output_path) / stage, stage), metadata)

    seed_step(run.seed, INITIALIZATION)
    if config.method in BASELINES:
        system = baseline(config.method, metadata.channels, config).to(device)
    else:
        system = flow_of(config, gtr, metadata).to(device)
        if config.channels_last:
            system.net.to(memory_format=torch.channels_last)
        if config.compile:
            system.compile_net()
    optimizer = torch.optim.AdamW(system.trainable.parameters(), lr=config.lr,
                                  weight_decay=config.weight_decay)
    batches = Loader(train, config.batch_size, run.seed, device, augmentations(metadata),
                     processes.rank, processes.count, system.per_annotator_loss, system.needs_style)

    # Validation: samples of few steps, where it takes any, on held-out images, against all experts.
    def validate(net: torch.nn.Module) -> Validation:
        sample = partial(system.for_validation(net).sample, steps=system.steps and loop.val_steps,
                         batch_size=loop.val_samples)
        scores = evaluate(sample, held_out, (loop.val_samples,), device=device)
        return Validation(scores.means(loop.val_samples, "GED", "HM-IoU", "Diversity"),
                          fig.validation_picture(sample, held_out, device))

    train_loop(system.trainable, lambda done, *batch: system.losses(*batch), optimizer, batches, validate,
               folder=folder, epochs=config.num_epochs, config=loop, seed=run.seed,
               about=describe(config.method, metadata, config, run, train, system.gtr),
               optimization=config, processes=processes)


if __name__ == "__main__":
    with one_line_errors(FLOW_MEMORY):
        main()
