"""What all pictures share: sizes, colours, panels, contours, and writing a file whole or not at all.

Figures are built with matplotlib's object interface: nothing here touches pyplot or its global state.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

Array = np.ndarray | torch.Tensor
Edges = tuple[float, float, float, float]  # left, right, top, bottom of a part of an image, in pixels

WIDTH = 8.3  # inches: README shows pictures about 830 pixels wide, so 8 points are 11 pixels there
DPI = 200  # twice README's width, for dense screens
SMALL, NORMAL = 8, 9  # points
GAP = 0.05  # inches between neighbouring panels
WIDE_GAP = 0.14  # inches between groups of panels
BAR = 0.5  # inches for a colour bar and its numbers

# Okabe and Ito's colours that tell apart on grey images for every common colour blindness, black left out.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#F0E442")
VARIANCE_MAX = 0.25  # largest variance of a variable in [0, 1]; as a fixed scale it makes maps comparable


def as_array(name: str, value: Array, shape: Sequence[int | str], unit: bool = True) -> np.ndarray:
    """A float32 copy on the host of array `name`, checked: numbers in `shape` must match, letters are free.

    unit: values must lie in [0, 1], as images, masks and probabilities do.
    Raises ValueError for another shape or for values outside [0, 1] or not finite."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().float().numpy()
    found = np.asarray(value, np.float32)
    fits = found.ndim == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, found.shape, strict=True))
    if not fits or found.size == 0:
        expected = ", ".join(map(str, shape))
        raise ValueError(f"{name}: found shape {found.shape}, expected ({expected}) with no side of 0")
    if not np.isfinite(found).all():
        raise ValueError(f"{name}: found values that are not finite; draw finite values only")
    if unit and (found.min() < -1e-3 or found.max() > 1 + 1e-3):  # resampling rounds to just outside
        raise ValueError(f"{name}: found values from {found.min():.3g} to {found.max():.3g}, expected [0, 1]"
                         "; pass logits through a sigmoid and rescale images first")
    return found


def evenly_spaced(n: int, count: int) -> np.ndarray:
    """Indices of min(n, count) of n things: the first, the last where two or more fit, and between them."""
    return np.linspace(0, n - 1, min(n, count)).round().astype(int)


def add_row(figure: Figure, top: float, left: float, gaps: Sequence[float],
            side: tuple[float, float]) -> list[Axes]:
    """A row of equal panels without ticks. All in inches: `top` and `left` from the figure's top left corner,
    gaps[j] the white before panel j, side = (width, height) of a panel."""
    width, height = figure.get_size_inches()
    axes = []
    for gap in gaps:
        left += gap
        ax = figure.add_axes((left / width, 1 - (top + side[1]) / height, side[0] / width, side[1] / height))
        ax.set(xticks=[], yticks=[])
        for spine in ax.spines.values():
            spine.set(linewidth=0.5, color="0.5")
        axes.append(ax)
        left += side[0]
    return axes


def panel_grid(rows: int, gaps: Sequence[float], h_over_w: float, top: float = 0.25, bottom: float = 0.1,
               left: float = 0.05, right: float = 0.05, width: float = WIDTH, dpi: int = DPI,
               ) -> tuple[Figure, np.ndarray]:
    """A figure of exactly `width` inches and its panels (rows, len(gaps)), sized so that they fill it.

    gaps and the four margins are in inches, gaps[j] before column j; h_over_w is a panel's height over its
    width."""
    side = (width - left - right - sum(gaps)) / len(gaps)
    height = top + rows * side * h_over_w + (rows - 1) * GAP + bottom
    figure = Figure(figsize=(width, height), dpi=dpi)
    axes = [add_row(figure, top + i * (side * h_over_w + GAP), left, gaps, (side, side * h_over_w))
            for i in range(rows)]
    return figure, np.array(axes, dtype=object)


def show_image(ax: Axes, image: np.ndarray) -> None:
    """An image (c, h, w) in [0, 1] as it is: c = 1 grey, c = 3 RGB. Raises ValueError for another c."""
    if image.shape[0] not in (1, 3):
        raise ValueError(f"image: found {image.shape[0]} channels, expected 1 (grey) or 3 (RGB)")
    ax.imshow(image.transpose(1, 2, 0) if image.shape[0] == 3 else image[0], cmap="gray", vmin=0, vmax=1)


def show_map(ax: Axes, values: np.ndarray, cmap: str = "gray", low: float = 0.0,
             high: float = 1.0) -> ScalarMappable:
    """A map (h, w) in `cmap` over [low, high]; with the defaults a mask or a map of probabilities.

    Nearest neighbours: the reader should see the mask's pixels, not a smoothed border."""
    return ax.imshow(values, cmap=cmap, vmin=low, vmax=high, interpolation="nearest")


