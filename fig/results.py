"""Curves from a test's results.json: scores against cost or alpha, as in the paper's ablations, and parts.

A report is the content of that file; report["systems"][label] holds a system's scores, and how it sampled.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fig.canvas import DPI, SMALL, WIDTH, colour, label, save
from metadata_manager import EXPERIMENTS
from metrics.catalogue import better, matching_n
from metrics.intervals import bootstrap_interval, few_patients
from metrics.parts import correlation_text, parts_of, thirds

Report = dict[str, Any]
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # one fewer than colours, so that pairs repeat after 56
RESAMPLES = 2000  # of the bootstrap, per point: enough for an interval that is read off a picture


def results_curves(report: Report, folder: Path) -> list[str]:
    """Write the curves of a test into `folder`; returns the names of the files.

    These are parts.png, tradeoff.png if flows of different cost were tested, and sweep.png if flows were
    tested with several --alphas."""
    figures = {"parts.png": parts(report)}
    if len(_values(report, "nfe")) > 1:
        figures["tradeoff.png"] = tradeoff(report)
    if len(_values(report, "alpha")) > 1:
        figures["sweep.png"] = sweep(report)
    for name, figure in figures.items():
        save(figure, folder / name)
    return list(figures)


def tradeoff(report: Report) -> Figure:
    """Scores against NFE per sample, a line per method, alpha and solver."""
    return _curves(report, "nfe", "NFE (network evaluations) per sample", r", \d+ steps")


def sweep(report: Report) -> Figure:
    """Scores against alpha, the weight of the semantic term, a line per method, solver and steps."""
    return _curves(report, "alpha", r"$\alpha$, weight of the semantic term", r", alpha [^,]+")


def parts(report: Report) -> Figure:
    """Calibration of empty masks, distance from the experts and diversity, by the size of experts' masks.

    Means are over seeds. Of too few patients, see `few_patients`, all sizes are one point."""
    n, few = max(report["sampling"]["samples"]), few_patients(report["groups"])
    figure = Figure(figsize=(WIDTH, 3.0), dpi=DPI, layout="constrained")
    empty, distance, diversity = figure.subplots(1, 3)
    for i, (name, system) in enumerate(report["systems"].items()):
        scores = {key: np.array(values) for key, values in system["scores"].items()}
        style = {"color": colour(i), "marker": MARKERS[i % len(MARKERS)], "markersize": 5, "linewidth": 1.5}
        # Experts' fractions are multiples of 1/k: images of each are one point.
        of_samples, of_experts = scores["Empty"].mean(0), scores["Experts empty"].mean(0)
        fractions = np.unique(of_experts)
        empty.plot(fractions, [of_samples[of_experts == fraction].mean() for fraction in fractions], **style,
                   label=f"{name} (correlation {correlation_text(scores)})")
        sizes = scores["Size"].mean(0)
        groups = {"all sizes": np.arange(len(sizes))} if few else thirds(sizes)
        by_size = [parts_of(scores, n, images) for images in groups.values()]
        distance.plot([means["Distance"] for means in by_size], **style)
        diversity.plot([means["Diversity"] for means in by_size], **style)
    dashed = {"color": "0.4", "linestyle": "--", "linewidth": 1.5}
    if few:  # a line needs two points
        diversity.axhline(by_size[0]["Experts' diversity"], **dashed)
    else:
        diversity.plot([means["Experts' diversity"] for means in by_size], **dashed)
    empty.plot([0, 1], [0, 1], **dashed)
    label(empty, "empty fraction of an image's experts", "empty fraction of samples",
          "Empty masks\n(dashed: as the experts)")
    label(distance, "", "E d(sample, expert)",
          "Distance from experts" + ("" if few else "\nby size of their masks"))
    label(diversity, "", "E d(sample, sample)", "Diversity of samples\n(dashed: of experts)")
    for ax in (distance, diversity):
        ax.set_xticks(range(len(groups)), [name.replace(" ", "\n") for name in groups])
    figure.legend(*empty.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False,
                  fontsize=SMALL, title=few or None, title_fontsize=SMALL)
    return figure


def _values(report: Report, field: str) -> set[float]:
    """The values of `field`, nfe or alpha, over the flows; systems of NFE 0 are left out."""
    return {system[field] for system in report["systems"].values() if system["nfe"]} - {None}


def _curves(report: Report, field: str, axis: str, varying: str) -> Figure:
    """GED and HM-IoU over the values of `field`; a line joins labels that differ in what is `varying` only.

    Means are over images, with 95 % intervals of a bootstrap that resamples patients, unless these are too
    few, see `few_patients`."""
    systems = {name: system for name, system in report["systems"].items() if system[field] is not None}
    lines: dict[str, list[dict[str, Any]]] = {}
    # Ascending, as a line joins its points in the order in which they come.
    for name, system in sorted(systems.items(), key=lambda item: item[1][field]):
        # Labels without the varied value are equal along a line.
        lines.setdefault(re.sub(varying, "", name), []).append(system)
    values, cost = sorted({system[field] for system in systems.values()}), field == "nfe"
    # Alphas are evenly spaced, so that 0 and powers of ten fit on one axis; the paper's is marked.
    places = {value: value if cost else i for i, value in enumerate(values)}
    what, patients, few = report["metadata"]["what"], report["groups"], few_patients(report["groups"])
    # For a user's data the paper has no alpha.
    paper = EXPERIMENTS[what].flow.alpha if not cost and what in EXPERIMENTS else None
    samples = report["sampling"]["samples"]
    figure = Figure(figsize=(WIDTH, 3.2), dpi=DPI, layout="constrained")
    scores = f"GED{max(samples)}", f"HM-IoU{matching_n(samples)}"
    for ax, score in zip(figure.subplots(1, 2), scores, strict=True):
        interval = "" if few else "\n95 % interval over patients"
        label(ax, axis, f"{score} ({better(score)} is better){interval}")
        for i, (name, line) in enumerate(lines.items()):
            mean, low, high = np.transpose([
                bootstrap_interval(np.array(of["scores"][score]), patients, RESAMPLES) for of in line])
            ends = np.maximum([mean - low, high - mean], 0)  # rounding may put a mean just outside
            ax.errorbar([places[system[field]] for system in line], mean, yerr=None if few else ends.tolist(),
                        label=name, color=colour(i), marker=MARKERS[i % len(MARKERS)], markersize=5,
                        linewidth=1.5, elinewidth=1, capsize=3)
        if paper in places:
            ax.axvline(places[paper], color="0.4", linestyle="--", linewidth=1.5, zorder=1.5,
                       label="paper's default")
        if cost:
            ax.set_xscale("symlog", linthresh=1, linscale=0.3)  # has a place for 0, the samples of GTR
        ax.set_xticks(list(places.values()), [f"{value:g}" for value in places])
        ax.set_xticks([], minor=True)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False,
                  fontsize=SMALL, title=few or None, title_fontsize=SMALL)
    return figure
