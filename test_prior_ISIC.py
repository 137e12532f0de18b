"""Test ATFM on ISIC3: the paper's scores on the test split, into runs/isic3_style_concat/test.

python test_prior_ISIC.py
python test_prior_ISIC.py --methods act-gtr atfm --steps 10 25 --samples 16 32 100 --seeds 0 1 2 3 4

The paper's row stands below ours in the table that it prints. All flags: --help.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import fig
from data import load
from metadata_manager import EvaluationConfig, Metadata, RunConfig, parse
from metrics import (
    CONTROLS,
    Row,
    differences_table,
    empty_table,
    evaluate,
    free_folder,
    interleaved,
    parts_table,
    results,
    scores_table,
    write_text,
)
from models import load_systems
from models.checkpoint import versions
from models.processes import join, one_line_errors

CONTROL_IMAGES = 200
MEMORY = "a smaller --batch_size (in proportion), --amp True (to about a half)"


def main(argv: Sequence[str] | None = None) -> None:
    """The experiment; argv: its flags, those of the command line unless given."""
    # Settings: metadata_manager's defaults, then --preset, then flags.
    run, metadata, config = parse(argv, "isic3_style_concat", __doc__, RunConfig, Metadata, EvaluationConfig)
    output = Path(run.output_path)

    with join(run) as processes:
        device = processes.device

        def control(method: str, sample: Callable) -> Callable:  # what it chooses, on validation images
            return CONTROLS[method](sample, load(metadata, "val").spread(CONTROL_IMAGES), device)

        if config.images:  # no expert has marked them: samples instead of scores
            if processes.first:
                systems = load_systems(config, metadata, run, device, control)
                drawn = next((system for system in systems if system.evaluations > 0), systems[0])  # a flow
                fig.draw_own_images(drawn, config.images, max(config.samples), config.seeds[0],
                                    output / "images", device)
            return

        # Data: 20 % of the images; a system that was trained on one of these images is refused.
        test = processes.in_turn(lambda: load(metadata, "test")).to(device)

        folder = free_folder(output / "test", metadata=metadata, sampling=config)

        # Systems: each a function sample(image, n, generator) -> n masks as probabilities.
        systems = load_systems(config, metadata, run, device, control, test)

        # Scores of each on every test image (App. 7); each process draws and scores every m-th image.
        mine = range(processes.rank, len(test), processes.count)
        rows = []
        for system in systems:
            started = time.perf_counter()
            found = evaluate(system.sample, test, config.samples, config.seeds, device, mine,
                             title=system.label if processes.first else None)
            rows.append(Row(system, interleaved(processes.gather(found)), time.perf_counter() - started))

    if not processes.first:
        return
    # Report: ours beside the paper's rows, and each system's difference from atfm, over patients.
    table = scores_table(metadata.what, rows, config.samples)
    table += differences_table(rows, test.patients, config.samples)
    table += empty_table(rows) + parts_table(rows, max(config.samples))
    report = results(rows, test.patients, test.fingerprint, versions(), device,
                     run=run, metadata=metadata, sampling=config)
    print(table)
    write_text(folder / "table.md", table)
    write_text(folder / "results.json", report)
    for system in systems:
        fig.draw_samples(system.sample, test, folder, system.label, config.seeds[0], device)
    curves = fig.results_curves(report, folder)
    files = ", ".join(["table.md, results.json", *curves])
    print(f"{folder}: {files} and pictures of each system's samples")


if __name__ == "__main__":
    with one_line_errors(MEMORY):
        main()
