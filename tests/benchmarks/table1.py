"""Table 1, small: every system trained for the same time, on the same patients, with the same scores.

Each system's epochs follow from its own speed, measured first, so that all take --minutes of training. ATFM
shares them between GTR and the flow; GTR alone, act-gtr, has them all. Test images are scored once. Intervals
resample training runs and patients together. Systems that sample in many steps take --steps of them. What is
done already is not repeated:

    python -m tests.benchmarks.table1 --data_path <lidc .h5 file or pickle folder> --seeds 0 1 2
    python -m tests.benchmarks.table1 --what isic3_demo --crop 48 --seeds 0 1 2
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import fig
import test_prior_ISIC
import test_prior_LIDC
import train_GTR
import train_prior_ISIC
import train_prior_LIDC
from data import load
from metadata_manager import BASELINES, FLOWS, Metadata, parse
from metrics import two_level_interval, write_text
from models.processes import one_line_errors

SCRIPTS = {"lidc": (train_prior_LIDC, test_prior_LIDC), "isic3": (train_prior_ISIC, test_prior_ISIC)}
OPTIMIZER = "--lr 1e-3 --schedule cosine --ema 0.999 --clip 1".split()
GTR = "--batchsize 32 --num_filters 16 32 64".split()
FLOW = "--preset best --experts one --batch_size 8 --dim 16 --dim_mults 1 2 4 --time_scale 10".split()
FLOW += "--weight_standardization none".split()
GTR_SHARE = 1 / 3  # of ATFM's time
LONG = ("ccdm", "ab", "cimd")  # diffusions, whose own numbers of steps a CPU does not have time for
SCORES = ("GED16", "HM-IoU16")
SPEED = "speed/images_per_second"


def epochs_for(train: Any, name: str, epochs: str, flags: Sequence[str], folder: Path, images: int,
               minutes: float) -> int:
    """How many epochs of `images` images a training script does in a time, by its speed in a short run."""
    if not (folder / name).exists():
        train.main([*flags, epochs, "1", "--limit", "320", "--output_path", str(folder)])
    (_, (speed,)) = fig.read_scalars(folder / name)[SPEED]
    return max(1, round(60 * minutes * speed / images))


def train_all(arguments: argparse.Namespace, common: Sequence[str], seed: int, images: int, train_prior: Any
              ) -> Path:
    """Trains GTR for a share of the time and for all of it, and each system; returns the folder."""
    root, folder = arguments.output_path, arguments.output_path / f"seed{seed}"
    seeded = [*common, "--seed", str(seed)]
    gtr = [*seeded, *GTR, *OPTIMIZER, "--val_images", "8"]
    for share, place in ((GTR_SHARE, folder), (1.0, folder / "long")):
        count = epochs_for(train_GTR, "GTR", "--epochs", gtr, root / "speed", images,
                           arguments.minutes * share)
        train_GTR.main([*gtr, "--epochs", str(count), "--validate_every", str(count), "--output_path",
                        str(place)])
    for method in arguments.methods:
        share = 1 - GTR_SHARE if method in FLOWS else 1.0
        flags = [*seeded, *FLOW, *OPTIMIZER, "--method", method, "--val_images", "8", "--val_steps", "2",
                 "--gtr", str(folder)]
        count = epochs_for(train_prior, method, "--num_epochs", flags, root / "speed", images,
                           arguments.minutes * share)
        train_prior.main([*flags, "--num_epochs", str(count), "--validate_every", str(count),
                          "--output_path", str(folder)])
    return folder


def test_all(arguments: argparse.Namespace, common: Sequence[str], folder: Path, test_prior: Any
             ) -> dict[str, Any]:
    """results.json of all systems of a seed, put together from its tests."""
    flags = [*common, "--samples", "16", "--seeds", "0", "--limit", str(arguments.limit)]
    quick = [method for method in arguments.methods if method not in LONG]
    tests = {folder: ["--methods", "act-gtr-emptied", *quick], folder / "long": ["--methods", "act-gtr"]}
    for method in (one for one in arguments.methods if one in LONG):
        tests[folder / "steps" / method] = ["--methods", method, "--prior", str(folder / method), "--steps",
                                            str(arguments.steps)]
    found: dict[str, Any] = {}
    for place, chosen in tests.items():
        if not (place / "test" / "results.json").exists():
            test_prior.main([*flags, *chosen, "--report_images", "0", "--output_path", str(place)])
        one = json.loads((place / "test" / "results.json").read_text())
        found = {**one, "systems": {**found.get("systems", {}), **one["systems"]}}
    return found


def table(runs: dict[int, dict[str, Any]]) -> str:
    """Markdown: means over runs and images, and the difference from ATFM with its interval."""
    patients = next(iter(runs.values()))["groups"]
    names = [*SCORES, "empty", *(f"{score} minus atfm" for score in SCORES)]
    lines = [f"| system | runs | parameters | evaluations | {' | '.join(names)} |",
             "|---" * (4 + len(names)) + "|"]

    def values(name: str, score: str) -> np.ndarray:
        return np.array([run["systems"][name]["scores"][score][0] for run in runs.values()])

    for name, one in next(iter(runs.values()))["systems"].items():
        cells = [name, str(len(runs)), f"{one['parameters']:,}", str(one["evaluations"])]
        cells += [f"{values(name, score).mean():.3f}" for score in SCORES]
        cells.append(f"{values(name, 'Empty').mean():.2f}")
        for score in SCORES:
            mean, low, high = two_level_interval(values(name, score) - values("atfm", score), patients)
            cells.append("" if name == "atfm" else f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(flags: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", default="LIDC", help="data set")
    parser.add_argument("--data_path", help="where it lies, if not at metadata_manager.PATHS")
    parser.add_argument("--output_path", type=Path, default=Path("runs/table1"), help="a folder per seed")
    parser.add_argument("--crop", default="32", help="centre crop, pixels per side")
    parser.add_argument("--minutes", type=float, default=4, help="of training, of each system and seed")
    parser.add_argument("--steps", type=int, default=25, help=f"of {', '.join(LONG)} in testing")
    parser.add_argument("--limit", type=int, default=60, help="test images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training")
    parser.add_argument("--methods", nargs="+", choices=[*FLOWS, *BASELINES],
                        default=["ssn", "prob-unet", "phiseg", "mose", *LONG, "flow-ssn", "atfm"])
    arguments = parser.parse_args(flags)
    common = ["--what", arguments.what, "--crop", arguments.crop]
    common += ["--data_path", arguments.data_path] if arguments.data_path else []
    (metadata,) = parse(common, "LIDC", __doc__, Metadata)
    train_prior, test_prior = SCRIPTS[metadata.reader]
    images = len(load(metadata, "train"))
    for seed in arguments.seeds:
        folder = train_all(arguments, common, seed, images, train_prior)
        test_all(arguments, common, folder, test_prior)
    runs = {seed: test_all(arguments, common, arguments.output_path / f"seed{seed}", test_prior)
            for seed in arguments.seeds}
    text = table(runs)
    write_text(arguments.output_path / "table.md", text)
    print(text)


if __name__ == "__main__":
    with one_line_errors():
        main()
