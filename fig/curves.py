"""Scores as curves and intervals: training, cost, one setting swept, choices; TensorBoard's scalars read."""

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator

from fig.canvas import COLOURS, DPI, NORMAL, SMALL, WIDTH

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
Series = tuple[np.ndarray, np.ndarray]  # steps and values, one number each per logged point


class Points(NamedTuple):
    """One method's results: places on the horizontal axis, mean scores, and the ends of their intervals."""

    x: Sequence[float]
    scores: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


class Difference(NamedTuple):
    """A choice's score minus another's: mean over runs, the ends of its interval, and that of each run."""

    mean: float
    low: float
    high: float
    runs: Sequence[float]


class PlainNumbers(LogFormatter):
    """Ticks of a logarithmic axis as 200 rather than 2 x 10^2, those that LogFormatter finds room for."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


Panels = Mapping[str, Mapping[str, Points]]  # label of a score -> name of a method -> its results

Differences = Mapping[str, Mapping[str, Difference]]  # title of a panel -> name of a choice -> its difference


def learning_curves(histories: Mapping[str, Mapping[str, Series]], *,
                    log_scale: Collection[str] = ()) -> Figure:
    """A panel per series, a line per run: histories[run][series] = (steps, values), as `read_scalars` gives.

    Panels are in the order of the runs' first series, then their second ones, and so on.
    Series of more than 200 points are drawn faintly, under their running mean over a fiftieth of the points.
    log_scale: names of series with a logarithmic axis. A run without a series is left out of that panel.
    Raises ValueError where there is nothing to draw."""
    by_place = zip_longest(*histories.values())  # first series of every run, second ones, ...
    names = [name for name in dict.fromkeys(chain.from_iterable(by_place)) if name is not None]
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
            ax.yaxis.set_major_formatter(PlainNumbers())
            ax.yaxis.set_minor_formatter(PlainNumbers())
        _label(ax, "step", "", name)
    for ax in axes[len(names):]:
        ax.set_axis_off()
    handles = [Line2D([], [], color=COLOURS[i % len(COLOURS)], label=run) for i, run in enumerate(histories)]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=SMALL)
    return figure


def tradeoff(panels: Panels) -> Figure:
    """Quality against cost: a panel per score, a line per method over network evaluations per sample.

    panels[score][method] with score the label of the vertical axis, such as "GED (lower is better)".
    Evaluations are on a logarithmic axis that has a place for 0, a method that needs no network but GTR.
    Raises ValueError where an interval does not contain its score or lengths differ."""
    figure, axes = _score_panels(panels, "network evaluations per sample")
    for ax, methods in zip(axes, panels.values(), strict=True):
        for i, (name, points) in enumerate(methods.items()):
            _draw_points(ax, name, points, points.x, i)
        ticks = sorted({value for points in methods.values() for value in points.x})
        ax.set_xscale("symlog", linthresh=1, linscale=0.3)
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        ax.set_xticks([], minor=True)
    _legend_below(figure, axes[0])
    return figure


def sweep(panels: Panels, *, setting: str, paper: float | None = None) -> Figure:
    """Scores over one setting, as in the paper's ablation curves: a panel per score, a line per method.

    panels as in `tradeoff`. The values of the setting are evenly spaced, ascending, so that 0 and powers of
    ten fit on one axis. setting: its label; paper: the paper's default among the values, marked.
    Raises ValueError as `tradeoff` does, and for a default that is not among the values."""
    values = sorted({float(x) for methods in panels.values()
                     for points in methods.values() for x in points.x})
    if paper is not None and paper not in values:
        known = ", ".join(f"{value:g}" for value in values)
        raise ValueError(f"paper: found {paper:g}, expected one of the values drawn, {known}")
    figure, axes = _score_panels(panels, setting)
    for ax, methods in zip(axes, panels.values(), strict=True):
        for i, (name, points) in enumerate(methods.items()):
            _draw_points(ax, name, points, [values.index(x) for x in points.x], i)
        if paper is not None:
            ax.axvline(values.index(paper), color="0.4", linestyle="--", linewidth=1.5, zorder=1.5,
                       label="paper's default")
        ax.set_xticks(range(len(values)), [f"{value:g}" for value in values])
    _legend_below(figure, axes[0])
    return figure


def differences(panels: Differences) -> Figure:
    """Which choices matter: a panel per score, a row per choice with its interval and a dot per training run.

    A choice is in the same row of every panel, and left out where a panel does not have it.
    Raises ValueError where there is nothing to draw."""
    names = list(dict.fromkeys(chain.from_iterable(panels.values())))
    if not names:
        raise ValueError(f"panels: found {dict(panels)}, expected a score, and a choice for one")
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (WIDTH, rows * (0.8 + 0.16 * len(names)))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for ax, (title, choices) in zip(axes.flat, panels.items(), strict=False):
        ax.axvline(0, color="0.4", linewidth=1)
        for name, (mean, low, high, runs) in choices.items():
            y, clear = names.index(name), low > 0 or high < 0
            colour = COLOURS[5] if clear else "0.5"
            ax.plot([low, high], [y, y], color=colour, linewidth=2)
            ax.plot(runs, [y] * len(runs), ".", color="0.2", markersize=3)
            ax.plot([mean], [y], "o", color=colour, markersize=5)
        _label(ax, "", "", title)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.set_yticks(range(len(names)), names)
    axes[0, 0].set_ylim(len(names) - 0.5, -0.5)  # from top to bottom, the same in all panels
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


def _score_panels(panels: Panels, x: str) -> tuple[Figure, list[Axes]]:
    """A figure with a labelled panel per score."""
    if not panels or not all(panels.values()):
        raise ValueError(f"panels: found {dict(panels)}, expected a score, and a method for each")
    figure = Figure(figsize=(WIDTH * min(1, len(panels) / 2), 3.2), dpi=DPI, layout="constrained")
    axes = list(figure.subplots(1, len(panels), squeeze=False).flat)
    for ax, score in zip(axes, panels, strict=True):
        _label(ax, x, score)
    return figure, axes


def _legend_below(figure: Figure, ax: Axes) -> None:
    """The lines of a panel named below all panels, where they hide nothing."""
    handles, names = ax.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=SMALL)


def _draw_points(ax: Axes, name: str, points: Points, places: Sequence[float], number: int) -> None:
    """One method's line with its intervals, at `places` of the horizontal axis."""
    x, y, low, high = (np.asarray(values, float) for values in points)
    if not x.shape == y.shape == low.shape == high.shape or not ((low <= y) & (y <= high)).all():
        raise ValueError(f"points of {name!r}: found intervals {low} to {high} for scores {y} at {x}, "
                         "expected as many of each and low <= score <= high")
    ends = [(y - low).tolist(), (high - y).tolist()]  # lists: some matplotlib warns of arrays of one point
    ax.errorbar(places, y, yerr=ends, label=name, color=COLOURS[number % len(COLOURS)],
                marker=MARKERS[number % len(MARKERS)], markersize=5, linewidth=1.5, elinewidth=1, capsize=3)


def _draw_series(ax: Axes, steps: np.ndarray, values: np.ndarray, colour: str) -> None:
    """One run's line in a panel."""
    steps, values = np.asarray(steps), np.asarray(values)
    if len(steps) > 200:
        ax.plot(steps, values, color=colour, linewidth=0.5, alpha=0.15, zorder=1)
        window = len(steps) // 50
        values = np.convolve(values, np.full(window, 1 / window), mode="valid")
        steps = steps[window - 1:]
    marker = "o" if len(steps) <= 10 else ""  # one point alone makes no line
    ax.plot(steps, values, color=colour, linewidth=1.5, marker=marker, markersize=3)


def _label(ax: Axes, x: str, y: str, title: str = "") -> None:
    """Labels, a light grid, and text sizes that README's width leaves legible."""
    ax.set_xlabel(x, fontsize=SMALL)
    ax.set_ylabel(y, fontsize=SMALL)
    ax.set_title(title, fontsize=NORMAL)
    ax.tick_params(which="both", labelsize=SMALL)
    ax.grid(color="0.9", linewidth=0.5)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
