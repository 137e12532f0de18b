"""What gains, and how ATFM compares: systems trained for the same time on the same patients of LIDC.

A row is a system or one change of it. Each of its training runs is scored on validation and on test patients
and leaves one small file, tests/benchmarks/results/<size>/<row>-<seed>.json.gz: scores of every image,
configuration, commit, hardware and seconds. A run that has its file is not repeated; weights may be lost,
results not. The same command in a second terminal works beside the first: a run is claimed by one process.
About 9 minutes a run and seed on one core:

    python -m tests.benchmarks.study run --data_path <lidc .h5 file> --size 32 --seeds 0 1 2
    python -m tests.benchmarks.study tables --output docs/results.md

`tables` writes every table between its markers in a document, from the files alone.
"""

import argparse
import fcntl
import gzip
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

import train_GTR
import train_prior_LIDC
from data import load
from metadata_manager import EvaluationConfig, Metadata, RunConfig
from metrics import control, evaluate, two_level_interval, write_text
from metrics.floor import floor
from metrics.program import one_line_errors
from metrics.provenance import commit
from models import load_systems
from models.flags import experiment
from tests.benchmarks import measure

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
EXPERTS = 4  # of LIDC
IMAGES = {"validation": 200, "test": 240}  # evenly spaced over the split, so of all its patients
SAMPLES = 16
KEPT = ("GED16", "HM-IoU16", "Diversity16", "Empty", "Experts empty", "Experts' diversity", "Size")
CPU = torch.device("cpu")
# The same optimizer for all; sizes for a CPU.
OPTIMIZER = "--lr 1e-3 --schedule cosine --val_images 8"
GTR = f"{OPTIMIZER} --ema 0.99 --batchsize 8 --num_filters 16 32 64"
FLOW = f"{OPTIMIZER} --ema 0.999 --clip 1 --dim 16 --val_steps 1"
SYSTEM = f"{FLOW} --batch_size 8 --dim_mults 1 2 4 --weight_decay 0"


@dataclass(frozen=True)
class Stage:
    """A training step of a row: its script, its flags, and its share of the row's time."""

    script: Any
    flags: str
    share: float = 1.0

    @property
    def epochs_flag(self) -> str:
        return "--epochs" if self.script is train_GTR else "--num_epochs"


@dataclass(frozen=True)
class Row:
    """A system: how it is trained, which of a test's --methods it is, and what it is shown for.

    like: the row whose training it shares, with other flags of sampling, `temperature`."""

    title: str
    stages: tuple[Stage, ...]
    method: str = "act-gtr"
    preset: str = "paper"
    steps: int | None = None
    like: str | None = None
    temperature: float | None = None


def _gtr(flags: str, share: float = 1.0) -> Stage:
    return Stage(train_GTR, f"{GTR} {flags}", share)


def _atfm(flags: str) -> Stage:
    return Stage(train_prior_LIDC, f"{FLOW} {flags}", 2 / 3)


FLIPS = "--dihedral True"


def _rival(method: str, flags: str = FLIPS) -> Row:
    return Row(method, (Stage(train_prior_LIDC, f"--method {method} {SYSTEM} {flags}"),), method)


ROWS = {
    "nll": Row("Act. GTR, Eq. 5", (_gtr(""),)),
    "nll-flips": Row("Act. GTR, Eq. 5, images flipped and turned", (_gtr(FLIPS),)),
    "best": Row("Act. GTR (best)", (_gtr("--preset best"),), preset="best"),
    "best-no-flips": Row("best, images as they are", (_gtr("--preset best --dihedral False"),),
                         preset="best"),
    "best-temperature-1": Row("best without temperature", (), preset="best", like="best", temperature=1.0),
    "best-m-8": Row("best with m = 8", (_gtr("--preset best --mc_samples 8"),), preset="best"),
    "best-nll-all": Row("best without the energy score", (_gtr("--preset best --loss nll --mc_samples 20"),),
                        preset="best"),
    "best-no-nll": Row("best without Eq. 5 at first", (_gtr("--preset best --nll_first 0"),), preset="best"),
    "best-wide": Row("best, twice as wide", (_gtr("--preset best --num_filters 32 64 128"),), preset="best"),
    "atfm": Row("ATFM, paper", (_gtr("", 1 / 3), _atfm("--batch_size 2")), "atfm", steps=25),
    "atfm-best": Row("ATFM (best), 2 NFE",
                     (_gtr("--preset best", 1 / 3), _atfm("--preset best --batch_size 8")),
                     "atfm", preset="best", steps=2),
    "mose-no-flips": replace(_rival("mose", ""), title="mose, images as they are"),
    **{name: _rival(name) for name in ("ssn", "prob-unet", "prob-unet-energy", "phiseg", "flow-ssn", "mose")},
}


