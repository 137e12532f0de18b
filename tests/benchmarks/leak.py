"""What a split that is not by patient buys: the same test slices, with other slices in the training list.

Every second slice of the test patients is tested. GTR alone is trained on as many slices each time: of other
patients only; with the test patients' other slices among them, as in a split by slice; and with the tested
slices themselves, as in the lists of the authors' code. About 3 minutes a training run on one core:

    python -m tests.benchmarks.leak --data_path <lidc .h5 file> --seeds 0 1 2
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import test_prior_LIDC
import train_GTR
from data.splits import by_patient
from data.store import Store, open_store
from data.writer import Writer
from metrics import two_level_interval
from metrics.program import one_line_errors
from tests.benchmarks.measure import report

GTR = ("--batchsize 32 --lr 1e-3 --schedule cosine --ema 0.99 --num_filters 16 32 64 --val_images 8").split()
TEST = "--methods act-gtr --samples 16 --seeds 0 --report_images 0 --allow_overlap True".split()
SCORES = ("GED16", "HM-IoU16")


def training_lists(patient: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Rows to train on, by way, all as many; and rows of validation and test."""
    rows = by_patient(patient, seed=0)
    test = np.sort(rows["test"])
    tested, others = test[::2], test[1::2]
    kept = rows["train"][:len(rows["train"]) - len(others)]
    ways = {"by patient": rows["train"], "by slice": np.concatenate([kept, others]),
            "test slices too": np.concatenate([kept, tested[:len(others)]])}
    return ways, {"val": rows["val"], "test": tested}


def write(path: Path, store: Store, rows: dict[str, np.ndarray]) -> None:
    """A file of these rows whose ids begin with their fold, for --split file."""
    k, (h, w) = store.annotators, store.shape[1:3]
    with Writer(path, f"rows of {store.path}") as writer:
        for fold, of_fold in rows.items():
            ascending, place = np.unique(of_fold, return_inverse=True)
            images, packed = store.read(ascending)
            for row, i in zip(of_fold, place):
                masks = np.unpackbits(packed[i])[:k * h * w].reshape(k, h, w)
                writer.append(images[i], masks, patient=str(store.patient[row]), id=f"{fold}/{row}")


def scores(folder: Path, path: Path, crop: str, epochs: str, seed: int) -> tuple[np.ndarray, list[str]]:
    """SCORES of GTR trained and tested on a file, (scores, images), and the images' patients."""
    common = ["--data_path", str(path), "--split", "file", "--crop", crop, "--output_path", str(folder)]
    results = folder / "test" / "results.json"
    if not results.exists():
        train_GTR.main([*common, *GTR, "--epochs", epochs, "--validate_every", epochs, "--seed", str(seed)])
        test_prior_LIDC.main([*common, *TEST])
    content = json.loads(results.read_text())
    (system,) = content["systems"].values()
    return np.array([system["scores"][score][0] for score in SCORES]), content["groups"]


def main(flags: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", required=True, help="LIDC: an .h5 file")
    parser.add_argument("--output_path", type=Path, default=Path("runs/leak"), help="its folder")
    parser.add_argument("--crop", default="32", help="centre crop, pixels per side")
    parser.add_argument("--epochs", default="30", help="of training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training")
    asked = parser.parse_args(flags)
    store = open_store(asked.data_path)
    ways, held_out = training_lists(store.patient)
    rows, clean = [], None
    for way, train in ways.items():
        path = asked.output_path / f"{way.replace(' ', '_')}.h5"
        if not path.exists():
            write(path, store, {"train": train, **held_out})
        folder = path.with_suffix("")
        runs, patients = zip(*(scores(folder / f"seed{seed}", path, asked.crop, asked.epochs, seed)
                               for seed in asked.seeds))
        values = np.stack(runs, axis=1)  # (scores, runs, images)
        clean = values if clean is None else clean
        row = {"training list": way, "runs": len(runs)}
        for score, of_score, of_clean in zip(SCORES, values, clean):
            row[score] = round(float(of_score.mean()), 3)
            mean, low, high = two_level_interval(of_score - of_clean, np.array(patients[0]))
            difference = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
            row[f"{score} minus by patient"] = None if values is clean else difference
        rows.append(row)
    report(rows)


if __name__ == "__main__":
    with one_line_errors():
        main()
