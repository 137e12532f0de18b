"""What a test prints and writes: tables beside the paper's rows, intervals, results.json."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from scipy.stats import bootstrap

from metadata_manager import BASELINES, Config, EvaluationConfig
from metrics.evaluation import Evaluation
from metrics.files import whole_file
from metrics.parts import empty_table, parts_table

FREE = ("data_path", "part", "merge", "report_images")  # settings that do not make it another test
Scores = dict[str, tuple[float, float | None]]  # mean, and standard deviation over runs or None


def _paper(columns: str, rows: str) -> dict[str, Scores]:
    """A table of the paper: each row a name, then a mean or mean+-std per column, - where none is given."""
    table = {}
    for line in rows.strip().splitlines():
        name, *cells = (cell.strip() for cell in line.split("|"))
        found = {column: cell.split("+-") for column, cell in zip(columns.split(), cells) if cell != "-"}
        table[name] = {column: (float(cell[0]), float(cell[1]) if cell[1:] else None)
                       for column, cell in found.items()}
    return table


# Tables 1 and 2: mean and standard deviation of five runs. Lower GED is better.
PAPER = {
    "LIDC": _paper("GED16 GED32 GED100 HM-IoU32 MDM32", """
        prob-unet   | .310+-.010 | .303+-.010 | .252+-.004 | .548+-.000 | .681+-.020
        phiseg      | .262       | .247       | .224+-.004 | .595       | .704+-.020
        ssn         | .259       | .243+-.010 | .225+-.002 | .550+-.010 | -
        mose        | .218+-.003 | .195+-.002 | .189+-.002 | .624+-.004 | .767+-.004
        p2sam       | .208       | .206       | -          | .627       | .939
        cimd        | -          | -          | .321       | .592+-.002 | .915+-.004
        ab          | .213+-.001 | .196+-.002 | .193+-.002 | .619+-.001 | .792+-.002
        ccdm        | .212+-.001 | .194+-.001 | .183+-.002 | .631+-.002 | .790+-.003
        atfm        | .206+-.002 | .188+-.001 | .162+-.002 | .667+-.002 | .948+-.001"""),
    "isic3_style_concat": _paper("GED16 GED32 GED100 HM-IoU32 MDM32", """
        prob-unet      | .202+-.003 | .187+-.003 | .171+-.002 | .697+-.005 | .927+-.003
        ssn            | .197+-.007 | .181+-.004 | .167+-.002 | .700+-.004 | .939+-.001
        c-prob-unet    | .208+-.004 | .202+-.005 | .179+-.002 | .719+-.004 | .925+-.004
        c-ssn          | .200+-.007 | .195+-.007 | .177+-.001 | .725+-.004 | .931+-.003
        atfm           | .183+-.001 | .152+-.002 | .147+-.003 | .732+-.003 | .942+-.002"""),
}
# GPU seconds for 100 samples of an image, on an RTX 3090 (Table 3).
PAPER_SECONDS = {"LIDC": {"cimd": 420, "ab": 1050, "ccdm": 1100, "atfm": 113}}
NOT_OURS = ("p2sam",)  # needs the weights of a foundation model: the paper's row alone
# Table 4, the ablation on LIDC; its row of ATFM is that of Table 1.
PAPER["LIDC"] |= _paper("GED100 HM-IoU32", """
    act-gtr    | .230 | .550
    sfm-no-sf  | .185 | .624
    sfm        | .176 | .631
    atfm-no-sf | .249 | .597""")
# Numbers of other papers: CFM's of M = 15 samples, to be compared with --samples 15; Flow-SSN's.
OTHER_SOURCES = dict.fromkeys(("cfm", "cfm-own"), "arXiv 2507.22418")
OTHER_SOURCES["flow-ssn"] = "its paper, other split"
PAPER["LIDC"]["cfm"] = PAPER["LIDC"]["cfm-own"] = {"Dice of means": (0.595, None)}
PAPER["LIDC"]["flow-ssn"] = {"GED100": (0.181, None)}  # split by series
PAPER["MMIS"] = {"prob-unet": {"GED15": (0.227, None)}}
PAPER["MMIS"]["cfm"] = PAPER["MMIS"]["cfm-own"] = {"GED15": (0.231, None), "Dice of means": (0.785, None)}


class System(Protocol):
    """What a table says of a system, see `models.systems.System`."""

    label: str
    method: str
    nfe: int
    parameters: int
    checkpoints: tuple[str, ...]
    alpha: float | None
    solver: str | None
    steps: int | None
    precision: str


@dataclass(frozen=True)
class Row:
    """A system with its scores on the test images, and what these took; samples: per image and seed."""

    system: System
    evaluation: Evaluation
    seconds: float
    samples: int


def bootstrap_interval(values: np.ndarray, patients: Sequence | np.ndarray, draws: int = 10_000, seed: int = 0
                       ) -> tuple[float, float, float]:
    """Mean of per-image values and its 95 % percentile interval; of a - b for two systems on the same images.

    values: (images,), or (seeds, images), averaged over seeds first. patients (images,): whole patients are
    resampled, as slices of one patient are not independent. With a single patient the interval is the mean.
    Raises ValueError for another number of patients, and for values that are not finite."""
    values, patients = np.atleast_2d(values).mean(0), np.asarray(patients)
    if values.shape != patients.shape or not len(values):
        raise ValueError(f"{len(values)} images with {len(patients)} patients: expected one for each image")
    if not np.isfinite(values).all():
        raise ValueError(f"scores of image {int(np.argmin(np.isfinite(values)))} are not finite")
    _, patient = np.unique(patients, return_inverse=True)
    totals, sizes = np.bincount(patient, values), np.bincount(patient)
    mean = float(values.mean())
    if len(totals) == 1:
        return mean, mean, mean
    found = bootstrap((totals, sizes), lambda total, size, axis: total.sum(axis) / size.sum(axis),
                      paired=True, vectorized=True, n_resamples=draws, batch=1000, method="percentile",
                      rng=np.random.default_rng(seed)).confidence_interval
    return mean, float(found.low), float(found.high)


def two_level_interval(values: np.ndarray, patients: Sequence | np.ndarray, draws: int = 10_000,
                       seed: int = 0) -> tuple[float, float, float]:
    """Mean and 95 % percentile interval over training runs and patients, both resampled.

    values: (runs, images), as in `bootstrap_interval`. With a single run only patients are resampled."""
    _, patient = np.unique(np.asarray(patients), return_inverse=True)
    totals = np.stack([np.bincount(patient, run) for run in values])  # (runs, patients)
    sizes, random = np.bincount(patient), np.random.default_rng(seed)
    of_patients, of_runs = (random.multinomial(count, np.full(count, 1 / count), draws)
                            for count in totals.T.shape)
    means = np.einsum("dr,rp,dp->d", of_runs, totals, of_patients) / len(totals) / (of_patients @ sizes)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(np.mean(values)), float(low), float(high)


def matching_n(samples: Sequence[int]) -> int:
    """The n of HM-IoU, MDM and diversity to show: 32, as in the paper, or else the largest."""
    return 32 if 32 in samples else max(samples)


def columns(samples: Sequence[int]) -> list[str]:
    """The scores to print: GED at each n, others at `matching_n`, the rest of all samples."""
    n = matching_n(samples)
    others = [f"HM-IoU{n}", f"MDM{n}", f"Diversity{n}", "S_NCC", "Dice of means", "ECE"]
    return [f"GED{count}" for count in samples] + others


def scores_table(what: str, rows: Sequence[Row], samples: Sequence[int]) -> str:
    """Markdown: ours, mean +- std over seeds, and below each method's rows what the paper reports for it."""
    names = columns(samples)
    lines = [f"| system | NFE | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    last = {row.system.method: row for row in rows}
    for row in rows:
        method = row.system.method
        lines.append(_line(f"{row.system.label}, ours", str(row.system.nfe),
                           row.evaluation.mean_std(), names))
        if row is last[method] and method in PAPER.get(what, {}):
            lines.append(_line(f"{method}, {OTHER_SOURCES.get(method, 'paper')}", "", PAPER[what][method],
                               names))
    if any(method in BASELINES for method in last):
        lines += [_line(f"{name}, paper (not trained here)", "", PAPER[what][name], names)
                  for name in NOT_OURS if name in PAPER.get(what, {})]
    return "\n".join(lines) + "\n"


def workload(systems: Sequence[System], images: int, config: EvaluationConfig) -> str:
    """What a test is about to do, a line per system."""
    drawn = f"{images} images x {len(config.seeds)} seeds x {max(config.samples)} samples"
    return "\n".join(f"{one.label}: {drawn} x {one.nfe} NFE, {one.precision}"
                     for one in systems)


def cost_table(what: str, rows: Sequence[Row]) -> str:
    """Markdown: what the samples of each system cost, drawn and scored, beside the paper's time for 100."""
    lines = ["| cost | NFE per sample | parameters | s per image of 100 samples | paper, RTX 3090 |",
             "|---" * 5 + "|"]
    for row in rows:
        drawn = np.size(row.evaluation.scores["Empty"]) * row.samples
        paper = PAPER_SECONDS.get(what, {}).get(row.system.method, "-")
        lines.append(f"| {row.system.label} | {row.system.nfe} | {row.system.parameters:,} | "
                     f"{100 * row.seconds / drawn:.3g} | {paper} |")
    return "\n" + "\n".join(lines) + "\n"


def _line(name: str, evaluations: str, scores: Scores, names: Sequence[str]) -> str:
    cells = [_cell(*scores[column]) if column in scores else "-" for column in names]
    return f"| {name} | {evaluations} | {' | '.join(cells)} |"


def _cell(mean: float, std: float | None) -> str:
    return f"{mean:.3f}" if std is None else f"{mean:.3f} +- {std:.3f}"


def differences_table(rows: Sequence[Row], patients: Sequence | np.ndarray, samples: Sequence[int]) -> str:
    """Markdown: each system minus the reference (atfm, else the last row), with 95 % intervals over patients.

    Empty where there is nothing to compare."""
    if len(rows) < 2:
        return ""
    reference = next((row for row in rows if row.system.method == "atfm"), rows[-1])
    names = columns(samples)[:len(samples) + 2]  # GED, HM-IoU and MDM
    lines = [f"| minus {reference.system.label} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        if row is not reference:
            cells = [_difference(row.evaluation.scores[name] - reference.evaluation.scores[name], patients)
                     for name in names]
            lines.append(f"| {row.system.label} | {' | '.join(cells)} |")
    return "\n" + "\n".join(lines) + "\n"


def _difference(values: np.ndarray, patients: Sequence | np.ndarray) -> str:
    mean, low, high = bootstrap_interval(values, patients)
    interval = f"[{low:+.3f}, {high:+.3f}]" if len(set(patients)) > 1 else "(one patient: no interval)"
    return f"{mean:+.3f} {interval}"


def results(rows: Sequence[Row], patients: Sequence | np.ndarray, test_images: str, versions: dict[str, str],
            device: torch.device, **settings: Config) -> dict[str, Any]:
    """All that a reader needs to trust or repeat the numbers, for results.json.

    test_images: fingerprint of the test images. settings: by their name in the file."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    return {
        "command": shlex.join(sys.argv),
        "versions": versions,
        "hardware": f"{hardware}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        **{name: asdict(config) for name, config in settings.items()},  # type: ignore[call-overload]
        "test_images": test_images,
        "groups": [str(patient) for patient in patients],
        "systems": {
            row.system.label: {
                **{name: getattr(row.system, name) for name in System.__annotations__ if name != "label"},
                "seconds": row.seconds, **row.evaluation.as_dict()}
            for row in rows},
    }


def report_tables(what: str, rows: Sequence[Row], patients: Sequence | np.ndarray, samples: Sequence[int]
                  ) -> str:
    """All that a test prints: scores beside the paper's, differences, empty masks, parts of GED."""
    systems = {row.system.label: row.evaluation.scores for row in rows}
    return (scores_table(what, rows, samples) + differences_table(rows, patients, samples)
            + empty_table(systems) + parts_table(systems, max(samples)))


def free_folder(folder: Path, **settings: Config) -> Path:
    """Where a test's results go, made: `folder`, or folder_2, ... where it holds those of other settings.

    settings: as in `results`. Those in FREE may differ, and the test goes on in the same folder."""
    ours = json.loads(json.dumps({name: asdict(config) for name, config in settings.items()}))  # type: ignore
    for one in ours.values():
        for name in FREE:
            one.pop(name, None)
    for number in count(1):
        place = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        if not (place / "settings.json").exists() and not (place / "results.json").exists():
            write_text(place / "settings.json", ours)
            return place
        try:
            if json.loads((place / "settings.json").read_text()) == ours:
                return place
        except (ValueError, FileNotFoundError):  # damaged, or of an older version
            pass
        print(f"{place}: kept, the results of another test")
    raise AssertionError("count does not end")


def write_text(path: Path, content: str | dict[str, Any]) -> None:
    """Writes text, or a dict as JSON, whole or not at all."""
    with whole_file(path) as file:
        file.write((content if isinstance(content, str) else json.dumps(content)).encode())
