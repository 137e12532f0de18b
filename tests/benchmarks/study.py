"""Which choices matter: one change at a time from the preset `paper`, on the same patients.

Every row is trained with the same budget and seeds, unless it says otherwise, and scored on the same test
images. Differences are means over training runs, with 95 % intervals of a paired bootstrap over patients,
which do not say how runs vary; the dots of study.png do. The released split has other test images, so there
it is unpaired. What is done already is not repeated, and a GTR that a row shares with the first one is
trained once; the table and the picture show all that lies in --output_path. About 5 minutes a row and seed on
one core:

    python -m tests.benchmarks.study --data_path <lidc .h5 file or pickle folder> --seeds 0 1
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import fig
import test_prior_LIDC
import train_GTR
import train_prior_LIDC
from metrics import bootstrap_interval, write_text
from models.processes import one_line_errors

GTR = "--epochs 20 --batchsize 32 --lr 1e-3 --num_filters 16 32 64".split()
FLOW = "--num_epochs 1 --batch_size 8 --lr 1e-3 --dim 16 --amp True --validate_every 1".split()
TEST = "--samples 16 --seeds 0 --batch_size 8 --limit 80".split()
SAMPLING = "--steps 10 --amp True".split()
SCORES = {"GED16": "lower", "HM-IoU16": "higher"}  # which is better
SYSTEMS = {"act-gtr": "Act. GTR", "atfm": "ATFM"}


@dataclass(frozen=True)
class Variant:
    """Flags of a row beyond the first's: of all, GTR (None: the first row's GTR), the flow, the test.

    flow: None: there is none, GTR alone is trained and tested."""

    name: str
    every: str = ""
    gtr: str | None = None
    flow: str | None = ""
    test: str = ""

    @property
    def own_gtr(self) -> bool:
        return bool(self.every) or self.gtr is not None

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "_").replace(",", "").replace("=", "is").replace("'", "")


# What the preset best was at the time of this study; since then, see tests/benchmarks/gain.py.
BEST = "--experts one --ema 0.999 --weight_standardization none --time_scale 10"
VARIANTS = (
    Variant("paper", gtr=""),
    Variant("preset released, split by patient", every="--preset released --split group"),
    Variant("weight standardization released", flow="--weight_standardization released"),
    Variant("weight standardization none", flow="--weight_standardization none"),
    Variant("time scale 1", flow="--time_scale 1"),
    Variant("no semantic term", flow="--alpha 0"),
    Variant("alpha 1e-2", flow="--alpha 1e-2"),
    Variant("alpha 1e-1", flow="--alpha 1e-1"),
    Variant("Dice over the batch, alpha 1e-1", flow="--dice_over batch --alpha 1e-1"),
    Variant("Dice with all experts, alpha 1e-1", flow="--semantic_target all --alpha 1e-1"),
    Variant("moving average of weights", flow="--ema 0.999"),
    Variant("one expert per step in the flow", flow="--experts one"),
    Variant("all experts per step in GTR", gtr="--experts all"),
    Variant("GTR of the released layout", gtr="--convs 3 --pool avg --up bilinear"),
    Variant("split released", every="--split released"),
    Variant("8 groups in GroupNorm", flow="--groups 8"),
    Variant("flow trained 4 times as long", flow="--num_epochs 4"),
    Variant("one expert per step, as many paths", flow="--experts one --num_epochs 4"),
    Variant("time scale 10", flow="--time_scale 10"),
    Variant("one expert per step, 3 times as many paths",
            flow="--experts one --num_epochs 12 --validate_every 3"),
    Variant("preset best in the flow alone, 3 times as many paths",
            flow=f"{BEST} --num_epochs 12 --validate_every 3"),
    Variant("moving average of GTR's weights", gtr="--ema 0.99"),
    Variant("preset best, 3 times as many paths", gtr="--ema 0.99",
            flow=f"{BEST} --num_epochs 12 --validate_every 3"),
    Variant("one expert per step, as many paths, none standardized",
            flow="--experts one --num_epochs 4 --weight_standardization none"),
)
Runs = dict[int, dict[str, Any]]  # seed -> content of a run's results.json
Found = dict[str, Runs]  # by row


@dataclass(frozen=True)
class Study:
    """Rows, of which the first has the GTR that others share, and what they have in common, by script.

    sampling: flags of tests that have a flow."""

    rows: tuple[Variant, ...]
    gtr: Sequence[str]
    flow: Sequence[str]
    test: Sequence[str]
    sampling: Sequence[str]


CHOICES = Study(VARIANTS, GTR, FLOW, TEST, SAMPLING)


def run(study: Study, variant: Variant, folder: Path, common: Sequence[str]) -> None:
    """Trains and tests a row in a folder of `folder`, beside the first row's, as far as that is not done."""
    own = folder / variant.folder
    shared = [*common, *variant.every.split(), "--output_path", str(own)]
    if (own / "test" / "results.json").exists():
        return
    with_gtr = variant if variant.own_gtr else study.rows[0]
    gtr = folder / with_gtr.folder / "GTR"
    train_GTR.main([*study.gtr, *common, *with_gtr.every.split(), *(with_gtr.gtr or "").split(),
                    "--output_path", str(gtr.parent)])  # where it was stopped; nothing if it is done
    of_system = ["--methods", "act-gtr"]
    if variant.flow is not None:
        of_system = [*study.sampling, *variant.test.split()]
        train_prior_LIDC.main([*study.flow, *shared, *variant.flow.split(), "--gtr", str(gtr)])
    leaks = str("--split released" in variant.every)
    test_prior_LIDC.main([*study.test, *of_system, *shared, "--gtr", str(gtr), "--allow_overlap", leaks])


