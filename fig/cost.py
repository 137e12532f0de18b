"""GED against what a system costs: seconds of training, and network evaluations (NFE) per sample."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath

from fig.canvas import DPI, SMALL, WIDTH, colour
from fig.curves import label
from fig.results import MARKERS

LINE = 0.17  # inches that a label takes in height
PANEL = 2.4  # inches, height of a panel, unless its labels need more


def score_against_cost(systems: Mapping[str, Mapping[str, Any]], floor: float) -> Figure:
    """Two panels, above GED against training time, below against NFE, both axes of cost logarithmic.

    systems: label -> {"nfe": int, "training_seconds": float, "GED": a number for each seed}. A system is a
    point at the mean over seeds, with a line over their range. floor: the GED that no system is expected to
    fall below, a dashed line. The axis of NFE is linear from 0 to 1, so that systems without a flow have a
    place. Raises ValueError, naming the system, for values that are not finite or out of range, and where
    there is no system."""
    if not systems:
        raise ValueError("systems: found none, expected one or more to draw")
    for name, system in systems.items():
        ged = np.asarray(system["GED"], float)
        if ged.ndim != 1 or not ged.size or not np.isfinite([*ged, system["training_seconds"]]).all():
            raise ValueError(f"{name}: found GED {system['GED']}, training_seconds "
                             f"{system['training_seconds']}; expected finite numbers, a GED for each seed")
        if system["training_seconds"] <= 0 or system["nfe"] < 0:
            raise ValueError(f"{name}: found training_seconds {system['training_seconds']}, nfe "
                             f"{system['nfe']}; expected seconds above 0 and nfe of at least 0")
    panel = max(PANEL, LINE * len(systems))
    height = 2 * panel + 1.2
    widest = max(TextPath((0, 0), name, size=SMALL).get_extents().width for name in systems) / 72  # inches
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    figure.subplots_adjust(left=0.7 / WIDTH, right=1 - (widest + 0.4) / WIDTH, top=1 - 0.15 / height,
                           bottom=0.5 / height, hspace=0.55 / panel)
    above, below = figure.subplots(2, 1)
    means = {name: float(np.mean(system["GED"])) for name, system in systems.items()}
    for ax, field in ((above, "training_seconds"), (below, "nfe")):
        for i, (name, system) in enumerate(systems.items()):
            low, high = min(system["GED"]), max(system["GED"])
            ax.plot([system[field]] * 2, [low, high], color=colour(i), linewidth=1.5)
            ax.plot([system[field]], [means[name]], color=colour(i), marker=MARKERS[i % len(MARKERS)],
                    markersize=6, linestyle="", label=name)
        ax.axhline(floor, color="0.4", linestyle="--", linewidth=1, zorder=1)
    label(above, "seconds of training", "GED (lower is better)\ndashed: floor")
    label(below, "NFE (network evaluations) per sample", "GED (lower is better)\ndashed: floor")
    above.set_xscale("log")
    below.set_xscale("symlog", linthresh=1, linscale=0.3)
    below.xaxis.set_major_formatter("{x:g}")
    fewest = min(system["nfe"] for system in systems.values())
    below.set_xlim(left=fewest / 1.5 if fewest else -0.5)
    for ax, field in ((above, "training_seconds"), (below, "nfe")):
        _label_points(ax, {name: (system[field], means[name]) for name, system in systems.items()},
                      LINE / panel)
    return figure


def _label_points(ax: Axes, points: Mapping[str, tuple[float, float]], gap: float) -> None:
    """Write the names of points in a column right of a panel, each with a thin line to its point.

    gap: the height of a label as a fraction of the panel's."""
    low, high = ax.get_ylim()
    ax.set_ylim(low, high)  # the lines should not change it
    ordered = sorted(points.items(), key=lambda item: item[1][1])
    heights = spread([(y - low) / (high - low) for _, (_, y) in ordered], gap)
    for (name, point), height in zip(ordered, heights):
        ax.annotate(name, point, xytext=(1.03, height), textcoords=ax.transAxes, va="center", fontsize=SMALL,
                    arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkA": 1,
                                "shrinkB": 4, "relpos": (0, 0.5)})


def spread(heights: list[float], gap: float) -> list[float]:
    """Ascending heights in [0, 1], moved as little as needed so that neighbours are `gap` apart or more.

    Those that fit stay between gap / 2 and 1 - gap / 2; n heights fit if n * gap is at most 1."""
    moved: list[float] = []
    for height in heights:  # upwards ...
        moved.append(max(height, moved[-1] + gap if moved else gap / 2))
    highest = 1 - gap / 2
    for i in reversed(range(len(moved))):  # ... and what is then too high downwards
        moved[i] = highest = min(moved[i], highest)
        highest -= gap
    return moved
