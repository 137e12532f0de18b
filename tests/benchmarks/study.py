"""Which choices matter: one change at a time from the preset `paper`, on the same patients.

Every row is trained with the same budget and seed and scored on the same test images; its difference from
the first row has a 95 % interval of a paired bootstrap over patients. Rows that are done already are not
repeated, and a GTR that a row shares with the first one is trained once. About 5 minutes a row on one core:

    python -m tests.benchmarks.study --data_path <lidc .h5 file or pickle folder>
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metrics import paired_bootstrap
from models.stages import train_gtr, train_prior
from models.testing import test_prior

GTR = "--epochs 20 --batchsize 32 --lr 1e-3 --num_filters 16 32 64".split()
FLOW = "--num_epochs 1 --batch_size 8 --lr 1e-3 --dim 16 --amp True --validate_every 1".split()
TEST = "--samples 16 --steps 10 --seeds 0 --batch_size 8 --amp True --limit 80".split()
SCORES = ("GED16", "HM-IoU16")


@dataclass(frozen=True)
class Variant:
    """Flags of a row beyond the first's: of all stages, of GTR (None: the first row's GTR), of the flow."""

    name: str
    every: str = ""
    gtr: str | None = None
    flow: str = ""

    @property
    def own_gtr(self) -> bool:
        return bool(self.every) or self.gtr is not None


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
)


def run(variant: Variant, first: Path, folder: Path, common: Sequence[str]) -> dict[str, Any]:
    """Trains and tests a row in `folder`, as far as that is not done yet: the content of its results.json."""
    shared = [*common, *variant.every.split(), "--output_path", str(folder)]
    gtr = str((folder if variant.own_gtr else first) / "GTR")
    results = folder / "test" / "results.json"
    if not results.exists():
        if variant.own_gtr:
            train_gtr("LIDC", [*GTR, *shared, *(variant.gtr or "").split()])
        train_prior("LIDC", [*FLOW, *shared, *variant.flow.split(), "--gtr", gtr])
        leaks = str("--split released" in variant.every)
        test_prior("LIDC", [*TEST, *shared, "--gtr", gtr, "--allow_overlap", leaks])
    return json.loads(results.read_text())


def row(name: str, found: dict[str, Any], reference: dict[str, Any]) -> str:
    """A line of the table: scores of GTR alone and of ATFM, and ATFM's difference from the first row's."""
    cells = [name]
    for system in ("act-gtr", "atfm"):
        cells += [f"{np.mean(found['systems'][system]['scores'][score]):.3f}" for score in SCORES]
    ours, theirs = found["systems"]["atfm"], reference["systems"]["atfm"]
    for score in SCORES:
        if ours["ids"] != theirs["ids"]:
            cells.append("other images")
            continue
        a, b = np.asarray(ours["scores"][score]), np.asarray(theirs["scores"][score])
        difference, low, high = paired_bootstrap(a, b, groups=found["groups"])
        cells.append(f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", required=True, help="LIDC: an .h5 file or the folder of pickles")
    parser.add_argument("--output_path", default="runs/study", help="a folder per row, and table.md")
    parser.add_argument("--crop", default="32", help="centre crop, pixels per side")
    parser.add_argument("--seed", default="0", help="of initialization and training")
    parser.add_argument("--rows", type=int, nargs="+", default=list(range(len(VARIANTS))),
                        help="which rows, from 0")
    flags = parser.parse_args()
    root = Path(flags.output_path)
    common = ["--data_path", flags.data_path, "--crop", flags.crop, "--seed", flags.seed]
    names = [f"GTR {score}" for score in SCORES] + [f"ATFM {score}" for score in SCORES]
    lines = [f"| row | {' | '.join(names)} | {' | '.join(f'{score} minus row 1' for score in SCORES)} |"]
    lines.append("|---" * (1 + 3 * len(SCORES)) + "|")
    first = root / VARIANTS[0].name
    reference = run(VARIANTS[0], first, first, common)
    for variant in (VARIANTS[number] for number in flags.rows):
        folder = root / variant.name.replace(" ", "_").replace(",", "")
        lines.append(row(variant.name, run(variant, first, folder, common), reference))
        (root / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
