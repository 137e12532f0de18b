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
from models.gtr import sample_with_tta
from models.systems import Sampler
from tests.benchmarks import measure

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
EXPERTS = 4  # of LIDC
IMAGES = {"validation": 200, "test": 240}  # evenly spaced over the split, so of all its patients
SAMPLES = 16
SEEDS = 5  # runs of sampling of what draws at once, to be averaged: one alone moves GED16 by 0.004
SHOWN = ("GED16", "HM-IoU16")
OF_MORE = ("GED32", "GED100", "HM-IoU32", "MDM32")  # from LARGE on, of systems that draw at once
KEPT = (*SHOWN, *OF_MORE, "Diversity16", "Empty", "Experts empty", "Experts' diversity", "Size")
CPU = torch.device("cpu")
EPOCHS = 43  # of the row `best`; the other rows have as many as take the same time
LARGE = 64  # pixels per side, from which on the U-Nets have a fourth level
# The same optimizer for all; sizes for a CPU, in the papers' proportions.
OPTIMIZER = "--lr 1e-3 --schedule cosine --val_images 8"
GTR = f"{OPTIMIZER} --ema 0.99 --batchsize 8 --num_filters 16 32 64 {{fourth_filters}}"
FLOW = f"{OPTIMIZER} --ema 0.999 --clip 1 --dim 16 --val_steps 1"
SYSTEM = f"{FLOW} --batch_size 8 --dim_mults 1 2 4 {{fourth_mult}} --weight_decay 0"


@dataclass(frozen=True)
class Stage:
    """A training step of a row: its script, its flags, and its part of the row's time.

    epochs: None: as many as take that time."""

    script: Any
    flags: str
    share: float = 1.0
    epochs: int | None = None

    def flags_at(self, size: int) -> list[str]:
        """Its flags for images of size x size pixels."""
        filters, mult = ("96", "6") if size >= LARGE else ("", "")
        return self.flags.format(fourth_filters=filters, fourth_mult=mult).split()

    @property
    def epochs_flag(self) -> str:
        return "--epochs" if self.script is train_GTR else "--num_epochs"


@dataclass(frozen=True)
class Row:
    """A system: how it is trained, which of a test's --methods it is, and what it is shown for.

    like: the row whose training it shares; resampled: makes another sampler of that row's."""

    title: str
    stages: tuple[Stage, ...]
    method: str = "act-gtr"
    preset: str = "paper"
    steps: int | None = None
    like: str | None = None
    resampled: Callable[[Sampler], Sampler] | None = None


def _gtr(flags: str, share: float = 1.0) -> Stage:
    # Any loss and any images take this network equally long.
    return Stage(train_GTR, f"{GTR} {flags}", share, round(EPOCHS * share))


def _atfm(flags: str) -> Stage:
    return Stage(train_prior_LIDC, f"{FLOW} {flags}", 2 / 3)


def _gtr_with(**settings: Any) -> Callable[[Sampler], Sampler]:
    """The sampler of a GTR -> that of the same GTR with other settings of sampling."""
    def changed(sample: Sampler) -> Sampler:
        for name, value in settings.items():
            setattr(sample.__self__, name, value)  # type: ignore[attr-defined]
        return sample
    return changed


FLIPS = "--dihedral True"


def _rival(method: str, flags: str = FLIPS) -> Row:
    return Row(method, (Stage(train_prior_LIDC, f"--method {method} {SYSTEM} {flags}"),), method)


