"""Training as curves, TensorBoard's scalars read, and the effects of choices with their intervals."""

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from fig.canvas import COLOURS, DPI, NORMAL, SMALL, WIDTH, colour

Series = tuple[np.ndarray, np.ndarray]  # steps and values, one number each per logged point


class Difference(NamedTuple):
    """A choice's score minus another's: mean over runs, the ends of its interval, and that of each run."""

    mean: float
    low: float
    high: float
    runs: Sequence[float]


Differences = Mapping[str, Mapping[str, Difference]]  # title of a panel -> name of a choice -> its difference


def learning_curves(panels: Mapping[str, Mapping[str, Series]]) -> Figure:
    """A panel per series and a line per run: panels[title][run] = (steps, values), as `read_scalars` gives.

    Losses, titled train/loss..., have a logarithmic axis. Series of more than 200 points are drawn faintly,
    under their running mean over a fiftieth of them. Raises ValueError where there is nothing to draw."""
    runs = list(dict.fromkeys(chain.from_iterable(panels.values())))
    if not runs:
        raise ValueError(f"panels: found {dict(panels)}, expected a series of a run")
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH, 0.4 + 2.2 * rows), dpi=DPI, layout="constrained")
    for i, (title, histories) in enumerate(panels.items()):
        ax = figure.add_subplot(rows, columns, i + 1)
        for run, (steps, values) in histories.items():
            shade = colour(runs.index(run))
            if len(steps) > 200:
                ax.plot(steps, values, color=shade, linewidth=0.5, alpha=0.15, zorder=1)
                window = len(steps) // 50
                steps = steps[window - 1:]
                values = np.convolve(values, np.full(window, 1 / window), mode="valid")
            ax.plot(steps, values, color=shade, linewidth=1.5, marker="o" if len(steps) <= 10 else "",
                    markersize=3)  # one point alone makes no line
        if title.startswith("train/loss"):
            ax.set_yscale("log")
            ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 3, 5)), major_formatter="{x:g}",
                         minor_formatter=NullFormatter())  # 200 rather than 2 x 10^2
        label(ax, "step", title=title)
    figure.legend(handles=[Line2D([], [], color=colour(i), label=run) for i, run in enumerate(runs)],
                  loc="outside lower center", ncols=4, frameon=False, fontsize=SMALL)
    return figure


def read_scalars(folder: str | Path) -> dict[str, Series]:
    """All scalar series of a run's TensorBoard event files: name -> (steps, ascending, and values).

    A step that a resumed run logged again counts once, with its last value. No file: no series."""
    # Imported here: it takes as long as everything else together, and drawing does not need it.
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0})  # 0: all points, not a random choice
    events.Reload()
    series = {}
    for name in events.Tags()["scalars"]:
        values = {event.step: event.value for event in events.Scalars(name)}
        series[name] = np.array(sorted(values)), np.array([values[step] for step in sorted(values)])
    return series


def differences(panels: Differences) -> Figure:
    """Which choices matter: a panel per score, a row per choice with its interval and a dot per training run.

    A choice is in the same row of all panels that have it. Raises ValueError where there is nothing."""
    names = list(dict.fromkeys(chain.from_iterable(panels.values())))
    if not names:
        raise ValueError(f"panels: found {dict(panels)}, expected a score, and a choice for one")
    columns, rows = min(2, len(panels)), -(-len(panels) // 2)
    figure = Figure(figsize=(WIDTH, rows * (0.8 + 0.16 * len(names))), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for ax, (title, choices) in zip(axes.flat, panels.items()):
        ax.axvline(0, color="0.4", linewidth=1)
        for name, (mean, low, high, runs) in choices.items():
            y, shade = names.index(name), COLOURS[5] if low > 0 or high < 0 else "0.5"  # grey: perhaps 0
            ax.plot([low, high], [y, y], color=shade, linewidth=2)
            ax.plot(runs, [y] * len(runs), ".", color="0.2", markersize=3)
            ax.plot([mean], [y], "o", color=shade, markersize=5)
        label(ax, title=title)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.set_yticks(range(len(names)), names)
    axes[0, 0].set_ylim(len(names) - 0.5, -0.5)  # from top to bottom, the same in all panels
    return figure


def label(ax: Axes, x: str = "", y: str = "", title: str = "") -> None:
    """Labels, a light grid, and text sizes that README's width leaves legible."""
    ax.set_xlabel(x, fontsize=SMALL)
    ax.set_ylabel(y, fontsize=SMALL)
    ax.set_title(title, fontsize=NORMAL)
    ax.tick_params(which="both", labelsize=SMALL)
    ax.grid(color="0.9", linewidth=0.5)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
