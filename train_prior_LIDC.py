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
from metadata_manager import BASELINES, FlowConfig, LoopConfig, Metadata, RunConfig, parse
from metrics import evaluate
from models import ATFM, STNet, Validation, baseline, checkpoint, describe, load_gtr, train_loop
from models.processes import FLOW_MEMORY, INITIALIZATION, Processes, join, one_line_errors, seed_step


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
    output, device = Path(run.output_path), processes.device
    # "train_prior" are the rows of "train", except under --split released.
    train = processes.in_turn(lambda: load(metadata, "train_prior"))
    held_out = load(metadata, "val").spread(loop.val_images)

    # System: what is trained of it is `trainable`.
    if config.method in BASELINES:
        seed_step(run.seed, INITIALIZATION)
        system = baseline(config.method, metadata.channels, config).to(device)
    else:
        system = atfm(run, metadata, config, device)
    optimizer = torch.optim.AdamW(system.trainable.parameters(), lr=config.lr,
                                  weight_decay=config.weight_decay)
    batches = Loader(train, config.batch_size, run.seed, device, augmentations(metadata),
                     processes.rank, processes.count, system.apart, system.needs_style)

    # Validation: samples of few steps, where it takes any, on held-out images, against all experts.
    def validate(net: torch.nn.Module) -> Validation:
        sample = partial(system.for_validation(net).sample, steps=system.steps and loop.val_steps,
                         batch_size=loop.val_samples)
        found = evaluate(sample, held_out, (loop.val_samples,), device=device)
        return Validation(found.means(loop.val_samples, "GED", "HM-IoU", "Diversity"),
                          fig.validation_picture(sample, held_out, device))

    train_loop(system.trainable, lambda done, *batch: system.losses(*batch), optimizer, batches, validate,
               folder=output / config.folder, epochs=config.num_epochs, config=loop, seed=run.seed,
               about=describe(config.method, metadata, config, run.seed, train, system.gtr),
               optimization=config, processes=processes)


def atfm(run: RunConfig, metadata: Metadata, config: FlowConfig, device: torch.device) -> ATFM:
    """The flow of Algorithm 1, or one of its ablations."""
    # Networks: x_0 = sigmoid of a sample of the frozen GTR (Eq. 3); v(x_t, t, image) is ST-Net (App. 6).
    gtr = None
    if config.source == "gtr":
        gtr = load_gtr(checkpoint.find(config.gtr or Path(run.output_path) / "GTR", "GTR"), metadata)
    seed_step(run.seed, INITIALIZATION)
    net = STNet.of(config, config.condition_channels(metadata.seen_channels)).to(device)
    if config.channels_last:
        net.to(memory_format=torch.channels_last)
    if config.compile:
        net.compile()

    # Objective: L = L_FM + alpha L_SF on the paths from x_0 to the experts' masks (Algorithm 1).
    return ATFM(gtr, net, config, annotators_per_pass=config.annotators_per_pass,
                images_per_pass=config.images_per_pass, amp=config.amp).to(device)


if __name__ == "__main__":
    with one_line_errors(FLOW_MEMORY):
        main()