ROWS = {
    "nll": Row("Act. GTR, Eq. 5", (_gtr(""),)),
    "nll-flips": Row("Act. GTR, Eq. 5, images flipped and turned", (_gtr(FLIPS),)),
    "best": Row("Act. GTR (best)", (_gtr("--preset best"),), preset="best"),
    "best-temperature-1": Row("best without temperature", (), preset="best", like="best",
                              resampled=_gtr_with(temperature=1.0)),
    "best-no-tta": Row("best without test-time augmentation", (), preset="best", like="best",
                       resampled=_gtr_with(tta=False)),
    "best-no-flips": Row("best, images not flipped and turned", (_gtr("--preset best --dihedral False"),),
                         preset="best"),
    "best-nll-all": Row("best without the energy score", (_gtr("--preset best --loss nll --mc_samples 20"),),
                        preset="best"),
    "best-no-nll": Row("best without Eq. 5 at first", (_gtr("--preset best --nll_first 0"),), preset="best"),
    "atfm": Row("ATFM, paper", (_gtr("", 1 / 3), _atfm("--batch_size 2")), "atfm", steps=25),
    "atfm-best": Row("ATFM (best), 2 NFE",
                     (_gtr("--preset best", 1 / 3), _atfm("--preset best --batch_size 8")),
                     "atfm", preset="best", steps=2),
    "mose-tta": Row("mose, with test-time augmentation", (), "mose", like="mose",
                    resampled=lambda sample: partial(sample_with_tta, sample)),
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


def seconds_per_epoch(stage: Stage, size: int, common: Sequence[str], images: int, folder: Path,
                      gtr: Sequence[str]) -> float:
    """CPU seconds of an epoch, from runs of one and of three epochs on 320 images."""
    def run(epochs: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        stage.script.main([*common, *stage.flags_at(size), *gtr, stage.epochs_flag, str(epochs),
                           "--limit", "320", "--validate_every", "9", "--output_path", str(folder)])

    short, long = cpu_seconds(lambda: run(1)), cpu_seconds(lambda: run(3))
    return (long - short) / 2 * images / 320


def equal_epochs(stage: Stage, size: int, common: Sequence[str], images: int, folder: Path,
                 gtr: Sequence[str]) -> int:
    """As many epochs as take the time of the stage's part of EPOCHS epochs of `best`.

    The two are measured in turn, twice, since other processes slow both down."""
    reference, = ROWS["best"].stages
    ratios = [seconds_per_epoch(reference, size, common, images, folder, [])
              / seconds_per_epoch(stage, size, common, images, folder, gtr) for _ in range(2)]
    return max(1, round(EPOCHS * stage.share * float(np.mean(ratios))))


def train(row: Row, seed: int, size: int, common: Sequence[str], folder: Path, images: int,
          epochs_of: Mapping[str, int]) -> dict[str, Any]:
    """Trains a row's stages on `images` images; what each took.

    epochs_of: a script's name -> the epochs of another seed of the row: all seeds have the same number."""
    done: dict[str, Any] = {}
    for stage in row.stages:
        script = stage.script.__name__
        gtr = [] if stage.script is train_GTR or len(row.stages) == 1 else ["--gtr", str(folder)]
        plan = folder / f"{script}.json"
        if not plan.exists():
            epochs = stage.epochs or epochs_of.get(script) or equal_epochs(stage, size, common, images,
                                                                           folder / "speed", gtr)
            plan.write_text(json.dumps(epochs))
        epochs = json.loads(plan.read_text())
        flags = [*common, *stage.flags_at(size), *gtr, "--seed", str(seed), stage.epochs_flag, str(epochs),
                 "--validate_every", str(epochs), "--output_path", str(folder)]
        seconds = cpu_seconds(partial(stage.script.main, flags))
        done[script] = {"flags": flags[len(common):], "epochs": epochs, "cpu_seconds": seconds}
    return done


def score(row: Row, metadata: Metadata, folder: Path) -> dict[str, Any]:
    """Scores of the trained system, by split: what each image has, and what samples cost."""
    config = EvaluationConfig(methods=(row.method,), steps=() if row.steps is None else (row.steps,))
    record: dict[str, Any] = {}
    for split, count in IMAGES.items():
        images = load(metadata, "val" if split == "validation" else "test").spread(count)
        of_control = partial(control, validation=lambda: load(metadata, "val").spread(200), device=CPU)
        system, = load_systems(config, metadata, RunConfig(output_path=str(folder), preset=row.preset), CPU,
                               of_control, images)
        sample = row.resampled(system.sample) if row.resampled else system.sample
        # 100 samples of a flow, or five times 16, would take longer than its training.
        at_once = system.nfe <= 1
        samples = (SAMPLES, 32, 100) if metadata.side >= LARGE and at_once else (SAMPLES,)
        seeds = range(SEEDS if at_once else 1)
        start = time.process_time()
        result = evaluate(sample, images, samples, seeds, CPU)
        seconds = time.process_time() - start
        record[split] = {
            "ids": list(result.ids), "groups": [str(patient) for patient in images.patients],
            "scores": {name: np.round(result.scores[name].mean(0), 5).tolist()
                       for name in KEPT if name in result.scores},
            "seconds_per_100": 100 * seconds / max(samples) / len(seeds) / len(images)}
        record |= {"nfe": system.nfe, "parameters": system.parameters, "training": system.training}
    return record


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
                trained = train(ROWS[row.like] if row.like else row, seed, arguments.size, common, folder,
                                len(load(metadata, "train")), epochs_of)
                if row.like and seed in others:  # it was trained there, and took no time here
                    trained = others[seed]["stages"]
                content = {"row": name, "seed": seed, "size": arguments.size,
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
TABLES = {  # name of a table -> its size, its rows, and the row that is compared with the others
    "gains-32": (32, ("nll", "nll-flips", "best-nll-all", "best-no-nll", "best-no-flips", "best-no-tta",
                      "best-temperature-1", "best"), "best"),
    "systems-32": (32, ("nll", "ssn", "prob-unet", "prob-unet-energy", "phiseg", "flow-ssn", "mose",
                        "mose-tta", "atfm", "atfm-best", "best"), "best"),
    "systems-48": (48, ("nll-flips", "mose", "atfm", "best"), "best"),
}


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


def difference(ours: Results, other: Results, seeds: Sequence[int], split: str, score: str) -> str:
    """Ours minus the other over the same training seeds and images, with its 95 % interval over both."""
    values = scores_of(ours, seeds, split, score) - scores_of(other, seeds, split, score)
    mean, low, high = two_level_interval(values, ours[seeds[0]][split]["groups"])
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def table(results: Mapping[str, Results], rows: Sequence[str], ours: str) -> str:
    """Markdown: means over runs and images; the row `ours` minus each other, over runs and patients.

    Differences are of the test images and of the seeds that both rows have, with 95 % intervals. A row
    without a file says that it was not run."""
    more = [score for score in OF_MORE
            if any(score in run["test"]["scores"] for runs in results.values() for run in runs.values())]
    head = ["system", "runs", "epochs", "NFE", "s per 100", *SHOWN, *more, "empty",
            *(f"best minus it: {score}" for score in SHOWN), "validation GED16", "HM-IoU16"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in rows:
        if name not in results:
            lines.append(f"| {ROWS[name].title} | not run |{' |' * (len(head) - 2)}")
            continue
        runs = results[name]
        seeds = sorted(runs)
        first = runs[seeds[0]]
        epochs = " + ".join(str(stage["epochs"]) for stage in first["stages"].values())
        cells = [ROWS[name].title, str(len(seeds)), epochs, str(first["nfe"]),
                 f"{np.mean([run['test']['seconds_per_100'] for run in runs.values()]):.2g}"]
        cells += [f"{scores_of(runs, seeds, 'test', score).mean():.3f}"
                  if score in first["test"]["scores"] else "-" for score in (*SHOWN, *more)]
        cells.append(f"{scores_of(runs, seeds, 'test', 'Empty').mean():.2f}")
        both = [seed for seed in seeds if seed in results.get(ours, {})]
        cells += ["" if name == ours or not both else difference(results[ours], runs, both, "test", score)
                  for score in SHOWN]
        cells += [f"{scores_of(runs, seeds, 'validation', score).mean():.3f}" for score in SHOWN]
        lines.append(f"| {' | '.join(cells)} |")
    known = next((run for runs in results.values() for run in runs.values()), None)
    if known is not None:
        least = {split: floor(np.array(known[split]["scores"]["Experts' diversity"]), np.array(EXPERTS),
                              SAMPLES).mean() for split in IMAGES}
        empty = np.mean(known["test"]["scores"]["Experts empty"])
        cells = ["perfect sampler (independent readers)", *[""] * 4, f"{least['test']:.3f}",
                 *[""] * (1 + len(more)), f"{empty:.2f}", "", "", f"{least['validation']:.3f}", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def each_run(ours: Results, other: Results) -> str:
    """Markdown: a row minus another in each training run, over patients; and in all, over both."""
    both = sorted(ours.keys() & other.keys())
    columns = list(product(IMAGES, SHOWN))
    lines = [f"| seed | {' | '.join(f'{score}, {split}' for split, score in columns)} |",
             "|---" * (1 + len(columns)) + "|"]
    for title, seeds in ([*((str(seed), [seed]) for seed in both), ("all", both)] if both else []):
        cells = [title, *(difference(ours, other, seeds, *column) for column in columns)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_tables(document: Path) -> None:
    """Replaces what stands between `<!-- table: NAME -->` and `<!-- end -->` in a document."""
    results = {size: read_results(size) for size in (32, 48)}  # each file is read once
    made = {name: table(results[size], rows, ours) for name, (size, rows, ours) in TABLES.items()}
    made |= {f"each-run-{size}": each_run(runs.get("best", {}), runs.get("nll-flips", {}))
             for size, runs in results.items()}

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
