"""The method in one picture, drawn from a real run: what the paper's method figure explains."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path

from fig.canvas import (
    BAR,
    DPI,
    GAP,
    NORMAL,
    SMALL,
    VARIANCE_MAX,
    WIDTH,
    Array,
    add_row,
    as_array,
    colour_bar,
    draw_contours,
    evenly_spaced,
    expert_legend,
    frame,
    show_image,
    show_map,
    window,
    zoom,
)

ARROW_GAP = 0.3  # inches between groups of panels that an arrow joins
LEFT = 0.08  # inches
TITLE, NAME = 0.25, 0.2  # inches above a row for its groups' titles, below it for its panels' names
BETWEEN = 0.3  # inches between the rows, for the arrows from the first to the second
FOOT = 0.3  # inches for the legend
PANELS = 9  # in either row: image, experts, mean, 3 directions, 3 x_0; 5 states, 3 masks, variance


def overview(image: Array, masks: Array, mean: Array, factor: Array, gtr_samples: Array, states: Array,
             times: Sequence[float], samples: Array, variance: Array, *, zoomed: bool = True) -> Figure:
    """Image and experts, GTR's Gaussian, its samples x_0, one of them flowing to a mask, the masks' variance.

    image (c, h, w) in [0, 1]; masks (k, h, w) 0/1; mean (h, w) and factor (r, h, w) of the logits, mu and D
    of Eq. 3; gtr_samples (n, h, w) in [0, 1], x_0; states (5, h, w), x_t at the five `times`, of which
    states[0] is gtr_samples[0], as the arrow between them says; samples (n, h, w), final masks, the first of
    states[-1]; variance (h, w), at most 0.25.
    zoomed: all panels but the first show a part of the image, framed there, that holds every expert's mask
    and what exceeds 0.5 in the x_0 and final masks shown.
    Raises ValueError for shapes that do not fit, for fewer than 3 samples or directions, and for states that
    contradict the arrows."""
    image = as_array("image", image, ("c", "h", "w"))
    h, w = image.shape[1:]
    masks, variance = as_array("masks", masks, ("k", h, w)), as_array("variance", variance, (h, w))
    mean = as_array("mean", mean, (h, w), unit=False)
    factor = as_array("factor", factor, ("r", h, w), unit=False)
    gtr_samples = as_array("gtr_samples", gtr_samples, ("n", h, w))
    samples = as_array("samples", samples, ("n", h, w))
    states = as_array("states", states, (len(times), h, w), unit=False)
    _check_story(factor, gtr_samples, states, samples)

    figure, above, below = _rows(h / w)
    show_image(above[0], image)
    show_image(above[1], image)
    draw_contours(above[1], masks)
    for ax, logits in zip(above[2:6], [mean, *leading_directions(factor, 3)], strict=True):
        extent = float(np.abs(logits).max()) or 1.0
        show_map(ax, logits, "RdBu_r", -extent, extent)
    drawn = np.concatenate([array[evenly_spaced(len(array), 3)] for array in (gtr_samples, samples)])
    for ax, values in zip([*above[6:], *below[5:8], *below[:5]], [*drawn, *states], strict=True):
        show_map(ax, values)
    spread = show_map(below[8], variance, "magma", 0, VARIANCE_MAX)
    colour_bar(figure, spread, below[8:], (0, VARIANCE_MAX))
    if zoomed:
        edges = window(np.concatenate([masks, drawn]))
        frame(above[0], edges)
        zoom([*above[1:], *below], edges)
    _write(figure, above, below, times)
    _draw_arrows(figure, above, below)
    expert_legend(figure, len(masks))
    return figure


def leading_directions(factor: np.ndarray, count: int) -> np.ndarray:
    """The `count` directions (count, h, w) in which D e varies most, longest first, of a factor D (r, h, w).

    They are the singular vectors of D times their singular values: D's columns themselves come in no order,
    and any rotation of them gives the same D D^T. Signs are arbitrary; the largest entry is made positive."""
    r, h, w = factor.shape
    _, lengths, vectors = np.linalg.svd(factor.reshape(r, h * w), full_matrices=False)
    directions = (lengths[:, None] * vectors)[:count]
    largest = np.take_along_axis(directions, np.abs(directions).argmax(axis=1)[:, None], axis=1)
    return (directions * np.where(largest < 0, -1, 1)).reshape(-1, h, w)


def _check_story(factor: np.ndarray, gtr_samples: np.ndarray, states: np.ndarray,
                 samples: np.ndarray) -> None:
    """Raise ValueError where the arrays cannot fill the picture or contradict its arrows."""
    for name, array in (("factor", factor), ("gtr_samples", gtr_samples), ("samples", samples)):
        if len(array) < 3:
            raise ValueError(f"{name}: found {len(array)}, expected at least 3 to fill the picture")
    if len(states) != 5:
        raise ValueError(f"times: found {len(states)}, expected 5; choose five of the solver's states")
    if not np.allclose(states[0], gtr_samples[0], atol=1e-3):
        raise ValueError("states: found a first state other than gtr_samples[0], expected the same x_0; "
                         "integrate from gtr_samples[0] and keep its states")
    if not np.array_equal(states[-1] >= 0.5, samples[0] >= 0.5):
        raise ValueError("samples: found a first mask other than states[-1] >= 0.5, expected the same; "
                         "put the mask of that path first")


def _rows(h_over_w: float) -> tuple[Figure, list[Axes], list[Axes]]:
    """The figure and its two rows of nine panels."""
    side = (WIDTH - LEFT - BAR - 2 * ARROW_GAP - (PANELS - 3) * GAP) / PANELS
    row = TITLE + side * h_over_w + NAME
    figure = Figure(figsize=(WIDTH, 2 * row + BETWEEN + FOOT), dpi=DPI)

    def gaps(*after_arrow: int) -> list[float]:
        return [0.0] + [ARROW_GAP if j in after_arrow else GAP for j in range(1, PANELS)]

    above = add_row(figure, TITLE, LEFT, gaps(2, 6), (side, side * h_over_w))
    below = add_row(figure, row + BETWEEN + TITLE, LEFT, gaps(5, 8), (side, side * h_over_w))
    return figure, above, below


def _write(figure: Figure, above: list[Axes], below: list[Axes], times: Sequence[float]) -> None:
    """Titles above the groups of panels, names below the panels."""
    names = ["image", "experts", r"mean $\mu$", "$D$: 1st", "$D$: 2nd", "$D$: 3rd", *["$x_0$"] * 3]
    names += [f"$t = {t:g}$" for t in times] + ["mask"] * 3 + [""]
    for ax, name in zip([*above, *below], names, strict=True):
        ax.set_xlabel(name, fontsize=SMALL, labelpad=2)
    for group, title in (
        (above[:2], "experts disagree"),
        (above[2:6], r"GTR: logits $\sim N(\mu, D D^{\mathrm{T}} + L)$"),
        (above[6:], r"samples $x_0$ = sigmoid(logits)"),
        (below[:5], r"flow: $x_t$ along the velocity $v(x_t, t, \mathrm{image})$ of ST-Net"),
        (below[5:8], r"masks: $x_1 \geq 0.5$"),
        (below[8:], "variance"),
    ):
        left, right = group[0].get_position(), group[-1].get_position()
        lift = 0.06 / figure.get_size_inches()[1]
        middle = (left.x0 + right.x1) / 2
        figure.text(middle, left.y1 + lift, title, ha="center", va="bottom", fontsize=NORMAL)


def _draw_arrows(figure: Figure, above: list[Axes], below: list[Axes]) -> None:
    """From group to group along the rows; from the image and the first x_0 down to the path they start."""
    for row, first, second in ((above, 1, 2), (above, 5, 6), (below, 4, 5), (below, 7, 8)):
        left, right = row[first].get_position(), row[second].get_position()
        middle = (left.y0 + left.y1) / 2
        _arrow(figure, (left.x1, middle), (right.x0, middle))
    inch = 1 / figure.get_size_inches()[1]
    image, x_0, start = above[0].get_position(), above[6].get_position(), below[0].get_position()
    foot, arrival = image.y0 - NAME * inch, start.y1 + TITLE * inch
    lane = arrival + 0.6 * BETWEEN * inch
    third = (start.x1 - start.x0) / 3
    _arrow(figure, (image.x0 + third, foot), (image.x0 + third, arrival))
    x = (x_0.x0 + x_0.x1) / 2
    _arrow(figure, (x, foot), (x, lane), (start.x0 + 2 * third, lane), (start.x0 + 2 * third, arrival))


def _arrow(figure: Figure, *points: tuple[float, float]) -> None:
    """An arrow along straight pieces through `points`, fractions of the figure."""
    figure.add_artist(FancyArrowPatch(
        path=Path(points), transform=figure.transFigure, arrowstyle="-|>", mutation_scale=9, linewidth=1,
        color="0.25"))