@contextmanager
def claimed(folder: Path):
    """Whether this process may work in a folder: nobody else does while the block runs."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "claim", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def cpu_seconds(call: Callable[[], Any]) -> float:
    """Of this process's CPU, which other processes on the machine hardly alter."""
    start = time.process_time()
    call()
    return time.process_time() - start


def seconds_per_epoch(stage: Stage, common: Sequence[str], images: int, folder: Path, gtr: Sequence[str]
                      ) -> float:
    """CPU seconds of an epoch, from runs of one and of three epochs on 320 images."""
    def run(epochs: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        stage.script.main([*common, *stage.flags.split(), *gtr, stage.epochs_flag, str(epochs),
                           "--limit", "320", "--validate_every", "9", "--output_path", str(folder)])

    short, long = cpu_seconds(lambda: run(1)), cpu_seconds(lambda: run(3))
    return (long - short) / 2 * images / 320


def train(row: Row, seed: int, minutes: float, common: Sequence[str], folder: Path, images: int,
          epochs_of: Mapping[str, int]) -> dict[str, Any]:
    """Trains a row's stages on `images` images for `minutes` of CPU time together; what each took.

    epochs_of: a script's name -> the epochs that another seed of the row was trained for: all seeds have the
    same number, however busy the machine is."""
    done: dict[str, Any] = {}
    for stage in row.stages:
        gtr = [] if stage.script is train_GTR or len(row.stages) == 1 else ["--gtr", str(folder)]
        plan = folder / f"{stage.script.__name__}.json"
        if stage.script.__name__ in epochs_of:
            plan.write_text(json.dumps(epochs_of[stage.script.__name__]))
        if not plan.exists():
            each = seconds_per_epoch(stage, common, images, folder / "speed", gtr)
            plan.write_text(json.dumps(max(1, round(60 * minutes * stage.share / each))))
        epochs = str(json.loads(plan.read_text()))
        flags = [*common, *stage.flags.split(), *gtr, "--seed", str(seed), stage.epochs_flag, epochs,
                 "--validate_every", epochs, "--output_path", str(folder)]
        seconds = cpu_seconds(partial(stage.script.main, flags))
        done[stage.script.__name__] = {"flags": flags[len(common):], "epochs": int(epochs),
                                       "cpu_seconds": seconds}
    return done


def score(row: Row, metadata: Metadata, folder: Path) -> dict[str, Any]:
    """Scores of the trained system, by split: what each image has, and what samples cost."""
    config = EvaluationConfig(methods=(row.method,), steps=() if row.steps is None else (row.steps,))
    found: dict[str, Any] = {}
    for split, count in IMAGES.items():
        images = load(metadata, "val" if split == "validation" else "test").spread(count)
        of_control = partial(control, validation=lambda: load(metadata, "val").spread(200), device=CPU)
        system, = load_systems(config, metadata, RunConfig(output_path=str(folder), preset=row.preset), CPU,
                               of_control, images)
        sample = system.sample
        if row.temperature is not None:
            sample.__self__.temperature = row.temperature
        start = time.process_time()
        result = evaluate(sample, images, (SAMPLES,), device=CPU)
        seconds = time.process_time() - start
        found[split] = {
            "ids": list(result.ids), "groups": [str(patient) for patient in images.patients],
            "scores": {name: np.round(result.scores[name][0], 5).tolist() for name in KEPT},
            "seconds_per_100": 100 * seconds / SAMPLES / len(images)}
        found |= {"nfe": system.nfe, "parameters": system.parameters, "training": system.training}
    return found


def metadata_of(arguments: argparse.Namespace) -> Metadata:
    """LIDC at the size of the command line."""
    return replace(experiment("LIDC").metadata, data_path=arguments.data_path, crop=arguments.size)


def run(arguments: argparse.Namespace) -> None:
    """Every row and seed that has no file yet."""
    common = ["--data_path", arguments.data_path, "--crop", str(arguments.size), "--device", "cpu"]
    metadata = metadata_of(arguments)
    for seed in arguments.seeds:
        for name in arguments.rows:
            row = ROWS[name]
            output = RESULTS / str(arguments.size) / f"{name}-{seed}.json.gz"
            folder = arguments.output_path / str(arguments.size) / f"{row.like or name}-{seed}"
            with claimed(folder) as mine:
                if output.exists() or not mine:
                    continue
                others = read_results(arguments.size).get(row.like or name, {})
                epochs_of = {script: stage["epochs"] for run in others.values()
                             for script, stage in run["stages"].items()}
                trained = train(ROWS[row.like] if row.like else row, seed, arguments.minutes, common, folder,
                                len(load(metadata, "train")), epochs_of)
                content = {"row": name, "seed": seed, "size": arguments.size, "minutes": arguments.minutes,
                           "commit": commit(), "machine": measure.machine(CPU), "stages": trained,
                           **score(row, metadata, folder)}
                output.parent.mkdir(parents=True, exist_ok=True)
                temporary = output.with_suffix(".part")
                text = json.dumps(content)  # without where files lie on this machine
                for place in (Path(arguments.data_path).parent, arguments.output_path.parent):
                    text = text.replace(f"{place}/", "") if place.is_absolute() else text
                temporary.write_bytes(gzip.compress(text.encode(), mtime=0))
                temporary.rename(output)
                print(f"{output}: written", flush=True)


Results = dict[int, dict[str, Any]]  # seed -> content of a run's file
TABLES = {  # name of a table -> its size and rows, the first of which is what the others are compared with
    "gains-32": (32, ("nll", "nll-flips", "best-nll-all", "best", "best-temperature-1", "best-m-8",
                      "best-no-nll", "best-no-flips", "best-wide")),
    "systems-32": (32, ("nll", "ssn", "prob-unet", "phiseg", "flow-ssn", "mose", "mose-flips", "atfm",
                        "atfm-best", "best")),
    "gains-48": (48, ("nll", "best", "mose", "atfm")),
}
SHOWN = ("GED16", "HM-IoU16")


def read_results(size: int) -> dict[str, Results]:
    """The runs of each row that have a file at a size."""
    runs: dict[str, Results] = {}
    for path in sorted((RESULTS / str(size)).glob("*.json.gz")):
        content = json.loads(gzip.decompress(path.read_bytes()))
        runs.setdefault(content["row"], {})[content["seed"]] = content
    return runs


def scores_of(results: Results, seeds: Sequence[int], split: str, score: str) -> np.ndarray:
    """A score of every image, (seeds, images)."""
    return np.array([results[seed][split]["scores"][score] for seed in seeds])


def table(size: int, rows: Sequence[str]) -> str:
    """Markdown: means over runs and images, and the difference from the first row, over runs and patients.

    Differences are of the seeds that both rows have, with 95 % intervals. A row without a file says that it
    was not run."""
    results = read_results(size)
    against = rows[0]
    head = ["system", "runs", "CPU min", "NFE", "GED16", "HM-IoU16", "empty",
            *(f"{score} minus {ROWS[against].title}" for score in SHOWN), "validation GED16", "HM-IoU16"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in rows:
        if name not in results:
            lines.append(f"| {ROWS[name].title} | not run |{' |' * (len(head) - 2)}")
            continue
        runs = results[name]
        seeds = sorted(runs)
        first = runs[seeds[0]]
        seconds = [sum(stage["cpu_seconds"] for stage in run["stages"].values()) for run in runs.values()]
        minutes = np.mean(seconds) / 60
        cells = [ROWS[name].title, str(len(seeds)), f"{minutes:.1f}", str(first["nfe"])]
        cells += [f"{scores_of(runs, seeds, 'test', score).mean():.3f}" for score in SHOWN]
        cells.append(f"{scores_of(runs, seeds, 'test', 'Empty').mean():.2f}")
        both = [seed for seed in seeds if seed in results.get(against, {})]
        for score in SHOWN:
            if name == against or not both:
                cells.append("")
                continue
            difference = (scores_of(runs, both, "test", score)
                          - scores_of(results[against], both, "test", score))
            mean, low, high = two_level_interval(difference, first["test"]["groups"])
            cells.append(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
        cells += [f"{scores_of(runs, seeds, 'validation', score).mean():.3f}" for score in SHOWN]
        lines.append(f"| {' | '.join(cells)} |")
    known = next((run for runs in results.values() for run in runs.values()), None)
    if known is not None:
        least = {split: floor(np.array(known[split]["scores"]["Experts' diversity"]), np.array(EXPERTS),
                              SAMPLES).mean() for split in IMAGES}
        empty = np.mean(known["test"]["scores"]["Experts empty"])
        lines.append(f"| perfect sampler (independent readers) | | | | {least['test']:.3f} | | {empty:.2f} | "
                     f"| | {least['validation']:.3f} | |")
    return "\n".join(lines) + "\n"


def each_run(size: int, row: str, against: str) -> str:
    """Markdown: a row minus another in each training run, over patients; and in all, over both."""
    results = read_results(size)
    both = sorted(results.get(row, {}).keys() & results.get(against, {}).keys())
    lines = [f"| seed | {' | '.join(f'{score}, {split}' for split in IMAGES for score in SHOWN)} |",
             "|---" * (1 + 2 * len(IMAGES)) + "|"]
    for title, seeds in {**{str(seed): [seed] for seed in both}, "all": both}.items():
        cells = [title]
        for split, score in product(IMAGES, SHOWN):
            if not seeds:
                continue
            difference = (scores_of(results[row], seeds, split, score)
                          - scores_of(results[against], seeds, split, score))
            mean, low, high = two_level_interval(difference, results[row][seeds[0]][split]["groups"])
            cells.append(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_tables(document: Path) -> None:
    """Replaces what stands between `<!-- table: NAME -->` and `<!-- end -->` in a document."""
    made = {name: table(size, rows) for name, (size, rows) in TABLES.items()}
    made |= {f"each-run-{size}": each_run(size, "best", "nll-flips") for size in (32, 48)}

    def replaced(match: re.Match) -> str:
        if match[1] not in made:
            raise ValueError(f"{document}: table {match[1]}: unknown; expected one of {', '.join(made)}")
        return f"<!-- table: {match[1]} -->\n{made[match[1]]}<!-- end -->"

    text = re.sub(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", replaced, document.read_text(), flags=re.S)
    write_text(document, text)
    print(f"{document}: tables written")


def main(flags: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    train_and_test = commands.add_parser("run", help="train and score what has no file yet")
    train_and_test.add_argument("--data_path", required=True,
                                help="LIDC: an .h5 file or the folder of pickles")
    train_and_test.add_argument("--size", type=int, default=32, help="centre crop, pixels per side")
    train_and_test.add_argument("--minutes", type=float, default=6.5,
                                help="of a core, of each row's training")
    train_and_test.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training")
    train_and_test.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW",
                                help=f"which of {', '.join(ROWS)}")
    train_and_test.add_argument("--output_path", type=Path, default=Path("runs/study"), help="for weights")
    tables = commands.add_parser("tables", help="write the tables of a document from the files")
    tables.add_argument("--output", type=Path, default=Path("docs/results.md"), help="the document")
    arguments = parser.parse_args(flags)
    if arguments.command == "run":
        run(arguments)
    else:
        write_tables(arguments.output)


if __name__ == "__main__":
    with one_line_errors():
        main()
