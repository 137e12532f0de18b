"""Curves from a test's results.json: scores against cost or alpha, as in the paper's ablations."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import fig
from metadata_manager import experiment
from metrics import paired_bootstrap

DRAWS = 2000  # of the bootstrap, per point: enough for an interval that is read off a picture
Row = dict[str, Any]  # of results.json["systems"]


def save_curves(report: dict[str, Any], folder: Path) -> list[str]:
    """Writes the curves that a test gives rise to and returns their names.

    tradeoff.png if a flow was tested at several --steps or with several --solver; sweep.png at several
    --alphas."""
    sampling, written = report["sampling"], []
    if max(len(sampling["steps"]), len(sampling["solver"])) > 1 and len(_costs(report)) > 1:
        written.append("tradeoff.png")
        fig.save(tradeoff(report), folder / written[-1])
    if len(_alphas(report)) > 1:
        written.append("sweep.png")
        fig.save(sweep(report), folder / written[-1])
    return written


def read_report(path: Path) -> dict[str, Any]:
    """The content of a results.json. Raises FileNotFoundError, or ValueError for another file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; run test_prior_LIDC.py or test_prior_ISIC.py first")
    try:
        report = json.loads(path.read_text())
        fields = {"method", "evaluations", "scores", "alpha", "solver", "steps"}
        if (all(fields <= row.keys() for row in report["systems"].values())
                and {"metadata", "sampling", "groups"} <= report.keys()):
            return report
        found = "without " + ", ".join(sorted(fields))
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # neither JSON nor a dict of dicts
        found = f"{type(error).__name__}: {error}"
    raise ValueError(f"{path}: not the results.json of a test ({found}); run the test again")


def tradeoff(report: dict[str, Any]) -> Figure:
    """Scores against network evaluations per sample, a line per method, alpha and solver.

    Raises ValueError where all flows took the same number of evaluations."""
    if len(_costs(report)) < 2:
        raise ValueError("a trade-off needs rows of different cost; test with several --steps or --solver")
    return fig.tradeoff(_panels(report, "evaluations", ("method", "alpha", "solver")))


def sweep(report: dict[str, Any]) -> Figure:
    """Scores against alpha, the weight of the semantic term, a line per method, solver and number of steps.

    Raises ValueError where fewer than two alphas were tested."""
    alphas = _alphas(report)
    if len(alphas) < 2:
        raise ValueError("a sweep needs flows of different alpha; train and test with several --alphas")
    default = experiment(report["metadata"]["what"]).prior.alpha
    return fig.sweep(_panels(report, "alpha", ("method", "solver", "steps")),
                     setting=r"$\alpha$, weight of the semantic term",
                     paper=default if default in alphas else None)


def matching_n(samples: Sequence[int]) -> int:
    """The n of HM-IoU and MDM to show: 32, as in the paper, or else the largest."""
    return 32 if 32 in samples else max(samples)


def _costs(report: dict[str, Any]) -> set[int]:
    """Network evaluations per sample of the flows."""
    return {row["evaluations"] for row in report["systems"].values()} - {0}


def _alphas(report: dict[str, Any]) -> set[float]:
    """The values of --alphas."""
    return {row["alpha"] for row in report["systems"].values()} - {None}


def _panels(report: dict[str, Any], place: str, line: tuple[str, ...]) -> fig.Panels:
    """GED and HM-IoU over the field `place` of the rows that have it, in lines by the fields `line`."""
    rows = sorted((row for row in report["systems"].values() if row[place] is not None),
                  key=lambda row: row[place])
    lines: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        lines[_line_name(row, rows, line)].append(row)
    samples = report["sampling"]["samples"]
    resampled = "patients" if report["metadata"]["reader"] == "lidc" else "images"
    return {
        f"{score} ({better} is better)\n95 % interval over {resampled}": {
            name: _points(of_line, score, place, report["groups"]) for name, of_line in lines.items()}
        for score, better in ((f"GED{max(samples)}", "lower"), (f"HM-IoU{matching_n(samples)}", "higher"))
    }


def _line_name(row: Row, rows: list[Row], fields: tuple[str, ...]) -> str:
    """The method, and of the other fields those that vary between the method's rows."""
    parts = [row["method"]]
    for field in fields[1:]:
        if len({other[field] for other in rows if other["method"] == row["method"]}) > 1:
            value = row[field]
            parts.append(value if isinstance(value, str) else f"{field} {value:g}")
    return ", ".join(parts)


def _points(rows: list[Row], score: str, place: str, groups: list[str]) -> fig.Points:
    """Means over images, with percentile intervals of a bootstrap that resamples whole groups of images."""
    found = []
    for row in rows:
        values = np.asarray(row["scores"][score])
        mean, low, high = paired_bootstrap(values, np.zeros_like(values), DRAWS, groups=groups)
        # With one group, low, mean and high are equal but for rounding.
        found.append((row[place], mean, min(low, mean), max(high, mean)))
    return fig.Points(*zip(*found))
