"""Curves from a test's results.json: scores against cost or alpha, as in the paper's ablations, and parts.

A report is the content of that file; report["systems"][label] is what a system scored, and how it sampled."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fig.canvas import DPI, SMALL, WIDTH, colour, save
from fig.curves import label
from metadata_manager import EXPERIMENTS, experiment
from metrics.parts import THIRDS, correlation_text, parts_of, thirds
from metrics.report import bootstrap_interval, matching_n

Report = dict[str, Any]
PARTS = {"systems", "groups", "sampling", "metadata"}  # of a report
FIELDS = {"method", "alpha", "solver", "steps", "nfe", "scores"}  # of a system in it
MARKERS = ("o", "s", "^", "D", "v", "P")  # one fewer than colours, so that pairs repeat after 42
DRAWS = 2000  # of the bootstrap, per point: enough for an interval that is read off a picture


def results_curves(report: Report, folder: Path) -> list[str]:
    """Write the curves that a test gives rise to into `folder`; returns the names of the files.

    parts.png; tradeoff.png if systems of different cost were tested; sweep.png with several --alphas."""
    written = ["parts.png"]
    save(parts(report), folder / written[-1])
    if len(_values(report, "nfe")) > 1:
        written.append("tradeoff.png")
        save(tradeoff(report), folder / written[-1])
    if len(_values(report, "alpha")) > 1:
        written.append("sweep.png")
        save(sweep(report), folder / written[-1])
    return written


def read_report(path: Path) -> Report:
    """The content of a results.json. Raises FileNotFoundError, or ValueError for another file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; run test_prior_LIDC.py or test_prior_ISIC.py first")
    with suppress(ValueError, AttributeError):  # of what is neither JSON nor a dict of dicts
        report = json.loads(path.read_text())
        if PARTS <= report.keys() and all(FIELDS <= one.keys() for one in report["systems"].values()):
            return report
    raise ValueError(f"{path}: not the results.json of a test (with {', '.join(sorted(PARTS))}, and "
                     f"{', '.join(sorted(FIELDS))} for each system); run the test again")


def tradeoff(report: Report) -> Figure:
    """Scores against network NFE per sample, a line per method, alpha and solver."""
    return _curves(report, "nfe", "network NFE per sample", r", \d+ steps",
                   "flows of different cost; test with several --steps or --solver")


def sweep(report: Report) -> Figure:
    """Scores against alpha, the weight of the semantic term, a line per method, solver and steps."""
    return _curves(report, "alpha", r"$\alpha$, weight of the semantic term", r", alpha [^,]+",
                   "flows of different alpha; train and test with several --alphas")


def parts(report: Report) -> Figure:
    """Calibration of empty masks, distance from the experts and diversity by size of what they mark.

    report: of results.json, with the scores "Empty", "Distance", ... of each system; means over seeds."""
    n = max(report["sampling"]["samples"])
    figure = Figure(figsize=(WIDTH, 3.0), dpi=DPI, layout="constrained")
    empty, distance, diversity = figure.subplots(1, 3)
    for i, (name, one) in enumerate(report["systems"].items()):
        scores = {key: np.array(values) for key, values in one["scores"].items()}
        style = {"color": colour(i), "marker": MARKERS[i % len(MARKERS)], "markersize": 5, "linewidth": 1.5}
        ours, theirs = scores["Empty"].mean(0), scores["Experts empty"].mean(0)
        shares = np.unique(theirs)
        empty.plot(shares, [ours[theirs == share].mean() for share in shares], **style,
                   label=f"{name} (correlation {correlation_text(scores)})")
        by_size = [parts_of(scores, n, images) for images in thirds(scores["Size"].mean(0)).values()
                   if len(images)]
        distance.plot([of["Distance"] for of in by_size], **style)
        diversity.plot([of["Diversity"] for of in by_size], **style)
    diversity.plot([of["Experts' diversity"] for of in by_size], color="0.4", linestyle="--", linewidth=1.5,
                   label="experts")
    empty.plot([0, 1], [0, 1], color="0.4", linestyle="--", linewidth=1.5)
    label(empty, "share of an image's experts who mark nothing", "share of empty samples")
    label(distance, "", "E d(sample, expert)")
    label(diversity, "", "E d(sample, sample);  dashed: experts")
    for ax in (distance, diversity):
        ax.set_xticks(range(len(by_size)), [third.replace(" ", "\n") for third in THIRDS[:len(by_size)]])
    figure.legend(*empty.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False,
                  fontsize=SMALL)
    return figure


def _values(report: Report, field: str) -> set[float]:
    """What the flows have for evaluations or alpha; act-gtr needs no evaluation of the network."""
    return {one[field] for one in report["systems"].values() if one["nfe"]} - {None}


def _curves(report: Report, field: str, axis: str, varying: str, needs: str) -> Figure:
    """GED and HM-IoU over the values of `field`; a line joins labels that differ in what is `varying` only.

    Means over images, with 95 % intervals of a bootstrap that resamples patients.
    Raises ValueError where the flows have fewer than two values of `field`."""
    if len(_values(report, field)) < 2:
        raise ValueError(f"the curve needs {needs}")
    systems = {name: one for name, one in report["systems"].items() if one[field] is not None}
    lines: dict[str, list[dict[str, Any]]] = {}
    for name, one in sorted(systems.items(), key=lambda item: item[1][field]):
        lines.setdefault(re.sub(varying, "", name), []).append(one)
    values, cost = sorted({one[field] for one in systems.values()}), field == "nfe"
    # Alphas are evenly spaced, so that 0 and powers of ten fit on one axis; the paper's is marked.
    places = {value: value if cost else i for i, value in enumerate(values)}
    what = report["metadata"]["what"]
    paper = experiment(what, "paper").flow.alpha if not cost and what in EXPERIMENTS else None
    samples = report["sampling"]["samples"]
    scores = ((f"GED{max(samples)}", "lower"), (f"HM-IoU{matching_n(samples)}", "higher"))
    resampled = "images" if report["metadata"]["reader"] == "isic3" else "patients"
    figure = Figure(figsize=(WIDTH, 3.2), dpi=DPI, layout="constrained")
    for ax, (score, better) in zip(figure.subplots(1, 2), scores, strict=True):
        label(ax, axis, f"{score} ({better} is better)\n95 % interval over {resampled}")
        for i, (name, line) in enumerate(lines.items()):
            mean, low, high = np.transpose([
                bootstrap_interval(np.array(one["scores"][score]), report["groups"], DRAWS) for one in line])
            ends = np.maximum([mean - low, high - mean], 0)  # rounding may put a mean just outside
            ax.errorbar([places[one[field]] for one in line], mean, yerr=ends.tolist(), label=name,
                        color=colour(i), marker=MARKERS[i % len(MARKERS)], markersize=5, linewidth=1.5,
                        elinewidth=1, capsize=3)
        if paper in places:
            ax.axvline(places[paper], color="0.4", linestyle="--", linewidth=1.5, zorder=1.5,
                       label="paper's default")
        if cost:
            ax.set_xscale("symlog", linthresh=1, linscale=0.3)  # has a place for 0, GTR's own samples
        ax.set_xticks(list(places.values()), [f"{value:g}" for value in places])
        ax.set_xticks([], minor=True)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False,
                  fontsize=SMALL)
    return figure
