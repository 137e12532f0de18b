"""Table 1, small: every system trained for the same time, on the same patients, with the same scores.

Each system's epochs follow from its own speed, measured first, so that all take --minutes of training, as far
as whole epochs do. ATFM shares them between GTR and the flow; GTR alone, act-gtr, has them all. Test images
are scored once. Intervals resample training runs and patients together. Systems that sample in many steps
take --steps of them. What is done already is not repeated:

    python -m tests.benchmarks.table1 --data_path <lidc .h5 file or pickle folder> --seeds 0 1 2
    python -m tests.benchmarks.table1 --what isic3_demo --crop 48 --seeds 0 1 2
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
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
from models.baselines import CLASSES
from models.baselines.stepwise import Stepwise
from models.processes import one_line_errors

SCRIPTS = {"lidc": (train_prior_LIDC, test_prior_LIDC), "isic3": (train_prior_ISIC, test_prior_ISIC)}
OPTIMIZER = "--lr 1e-3 --schedule cosine --ema 0.999 --clip 1".split()
GTR = "--batchsize 8 --num_filters 16 32 64".split()
SYSTEM = "--batch_size 8 --dim 16 --dim_mults 1 2 4 --weight_decay 0".split()
GTR_SHARE = 1 / 3  # of ATFM's time
LONG = ("ccdm", "ab", "cimd")  # diffusions, whose own numbers of steps a CPU does not have time for
SCORES = ("GED16", "HM-IoU16")
SPEED = "speed/images_per_second"


@dataclass(frozen=True)
class Training:
    """A run of a training script: its folder, its flags, its share of the time, its flag of epochs."""

    script: Any
    name: str
    flags: Sequence[str]
    share: float
    epochs: str

    def speed(self, folder: Path) -> float:
        """Images per second, by a short run into a folder."""
        self.script.main([*self.flags, self.epochs, "1", "--limit", "320", "--output_path", str(folder)])
        (_, (found,)) = fig.read_scalars(folder / self.name)[SPEED]
        return found

    def run(self, folder: Path, count: int, *more: str) -> None:
        """Trains for a number of epochs, validated at the end, into `folder`."""
        self.script.main([*self.flags, self.epochs, str(count), "--validate_every", str(count), *more,
                          "--output_path", str(folder)])


def trainings(methods: Sequence[str], common: Sequence[str], train_prior: Any) -> list[Training]:
    """GTR for a share of the time and for all of it, and each system."""
    gtr = [*common, *GTR, *OPTIMIZER, "--val_images", "8"]
    found = [Training(train_GTR, "GTR", gtr, share, "--epochs") for share in (GTR_SHARE, 1.0)]
    for method in methods:
        flags = [*common, *SYSTEM, *OPTIMIZER, "--method", method, "--val_images", "8", "--val_steps", "2"]
        share = 1.0
        if method in FLOWS:
            flags, share = [*flags, "--preset", "best"], 1 - GTR_SHARE
        elif issubclass(CLASSES[method], Stepwise):  # as the flow has it
            flags += ["--weight_standardization", "none"]
        found.append(Training(train_prior, method, flags, share, "--num_epochs"))
    return found


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


def table(runs: dict[int, dict[str, Any]], seconds: dict[str, float]) -> str:
    """Markdown: means over runs and images, and the difference from ATFM with its interval.

    seconds: of training, by system."""
    patients = next(iter(runs.values()))["groups"]
    names = [*SCORES, "empty", *(f"{score} minus atfm" for score in SCORES)]
    lines = [f"| system | runs | training, s | parameters | NFE | {' | '.join(names)} |",
             "|---" * (5 + len(names)) + "|"]

    def values(name: str, score: str) -> np.ndarray:
        return np.array([run["systems"][name]["scores"][score][0] for run in runs.values()])

    for name, one in next(iter(runs.values()))["systems"].items():
        cells = [name, str(len(runs)), f"{seconds[name]:.0f}", f"{one['parameters']:,}",
                 str(one["nfe"])]
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
    if "atfm" not in arguments.methods:
        parser.error("--methods: atfm is missing, from which the others' difference is taken")
    common = ["--what", arguments.what, "--crop", arguments.crop]
    common += ["--data_path", arguments.data_path] if arguments.data_path else []
    (metadata,) = parse(common, "LIDC", __doc__, Metadata)
    train_prior, test_prior = SCRIPTS[metadata.reader]
    root, images = arguments.output_path, len(load(metadata, "train"))
    planned = trainings(arguments.methods, common, train_prior)
    epoch = [images / one.speed(root / "speed") for one in planned]  # seconds
    counts = [max(1, round(60 * arguments.minutes * one.share / each)) for one, each in zip(planned, epoch)]
    gtr_of_atfm, gtr_alone, *others = (count * each for count, each in zip(counts, epoch))
    seconds = {"act-gtr": gtr_alone, "act-gtr-emptied": gtr_of_atfm}
    for one, spent in zip(planned[2:], others):
        seconds[one.name] = spent + (gtr_of_atfm if one.name in FLOWS else 0)
    for seed in arguments.seeds:
        folder = root / f"seed{seed}"
        for one, count in zip(planned, counts):
            long = one.name == "GTR" and one.share == 1
            gtr = [] if one.name == "GTR" else ["--gtr", str(folder)]
            one.run(folder / "long" if long else folder, count, "--seed", str(seed), *gtr)
        test_all(arguments, common, folder, test_prior)
    runs = {seed: test_all(arguments, common, root / f"seed{seed}", test_prior)
            for seed in arguments.seeds}
    text = table(runs, seconds)
    write_text(root / "table.md", text)
    print(text)


if __name__ == "__main__":
    with one_line_errors():
        main()
