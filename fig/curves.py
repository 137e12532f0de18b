"""Training curves, and the reader of TensorBoard's scalars that they are drawn from."""

from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from fig.canvas import DPI, NORMAL, SMALL, WIDTH, colour

Series = tuple[np.ndarray, np.ndarray]  # steps and values, one number each per logged point


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


def label(ax: Axes, x: str = "", y: str = "", title: str = "") -> None:
    """Labels, a light grid, and text sizes that README's width leaves legible."""
    ax.set_xlabel(x, fontsize=SMALL)
    ax.set_ylabel(y, fontsize=SMALL)
    ax.set_title(title, fontsize=NORMAL)
    ax.tick_params(which="both", labelsize=SMALL)
    ax.grid(color="0.9", linewidth=0.5)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
