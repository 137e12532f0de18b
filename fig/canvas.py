"""What all pictures use: checked arrays, panels, contours, rendering.

Figures are made without pyplot, which keeps a global state and chooses a backend.
"""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from metrics.files import whole_file

Array = np.ndarray | torch.Tensor | Sequence[float]

WIDTH = 8.3  # inches: README shows pictures about 830 pixels wide, so 8 points are 11 pixels there
DPI = 200  # twice README's width, for dense screens
SMALL, NORMAL = 8, 9  # points
GAP, WIDE_GAP, BAR = 0.05, 0.14, 0.5  # inches between panels, between groups of them, for a colour bar
VARIANCE_MAX = 0.25  # largest variance of a variable in [0, 1]; as a fixed scale it makes maps comparable
EXPERTS = 8  # of an image that a picture shows at most: the contours of more would hide each other
# Okabe and Ito's colours, which are distinct on grey images for every common colour blindness. Their black,
# which a dark image hides, is replaced by Tol's wine. The last, yellow, is that of samples.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#882255", "#F0E442")
SUFFIXES = (".png", ".pdf", ".svg")


def checked(unbounded: Collection[str] = (), **arrays: tuple[Array, str]) -> list[np.ndarray]:
    """Float32 copies on the host of arrays given as masks=(masks, "m k h w").

    A letter stands for the same length in all of them.
    Raises ValueError for another shape, a side of 0, and values that are not finite or, unless the array is
    named in `unbounded`, not in [0, 1]."""
    lengths: dict[str, int] = {}
    copies = []
    for name, (value, shape) in arrays.items():
        if isinstance(value, torch.Tensor):
            # Through float32, as NumPy has no bfloat16.
            value = value.detach().cpu().float().numpy()
        array, sides = np.asarray(value, np.float32), shape.split()
        # A letter that an earlier array had is a known length; a new letter may be any.
        expected = [lengths.get(side, side) for side in sides]
        if array.size == 0 or array.ndim != len(sides) or any(
                want not in (side, length) for want, side, length in zip(expected, sides, array.shape)):
            raise ValueError(f"{name}: shape {array.shape}, expected ({', '.join(map(str, expected))}) with "
                             "no side of 0")
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: values that are not finite; draw finite values only")
        if name not in unbounded and not -1e-3 <= array.min() <= array.max() <= 1.001:  # resampling rounds
            raise ValueError(f"{name}: values from {array.min():.3g} to {array.max():.3g}, expected [0, 1]; "
                             "pass logits through a sigmoid and rescale images first")
        lengths |= zip(sides, array.shape)
        copies.append(array)
    return copies


def colour(i: int) -> str:
    """The colour of expert, run or method i; it repeats after all of COLOURS."""
    return COLOURS[i % len(COLOURS)]


def evenly_spaced(n: int, count: int) -> list[int]:
    """The indices of min(n, count) of n things: the first, the last where two or more fit, those between."""
    return np.linspace(0, n - 1, min(n, count)).round().astype(int).tolist()


def panel_grid(gaps: Sequence[Sequence[float]], h_over_w: float, titles: Sequence[str] = (),
               names: Sequence[str] = (), experts: int = 0, top: float = 0.25, bottom: float = 0.0,
               left: float = 0.05, right: float = 0.05, between: float = GAP, width: float = WIDTH,
               dpi: int = DPI) -> tuple[Figure, np.ndarray]:
    """A figure of exactly `width` inches, filled by equal panels (rows, columns) without ticks.

    gaps[i][j] is the space in inches before panel j of row i; each row has the same sum. The margins and the
    space `between` rows are in inches too. h_over_w is the height of a panel over its width. titles stand
    above the panels of the first row, names left of the rows. experts: how many the image has; a legend at
    the foot gives the colours of the first EXPERTS, and says so where there are more."""
    side = (width - left - right - sum(gaps[0])) / len(gaps[0])
    tall = side * h_over_w
    # Inches for the legend, and for its title where not all experts are drawn.
    bottom += (0.5 if experts > EXPERTS else 0.3) if experts else 0
    height = top + len(gaps) * tall + (len(gaps) - 1) * between + bottom
    figure = Figure(figsize=(width, height), dpi=dpi)
    for i, row in enumerate(gaps):
        x, y = left, top + i * (tall + between)
        for gap in row:
            x += gap
            # Matplotlib counts fractions from the lower left corner, y here inches from the top.
            place = (x / width, 1 - (y + tall) / height, side / width, tall / height)
            figure.add_axes(place, xticks=[], yticks=[]).spines[:].set(linewidth=0.5, color="0.5")
            x += side
    axes = np.array(figure.axes, object).reshape(len(gaps), -1)
    for ax, title in zip(axes[0], titles):
        ax.set_title(title, fontsize=SMALL, pad=3)
    for ax, name in zip(axes[:, 0], names):
        ax.set_ylabel(name, fontsize=NORMAL)
    if experts:
        shown = min(experts, EXPERTS)
        figure.legend(handles=[Line2D([], [], color=colour(i), linewidth=2, label=f"expert {i + 1}")
                               for i in range(shown)], loc="lower center", ncols=shown, frameon=False,
                      fontsize=SMALL, title=first_of(EXPERTS, experts, "experts"), title_fontsize=SMALL,
                      borderaxespad=0.2, columnspacing=0.8, handlelength=1.2, handletextpad=0.5)
    return figure, axes


