"""Test ATFM on ISIC3: the paper's scores on the test split, into runs/isic3_style_concat/test.

python test_prior_ISIC.py
python test_prior_ISIC.py --methods act-gtr atfm --steps 10 25 --samples 16 32 100 --seeds 0 1 2 3 4

The paper's row stands below ours in the table that it prints. All flags: --help.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import fig
import metrics
from data import load
from metadata_manager import EvaluationConfig, Metadata, RunConfig
from metrics.program import one_line_errors
from models import load_systems
from models.checkpoint import versions
from models.flags import parse
from models.processes import join, leave, stop_signals

# Validation images on which a control chooses its threshold.
CONTROL_IMAGES = 200
MEMORY = "--batch_size 1 (the flow's, in proportion), fewer --samples (what is scored, in proportion)"


def main(argv: Sequence[str] | None = None) -> None:
    """The experiment; argv: its flags, those of the command line unless given."""
    # Settings: metadata_manager's defaults, then --preset, then flags.
    run, metadata, config = parse(argv, "isic3_style_concat", __doc__, RunConfig, Metadata, EvaluationConfig)
    output = Path(run.output_path)

    with join(run) as processes:
        device = processes.device
        systems_of = partial(load_systems, config, metadata, run, device, partial(
            metrics.control, validation=lambda: load(metadata, "val").spread(CONTROL_IMAGES), device=device))
        # The user's images: no expert has marked them, so they get samples instead of scores.
        if config.images:
            if processes.first:
                fig.draw_own_images(systems_of(), config.images, max(config.samples), config.seeds[0],
                                    output / "images", device, metadata)
            return

        # Data: 20 % of the images; a system that was trained on one of these images is refused.
        test = processes.in_turn(lambda: load(metadata, "test")).to(device)

        # Systems: each a function sample(image, n, generator) -> n masks as probabilities.
        systems = systems_of(test)
        if processes.first:
            print(metrics.workload(systems, len(test), config))

        # Scores of each on every test image (App. 7), by each process of every m-th. They are appended to a
        # file as they come, so that a test that was stopped goes on.
        folder = processes.in_turn(lambda: metrics.free_folder(
            output / "test", metadata=metadata, sampling=config, test_images=metrics.identity_of(test),
            weights={f"weights of {system.label}": system.weights for system in systems},
            device=device.type, tf32=run.tf32))
        with stop_signals() as signals:
            stop = partial(leave, signals, f": the same command goes on from what is in {folder}")
            rows = metrics.evaluate_systems(systems, test, config, folder, processes, stop)

    if not processes.first:
        return
    # A part alone makes no table: its means would be over another set of images.
    if config.part != "1/1":
        return print(f"{folder}: part {config.part} is done; after all parts, run this without --part")
    # Report: ours beside the paper's rows, and each system's difference from atfm, over patients.
    table = metrics.report_tables(metadata, rows, test.patients, config.samples)
    report = metrics.results(rows, test.patients, test.fingerprint, versions(), device,
                             run=run, metadata=metadata, sampling=config)
    print(table + metrics.cost_table(metadata.what, rows))  # seconds differ from run to run: not in a file
    metrics.write_text(folder / "table.md", table + metrics.training_section(report))
    metrics.write_text(folder / "results.json", report)
    samples = {system.label: fig.draw_samples(system.sample, test, folder, system.label, config.seeds[0],
                                              device) for system in systems}
    fig.draw_comparison(samples, test, folder)
    curves = fig.results_curves(report, folder)
    fig.write_report(folder, systems, test, report, table, device)
    print(f"{folder}: table.md, results.json, report.html, {', '.join(curves)} and pictures of samples")


if __name__ == "__main__":
    with one_line_errors(MEMORY):
        main()
