"""What a test prints and writes: tables beside the papers' rows, differences, costs, results.json."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from metadata_manager import BASELINES, Config, Metadata
from metrics.catalogue import columns, score_names
from metrics.floor import floor_of
from metrics.intervals import bootstrap_interval, few_patients
from metrics.paper import PAPER_SECONDS, Published, Scores, not_trained_here, published
from metrics.parts import empty_table, parts_table
from metrics.program import counted, table
from metrics.provenance import commit, hardware, tested_text
from metrics.systems import Row

OF_SYSTEM = ("method", "preset", "nfe", "parameters", "checkpoints", "alpha", "solver", "steps", "precision",
             "training")  # what results.json says of a system
FLOOR = "perfect sampler (independent readers)"


def scores_table(what: str, rows: Sequence[Row], samples: Sequence[int]) -> str:
    """Markdown: ours, mean +- std over seeds, below each method what a paper reports for it, and the floor.

    Where one of the papers' baselines is among them, also the published rows of systems that are not trained
    here. Columns are those of `columns` and those of published rows, where a row has a number in them."""
    # Of several rows of a method the dict keeps the last.
    last = {row.system.method: row for row in rows}
    lines: list[tuple[str, str, Scores]] = []
    papers: dict[str, Published] = {}
    for row in rows:
        method = row.system.method
        lines.append((f"{row.system.label}, ours", str(row.system.nfe), row.evaluation.mean_std()))
        # A method may have several rows, by steps or alpha: the paper's stands once, below the last.
        paper = published(what, method)
        if row is last[method] and paper is not None:
            lines.append((f"{method}, {paper.source}", "", paper.scores))
            papers[method] = paper
    if any(method in BASELINES for method in last):
        others = not_trained_here(what)
        lines += [(f"{name}, {paper.source} (not trained here)", "", paper.scores)
                  for name, paper in others.items()]
        papers |= others
    # The floor depends on the experts alone, so the scores of any row give it.
    floor, floor_note = _floor(rows[0].evaluation.scores, samples)
    lines += [(FLOOR, "", floor)] if floor else []
    # Also what only a paper reports, if its n is among the samples drawn.
    wanted = {*columns(samples), *(name for paper in papers.values() for name in paper.scores)}
    names = [name for name in score_names(samples)
             if name in wanted and any(name in scores for _, _, scores in lines)]
    notes = [f"{name}: {paper.note}." for name, paper in papers.items() if paper.note] + floor_note
    return table(["system", "NFE", *names], [
        [name, nfe, *(_cell(scores, column) for column in names)] for name, nfe, scores in lines
    ]) + "".join(f"\n{note}\n" for note in notes)


def _floor(scores: Mapping[str, np.ndarray], samples: Sequence[int]) -> tuple[Scores, list[str]]:
    """The floor of GED_n, its mean over the images that have one, and a note on those that have none."""
    per_n = {f"GED{n}": floor_of(scores, n) for n in samples}
    experts = scores["Experts"][0]
    left_out = int((experts < 2).sum())
    note = [f"{FLOOR}: without the {counted(left_out, 'image')} of {len(experts)} that one expert marked."]
    if left_out == len(experts):
        return {}, [f"{FLOOR}: none, as one expert marked each image."]
    means: Scores = {name: (float(np.nanmean(values)), None) for name, values in per_n.items()}
    return means, note if left_out else []


def _cell(scores: Scores, column: str) -> str:
    """A mean with its standard deviation, if there are several runs; - where there is none."""
    if column not in scores:
        return "-"
    mean, std = scores[column]
    return f"{mean:.3f}" if std is None else f"{mean:.3f} +- {std:.3f}"


def cost_table(what: str, rows: Sequence[Row]) -> str:
    """Markdown: what the samples of each system cost, drawn and scored, beside the paper's time for 100."""
    paper = PAPER_SECONDS.get(what, {})
    head = ["cost", "NFE per sample", "parameters", "s per image of 100 samples", "paper, RTX 3090"]
    cells = []
    for row in rows:
        # Seeds x images x samples: how many masks were drawn and scored in all.
        system, samples = row.system, np.size(row.evaluation.scores["Empty"]) * row.samples
        cells.append([system.label, str(system.nfe), f"{system.parameters:,}",
                      f"{100 * row.seconds / samples:.3g}", str(paper.get(system.method, "-"))])
    width = 5 if paper else 4  # no empty column
    return "\n" + table(head[:width], [line[:width] for line in cells])


def differences_table(rows: Sequence[Row], patients: Sequence | np.ndarray, samples: Sequence[int]) -> str:
    """Markdown: ours (the first row of atfm, else the last row) minus each other; negative GED is better.

    With 95 % intervals over patients, unless there are too few of them. "" where there is nothing to
    compare."""
    if len(rows) < 2:
        return ""
    # Ours is the method that this project is about; of a test without it, what was named last.
    ours = next((row for row in rows if row.system.method == "atfm"), rows[-1])
    names = columns(samples, compared=True)
    return "\n" + table(["difference (negative GED is better)", *names], [
        [f"{ours.system.label} minus {row.system.label}",
         *(_difference(ours.evaluation.scores[name] - row.evaluation.scores[name], patients)
           for name in names)] for row in rows if row is not ours])


def _difference(values: np.ndarray, patients: Sequence | np.ndarray) -> str:
    # A line below the tables says why there is no interval.
    if few_patients(patients):
        return f"{values.mean():+.3f}"
    mean, low, high = bootstrap_interval(values, patients)
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def report_tables(metadata: Metadata, rows: Sequence[Row], patients: Sequence | np.ndarray,
                  samples: Sequence[int]) -> str:
    """All that a test prints, markdown: scores beside the papers', differences, empty masks, parts of GED.

    Tables and lines of text, with an empty line between them."""
    systems = {row.system.label: row.evaluation.scores for row in rows}
    few = few_patients(patients)
    return "\n".join([
        scores_table(metadata.what, rows, samples) + differences_table(rows, patients, samples),
        empty_table(systems), parts_table(systems, max(samples), by_size=not few),
        *([f"{few}\n"] if few else []), tested_text(metadata, patients, rows[0].evaluation.seeds)])


def results(rows: Sequence[Row], patients: Sequence | np.ndarray, test_images: str, versions: dict[str, str],
            device: torch.device, **settings: Config) -> dict[str, Any]:
    """All that a reader needs to trust or repeat the numbers, for results.json.

    test_images: fingerprint of the test images. settings: by their name in the file."""
    return {
        "command": shlex.join(sys.argv),
        "commit": commit(),
        "versions": versions,
        "hardware": hardware(device),
        **{name: asdict(config) for name, config in settings.items()},  # type: ignore[call-overload]
        "test_images": test_images,
        # The patients, which whoever reads the file needs for intervals.
        "groups": [str(patient) for patient in patients],
        "systems": {row.system.label: {**{name: getattr(row.system, name) for name in OF_SYSTEM},
                                       "seconds": row.seconds, **row.evaluation.as_dict()}
                    for row in rows},
    }
