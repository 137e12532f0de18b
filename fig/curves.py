"""Curves: training, quality against cost, one setting swept; and TensorBoard's scalars to draw them from."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fig.canvas import COLOURS, DPI, NORMAL, SMALL, WIDTH

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
Series = tuple[np.ndarray, np.ndarray]  # steps and values, one number each per logged point


class Points(NamedTuple):
    """One method's results: network evaluations per sample, mean scores, and the ends of their intervals."""

    evaluations: Sequence[float]
    scores: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def learning_curves(histories: Mapping[str, Mapping[str, Series]], *,
                    log_scale: Collection[str] = ()) -> Figure:
    """A panel per series, a line per run: histories[run][series] = (steps, values), as `read_scalars` gives.

    Series of more than 200 points are drawn faintly, under their running mean over a fiftieth of the points.
    log_scale: names of series with a logarithmic axis. A run without a series is left out of that panel.
    Raises ValueError where there is nothing to draw."""
    names = list(dict.fromkeys(name for history in histories.values() for name in history))
    if not names:
        raise ValueError(f"histories: found no series in {len(histories)} runs, expected one at least")
    columns = 2 if len(names) == 4 else min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(WIDTH, 0.4 + 2.2 * rows), dpi=DPI, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax, name in zip(axes, names, strict=False):
        for i, history in enumerate(histories.values()):
            if name in history:
                _draw_series(ax, *history[name], COLOURS[i % len(COLOURS)])
        if name in log_scale:
            ax.set_yscale("log")
        _label(ax, "step", "", name)
    for ax in axes[len(names):]:
        ax.set_axis_off()
    handles = [Line2D([], [], color=COLOURS[i % len(COLOURS)], label=run) for i, run in enumerate(histories)]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=SMALL)
    return figure


def tradeoff(points: Mapping[str, Points], *, score: str) -> Figure:
    """Quality against cost: a line per method, its scores with intervals over network evaluations per sample.

    score: the label of the vertical axis, with its direction, such as "GED (lower is better)".
    Evaluations are on a logarithmic axis that has a place for 0, a method that needs no network but GTR.
    Raises ValueError where an interval does not contain its score or lengths differ."""
    figure = Figure(figsize=(6.0, 3.6), dpi=DPI, layout="constrained")
    ax = figure.subplots()
    for i, (name, method) in enumerate(points.items()):
        x, y, low, high = (np.asarray(values, float) for values in method)
        if not x.shape == y.shape == low.shape == high.shape or not ((low <= y) & (y <= high)).all():
            raise ValueError(f"points[{name!r}]: found intervals {low} to {high} for scores {y} at {x}, "
                             "expected as many of each and low <= score <= high")
        ax.errorbar(x, y, yerr=(y - low, high - y), label=name, color=COLOURS[i % len(COLOURS)], capsize=3,
                    marker=MARKERS[i % len(MARKERS)], markersize=5, linewidth=1.5, elinewidth=1)
    ticks = sorted({value for method in points.values() for value in method.evaluations})
    ax.set_xscale("symlog", linthresh=1, linscale=0.3)
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    ax.set_xticks([], minor=True)
    _label(ax, "network evaluations per sample", score)
    ax.legend(fontsize=SMALL, frameon=False)
    return figure


def sweep(values: Sequence[float], mean: Sequence[float], std: Sequence[float], *, setting: str, score: str,
          paper: float | None = None) -> Figure:
    """A score over one setting, as in the paper's ablation curves: mean and standard deviation at each value.

    The values are evenly spaced in the order given, so that 0 and powers of ten fit on one axis.
    setting, score: labels of the axes; paper: the paper's default among the values, marked.
    Raises ValueError for lengths that differ or a default that is not among the values."""
    if not len(values) == len(mean) == len(std):
        raise ValueError(f"sweep: found {len(values)} values, {len(mean)} means and {len(std)} standard "
                         "deviations, expected as many of each")
    figure = Figure(figsize=(4.1, 2.8), dpi=DPI, layout="constrained")
    ax = figure.subplots()
    places = np.arange(len(values))
    ax.errorbar(places, mean, yerr=std, color=COLOURS[5], marker="o", markersize=4, capsize=3, linewidth=1.5)
    if paper is not None:
        if paper not in values:
            known = ", ".join(f"{value:g}" for value in values)
            raise ValueError(f"paper: found {paper:g}, expected one of the values drawn, {known}")
        ax.axvline(list(values).index(paper), color=COLOURS[4], linestyle="--", linewidth=1.5, zorder=1.5,
                   label="paper's default")
        ax.legend(fontsize=SMALL, frameon=False)
    ax.set_xticks(places, [f"{value:g}" for value in values])
    _label(ax, setting, score)
    return figure


def read_scalars(folder: str | Path) -> dict[str, Series]:
    """All scalar series of a run's TensorBoard event files: name -> (steps, ascending, and values).

    A step that a resumed run logged again counts once, with its last value.
    Raises FileNotFoundError where `folder` holds no event file."""
    # Imported here: it takes as long as everything else together, and drawing does not need it.
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    folder = Path(folder)
    if not any(folder.glob("events.out.tfevents.*")):
        raise FileNotFoundError(f"{folder}: found no events.out.tfevents.* file, expected some; give the "
                                "folder that the run wrote its TensorBoard log to")
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0})  # 0: all points, not a random choice
    events.Reload()
    series = {}
    for name in events.Tags()["scalars"]:
        values = {event.step: event.value for event in events.Scalars(name)}
        steps = sorted(values)
        series[name] = np.array(steps), np.array([values[step] for step in steps])
    return series


def _draw_series(ax: Axes, steps: np.ndarray, values: np.ndarray, colour: str) -> None:
    """One run's line in a panel."""
    steps, values = np.asarray(steps), np.asarray(values)
    if len(steps) > 200:
        ax.plot(steps, values, color=colour, linewidth=0.5, alpha=0.15, zorder=1)
        window = len(steps) // 50
        values = np.convolve(values, np.full(window, 1 / window), mode="valid")
        steps = steps[window - 1:]
    ax.plot(steps, values, color=colour, linewidth=1.5)


def _label(ax: Axes, x: str, y: str, title: str = "") -> None:
    """Labels, a light grid, and text sizes that README's width leaves legible."""
    ax.set_xlabel(x, fontsize=SMALL)
    ax.set_ylabel(y, fontsize=SMALL)
    ax.set_title(title, fontsize=NORMAL)
    ax.tick_params(labelsize=SMALL)
    ax.grid(color="0.9", linewidth=0.5)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