def finished(study: Study, root: Path) -> Found:
    """The results of all rows and seeds that are done, in the order of the rows."""
    found: Found = {}
    for variant in study.rows:
        for path in sorted(root.glob(f"seed*/{variant.folder}/test/results.json")):
            seed = int(path.parts[-4].removeprefix("seed"))
            found.setdefault(variant.name, {})[seed] = json.loads(path.read_text())
    return found


def scores(runs: Runs, system: str, score: str) -> np.ndarray:
    """Of a row's training runs, (runs, images)."""
    return np.array([content["systems"][system]["scores"][score][0] for content in runs.values()])


def difference(ours: Runs, theirs: Runs, systems: tuple[str, str], score: str) -> fig.Difference:
    """systems[0] of one row minus systems[1] of another, over the seeds of both.

    Paired by image; where the rows were tested on other images, means of which each has its own interval."""
    seeds = sorted(ours.keys() & theirs.keys())
    a, b = (scores({seed: runs[seed] for seed in seeds}, system, score)
            for runs, system in zip((ours, theirs), systems))
    one, other = ours[seeds[0]], theirs[seeds[0]]
    of_runs = a.mean(1) - b.mean(1)
    if one["test_images"] == other["test_images"]:
        return fig.Difference(*bootstrap_interval(a - b, one["groups"]), of_runs)
    mean, low, high = bootstrap_interval(a, one["groups"])
    its_mean, its_low, its_high = bootstrap_interval(b, other["groups"])
    return fig.Difference(mean - its_mean, mean - its_mean - math.hypot(mean - low, its_high - its_mean),
                          mean - its_mean + math.hypot(high - mean, its_mean - its_low), of_runs)


def differences(found: Found) -> fig.Differences:
    """Title of a panel -> row -> how ATFM differs from its own Act. GTR, or from the first row's ATFM."""
    first = VARIANTS[0].name
    panels = {}
    for score, better in SCORES.items():
        panels[f"{score} minus Act. GTR\n({better} is better)"] = {
            name: difference(runs, runs, ("atfm", "act-gtr"), score) for name, runs in found.items()}
        panels[f"{score} minus {first}\n({better} is better)"] = {
            name: difference(runs, found[first], ("atfm", "atfm"), score)
            for name, runs in found.items() if name != first}
    return panels


def table(found: Found, panels: fig.Differences) -> str:
    """Markdown: a row per choice, mean scores and the differences."""
    names = [f"{name} {score}" for name in SYSTEMS.values() for score in SCORES]
    names += [title.split("\n")[0] for title in panels]
    lines = [f"| row | runs | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for name, runs in found.items():
        cells = [f"{scores(runs, system, score).mean():.3f}" for system in SYSTEMS for score in SCORES]
        cells += [f"{panel[name].mean:+.3f} [{panel[name].low:+.3f}, {panel[name].high:+.3f}]"
                  if name in panel else "-" for panel in panels.values()]
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(flags: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", required=True, help="LIDC: an .h5 file or the folder of pickles")
    parser.add_argument("--output_path", type=Path, default=Path("runs/study"),
                        help="a folder per seed and row, table.md, study.png")
    parser.add_argument("--crop", default="32", help="centre crop, pixels per side")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of initialization and training")
    names = [row.name for row in VARIANTS]
    parser.add_argument("--rows", nargs="+", default=names, choices=names, metavar="ROW",
                        help="which, by their names in the table; the first is always there")
    arguments = parser.parse_args(flags)
    root = arguments.output_path
    for seed in arguments.seeds:
        common = ["--data_path", arguments.data_path, "--crop", arguments.crop, "--seed", str(seed)]
        for row in (row for row in VARIANTS if row.name in {names[0], *arguments.rows}):
            run(CHOICES, row, root / f"seed{seed}", common)
            found = finished(CHOICES, root)
            panels = differences(found)
            write_text(root / "table.md", table(found, panels))
    fig.save(fig.differences(panels), root / "study.png")
    print((root / "table.md").read_text())


if __name__ == "__main__":
    with one_line_errors():
        main()
