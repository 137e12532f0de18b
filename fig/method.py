"""The method in one picture, drawn from a real run: what the paper's method figure explains."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path

from fig import canvas
from fig.canvas import Array

TITLE, NAME = 0.25, 0.2  # inches above a row for its groups' titles, below it for its panels' names
ARROW = 0.3  # inches for an arrow, between groups of panels and between the rows
GROUPS = (  # of each of the two rows of nine panels: first panel -> last panel, title
    {0: (1, "experts disagree"), 2: (5, r"GTR: logits $\sim N(\mu, D D^{\mathrm{T}} + L)$"),
     6: (8, r"samples $x_0$ = sigmoid(logits)")},
    {0: (4, r"flow: $x_t$ along the velocity $v$ of ST-Net"),
     5: (7, r"masks: $x_1 \geq 0.5$"), 8: (8, "variance")})
STATES = 5  # of the path, which fill its group


def overview(image: Array, masks: Array, mean: Array, factor: Array, gtr_samples: Array, states: Array,
             times: Array, samples: Array) -> Figure:
    """Image and experts, GTR's Gaussian, its samples x_0, one of them flowing to a mask, the masks' variance.

    image (c, h, w) in [0, 1]; masks (k, h, w) 0/1; mean (h, w) and factor (r, h, w) of the logits, mu and D
    of Eq. 3; gtr_samples (n, h, w) in [0, 1], x_0; states (5, h, w), x_t at `times` (5,); samples (m, h, w),
    final masks. All panels but the first show a part of the image, framed there, that holds every expert's
    mask and what exceeds 0.5 in the x_0 and final masks shown.
    The states lead from gtr_samples[0] to samples[0], as the arrows say.
    Raises ValueError for shapes that do not fit, and fewer than 3 samples or directions."""
    image, masks, mean, factor, gtr_samples, times, states, samples = canvas.checked(
        ("mean", "factor", "states"), image=(image, "c h w"), masks=(masks, "k h w"), mean=(mean, "h w"),
        factor=(factor, "r h w"), gtr_samples=(gtr_samples, "n h w"), times=(times, "s"),
        states=(states, "s h w"), samples=(samples, "m h w"))
    for name, array in (("factor", factor), ("gtr_samples", gtr_samples), ("samples", samples)):
        if len(array) < 3:
            raise ValueError(f"{name}: {len(array)}, expected at least 3 to fill the picture")
    if len(states) != STATES:
        raise ValueError(f"times: {len(states)}, expected {STATES}; train with {STATES - 1} or more --steps")
    # The arrow that leads to a group needs more room than the panels within it.
    gaps = [[0, *(ARROW if j in groups else canvas.GAP for j in range(1, 9))] for groups in GROUPS]
    figure, (above, below) = canvas.panel_grid(
        gaps, image.shape[1] / image.shape[2], experts=len(masks), top=TITLE, bottom=NAME, left=0.08,
        right=canvas.BAR, between=NAME + ARROW + TITLE)
    canvas.show(above[0], image)
    canvas.show(above[1], image)
    canvas.draw_contours(above[1], masks)
    for ax, logits in zip(above[2:6], [mean, *leading_directions(factor, 3)], strict=True):
        # 0 is white: red pixels are rather in the mask, blue ones rather not. A map of zeros has extent 1.
        extent = float(np.abs(logits).max()) or 1.0
        canvas.show(ax, logits, "RdBu_r", -extent, extent)
    drawn = np.concatenate([gtr_samples[:3], samples[:3]])
    for ax, values in zip([*above[6:], *below[5:8], *below[:5]], [*drawn, *states], strict=True):
        canvas.show(ax, values)
    # Over all samples, of which three are shown.
    variance = canvas.show(below[8], samples.var(axis=0), "magma", high=canvas.VARIANCE_MAX)
    canvas.colour_bar(figure, variance, below[8:])
    # The same part in all panels, so that they can be compared.
    canvas.zoom([*above[1:], *below], masks[:canvas.EXPERTS], drawn, framed=above[0])
    names = ["image", "experts", r"mean $\mu$", "$D$: 1st", "$D$: 2nd", "$D$: 3rd", *["$x_0$"] * 3,
             *[f"$t = {t:g}$" for t in times], *["mask"] * 3, ""]
    for ax, name in zip([*above, *below], names, strict=True):
        ax.set_xlabel(name, fontsize=canvas.SMALL, labelpad=2)
    _join_groups(figure, [above, below])
    return figure


def leading_directions(factor: np.ndarray, count: int) -> np.ndarray:
    """The `count` directions (count, h, w) in which D e varies most, longest first, of a factor D (r, h, w).

    They are the singular vectors of D times their singular values: D's columns themselves come in no order,
    and any rotation of them gives the same D D^T. Signs are arbitrary; the largest entry is made positive."""
    r, h, w = factor.shape
    # The reduced form: of the h w right singular vectors at most r have a length above 0.
    _, lengths, vectors = np.linalg.svd(factor.reshape(r, h * w), full_matrices=False)
    directions = (lengths[:, None] * vectors)[:count]
    largest = directions[range(len(directions)), np.abs(directions).argmax(axis=1)]
    return (directions * np.sign(largest)[:, None]).reshape(-1, h, w)


def _join_groups(figure: Figure, axes: list[np.ndarray]) -> None:
    """A title above each group; arrows along the rows, and from image and x_0 down to the path they start."""

    def arrow(*points: tuple[float, float]) -> None:
        figure.add_artist(FancyArrowPatch(path=Path(points), transform=figure.transFigure, arrowstyle="-|>",
                                          mutation_scale=9, linewidth=1, color="0.25"))

    inch = 1 / figure.get_size_inches()[1]
    boxes = np.array([[ax.get_position() for ax in row] for row in axes])  # each [[left, foot], [right, top]]
    for row, groups in zip(boxes, GROUPS, strict=True):
        middle, top = row[0, :, 1].mean(), row[0, 1, 1]
        for first, (last, title) in groups.items():
            left, right = row[first, 0, 0], row[last, 1, 0]
            figure.text((left + right) / 2, top + 0.06 * inch, title, ha="center", va="bottom",
                        fontsize=canvas.NORMAL)
            # Nothing stands left of a row's first group.
            if first:
                arrow((row[first - 1, 1, 0], middle), (left, middle))
    (left, _), (right, top) = boxes[1, 0]
    foot, arrival, third = boxes[0, 0, 0, 1] - NAME * inch, top + TITLE * inch, (right - left) / 3
    # The arrow from x_0 runs left between the rows, below the names and above the titles.
    lane, x_0 = arrival + 0.6 * ARROW * inch, boxes[0, 6, :, 0].mean()
    arrow((left + third, foot), (left + third, arrival))
    arrow((x_0, foot), (x_0, lane), (left + 2 * third, lane), (left + 2 * third, arrival))