def first_of(shown: int, count: int, things: str) -> str | None:
    """What a picture says where it shows the first of more things: "first 8 of 40 experts"; else None."""
    return f"first {shown} of {count} {things}" if count > shown else None


def label(ax: Axes, x: str = "", y: str = "", title: str = "") -> None:
    """Labels, a light grid, and text that is legible at README's width."""
    ax.set_xlabel(x, fontsize=SMALL)
    ax.set_ylabel(y, fontsize=SMALL)
    ax.set_title(title, fontsize=NORMAL)
    ax.tick_params(which="both", labelsize=SMALL)
    ax.grid(color="0.9", linewidth=0.5)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def show(ax: Axes, values: np.ndarray, cmap: str = "gray", low: float = 0, high: float = 1) -> AxesImage:
    """An image (c, h, w) in [0, 1] or a map (h, w) in `cmap` over [low, high].

    Three channels are shown as RGB, of any other number the first."""
    if values.ndim == 2:  # nearest: the reader should see a mask's pixels, not a smoothed border
        return ax.imshow(values, cmap=cmap, vmin=low, vmax=high, interpolation="nearest")
    drawn = values if len(values) == 3 else values[:1]
    return ax.imshow(drawn.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=1)


def draw_contours(ax: Axes, masks: np.ndarray, samples: bool = False) -> None:
    """Draw the borders of masks (k, h, w) at level 0.5, along the edges of pixels.

    samples: all are drawn alike. Otherwise each expert has a colour, and earlier ones are thicker, so that a
    border that several experts drew shows the colours of all. At most EXPERTS experts are drawn."""
    h, w = masks.shape[1:]
    masks = masks if samples else masks[:EXPERTS]
    thicker = 0 if samples else min(0.4, 1.6 / max(1, len(masks) - 1))  # points, for each expert above
    for i, mask in enumerate(masks):
        if (mask > 0.5).any():
            # One ring of zeros closes the contour of a mask that touches the image's edge.
            ax.contour(np.arange(-1, w + 1), np.arange(-1, h + 1), np.pad(mask, 1), levels=[0.5],
                       colors=[COLOURS[-1] if samples else colour(i)],
                       linewidths=[0.7 + thicker * (len(masks) - 1 - i)])
    # The padding would widen the axes. y runs downwards, as rows do.
    ax.set(xlim=(-0.5, w - 0.5), ylim=(h - 0.5, -0.5))


def zoom(axes: Iterable[Axes], *marks: np.ndarray, framed: Axes | None = None) -> None:
    """Show only the part of the image that holds all masks `marks` (n, h, w), see `marked_part`.

    framed: a panel of the whole image, on which a thin box shows which part it is."""
    left, top, *part = marked_part(*marks)
    for ax in axes:
        ax.set(xlim=(left, left + part[0]), ylim=(top + part[1], top))
    if framed is not None and part[0] < marks[0].shape[2]:
        framed.add_patch(Rectangle((left, top), *part, fill=False, color="white", linewidth=0.8))
        framed.annotate(" shown beside", (left, top), color="white", fontsize=5, va="top")


def marked_part(*marks: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, width and height of the part of an image that holds all masks `marks` (n, h, w) above 0.5.

    It is half as large again as the box around them, at least a quarter of the image's side, and of its
    proportions; the whole image where all masks are empty. The corner pixel's centre is (0, 0)."""
    marked = np.argwhere((np.concatenate(marks) > 0.5).any(axis=0))[:, ::-1]  # x, y
    whole = np.array(marks[0].shape[:0:-1])  # w, h
    first, last = (marked.min(axis=0), marked.max(axis=0)) if len(marked) else (0 * whole, whole)
    # The larger relative side counts for both, so that the part has the proportions of the image.
    part = whole * (1.5 * (last - first) / whole).max().clip(0.25, 1)
    # About the middle of the masks, moved inwards where it would leave the image.
    left, top = ((first + last - part) / 2).clip(-0.5, whole - part - 0.5)
    return left, top, *part


def colour_bar(figure: Figure, drawn: AxesImage, axes: Sequence[Axes] | np.ndarray) -> None:
    """A thin colour bar right of a column of panels, as high as they are together; takes BAR inches."""
    above, below, inch = axes[0].get_position(), axes[-1].get_position(), 1 / figure.get_size_inches()[0]
    # Placed by hand: a bar that Matplotlib places takes its room from the panels.
    bar = figure.add_axes((above.x1 + 0.05 * inch, below.y0, 0.07 * inch, above.y1 - below.y0))
    figure.colorbar(drawn, cax=bar, ticks=drawn.get_clim(), format="{x:g}")
    bar.tick_params(length=2, pad=2, labelsize=SMALL)


def save(figure: Figure, path: str | Path) -> None:
    """Write the figure in the format of the suffix, whole or not at all; makes folders.

    Raises ValueError for another suffix than SUFFIXES, OSError as `whole_file`."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: suffix {path.suffix!r}, expected one of {', '.join(SUFFIXES)}")
    with whole_file(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower())