def show_experts(axes: Sequence[Axes], masks: np.ndarray) -> None:
    """The experts' masks (k, h, w), each framed in the colour of its contour."""
    for i, (ax, mask) in enumerate(zip(axes, masks, strict=True)):
        show_map(ax, mask)
        for spine in ax.spines.values():
            spine.set(linewidth=1.5, color=COLOURS[i % len(COLOURS)])


def draw_contours(ax: Axes, masks: np.ndarray, colours: Sequence[str] = COLOURS) -> None:
    """The borders of masks (k, h, w) at level 0.5, along the pixels' edges. An empty mask draws nothing.

    Where there are several colours earlier masks are drawn thicker, so that a border on which experts agree
    shows the colours of all of them."""
    thicker = 0.4 if len(colours) > 1 else 0.0
    h, w = masks.shape[1:]
    for i, mask in enumerate(masks):
        if (mask > 0.5).any():
            # One ring of zeros closes the contour of a mask that touches the image's edge.
            ax.contour(np.arange(-1, w + 1), np.arange(-1, h + 1), np.pad(mask, 1), levels=[0.5],
                       colors=[colours[i % len(colours)]], linewidths=[0.7 + thicker * (len(masks) - 1 - i)])
    zoom([ax], (-0.5, w - 0.5, -0.5, h - 0.5))


def window(marks: np.ndarray) -> Edges:
    """Where to look: edges of a part of the image, of its proportions, that holds all that is marked.

    marks (n, h, w), marked where above 0.5. The part is half as large again as the marked box and at least a
    quarter of the image's side; it is the whole image where nothing is marked."""
    h, w = marks.shape[1:]
    rows, columns = np.nonzero((marks > 0.5).any(axis=0))
    if len(rows) == 0:
        return -0.5, w - 0.5, -0.5, h - 0.5
    part = min(1.0, max(0.25, 1.5 * np.ptp(rows) / h, 1.5 * np.ptp(columns) / w))

    def side(found: np.ndarray, length: int) -> tuple[float, float]:
        centred = float(found.min() + found.max() - part * length) / 2
        start = min(max(centred, -0.5), (1 - part) * length - 0.5)
        return start, start + part * length

    return *side(columns, w), *side(rows, h)


def zoom(axes: Iterable[Axes], edges: Edges) -> None:
    """Show only what lies within `edges`."""
    left, right, top, bottom = edges
    for ax in axes:
        ax.set(xlim=(left, right), ylim=(bottom, top))


def frame(ax: Axes, edges: Edges) -> None:
    """A thin box that says which part of the image the other panels show; none where they show all of it."""
    left, right, top, bottom = edges
    if right - left < abs(np.subtract(*ax.get_xlim())):
        ax.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=COLOURS[-1],
                               linewidth=0.8))


def expert_legend(figure: Figure, k: int) -> None:
    """A line at the figure's foot that names the contours' colours; takes 0.3 inches."""
    handles = [Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=2, label=f"expert {i + 1}")
               for i in range(k)]
    figure.legend(handles=handles, loc="lower center", ncols=k, frameon=False, fontsize=SMALL,
                  borderaxespad=0.2)


def title_panels(axes: Sequence[Axes], titles: Sequence[str]) -> None:
    """A title above each panel."""
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, fontsize=SMALL, pad=3)


def colour_bar(figure: Figure, drawn: ScalarMappable, axes: Sequence[Axes] | np.ndarray,
               ticks: Sequence[float]) -> None:
    """A thin colour bar right of a column of panels, as high as they are together; takes BAR inches."""
    above, below = axes[0].get_position(), axes[-1].get_position()
    width = figure.get_size_inches()[0]
    bar = figure.add_axes((above.x1 + 0.05 / width, below.y0, 0.07 / width, above.y1 - below.y0))
    figure.colorbar(drawn, cax=bar, ticks=list(ticks))
    bar.set_yticklabels([f"{tick:g}" for tick in ticks], fontsize=SMALL)
    bar.tick_params(length=2, pad=2)


def figure_to_array(figure: Figure) -> np.ndarray:
    """The rendered figure (h, w, 3) uint8; TensorBoard's `add_image` takes it with `dataformats="HWC"`."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save(figure: Figure, path: str | Path) -> None:
    """Write the figure in the format of the suffix (.png, .pdf, .svg), making folders where needed.

    Written under a temporary name and renamed: `path` is either as before or whole.
    Raises ValueError for a suffix that matplotlib cannot write."""
    path = Path(path)
    kind = path.suffix.lstrip(".").lower()
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise ValueError(f"{path}: found suffix {path.suffix!r}, expected one of {', '.join(sorted(known))}")
    with whole_file(path) as file:
        figure.savefig(file, format=kind)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write within the block, which then takes the place of `path`.

    An exception leaves `path` as it was. Makes folders where needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
