"""Pictures of images, experts' masks and samples: in training, in testing, for a user's images.

image is (c, h, w) in [0, 1], masks (k, h, w) of 0/1, samples (n, h, w) of 0/1 or probabilities. Where a
function takes `images`, these and what goes with them have m images in front. They are arrays, or tensors on
any device; other shapes and values raise ValueError. A system to draw is a function
sample(images, n, generator=None) -> (m, n, h, w) in [0, 1]; an item of a data set is (image, masks).
Where not all samples fit into a picture, the first are drawn: none is chosen.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from fig import canvas
from fig.canvas import (
    BAR,
    EXPERTS,
    GAP,
    VARIANCE_MAX,
    WIDE_GAP,
    Array,
    checked,
    draw_contours,
    first_of,
    panel_grid,
    show,
)
from metrics.files import whole_file

CONTOURS = 8  # of samples on one image
NARROW_EXPERTS = 4  # that fit into a picture of narrow panels
PICTURE_SIDE = 512  # pixels; a larger image is drawn smaller in picture.png, as contours take long


def to_draw(dataset: Any, indices: Sequence[int], device: torch.device | str = "cpu"
            ) -> tuple[Tensor, Tensor]:
    """Items of a data set as images (m, c, h, w) and masks (m, k, h, w) on a device.

    k is the smallest number of masks that one of these images has."""
    images, masks = zip(*(dataset[index] for index in indices))
    k = min(map(len, masks))
    return torch.stack(images).to(device), torch.stack([of_image[:k] for of_image in masks]).to(device)


@torch.no_grad()
def validation_picture(sample: Callable[..., Tensor], dataset: Any, device: torch.device | str = "cpu"
                       ) -> np.ndarray:
    """A picture for TensorBoard, (h, w, 3) uint8: contours, masks and 4 samples of the first 4 images."""
    images, masks = to_draw(dataset, range(min(4, len(dataset))), device)
    # Always seed 0: from epoch to epoch pictures differ by what was learned, not by chance.
    samples = sample(images, 4, generator=torch.Generator(device).manual_seed(0)) >= 0.5
    # Agg draws into memory, without a window.
    agg = FigureCanvasAgg(prediction_grid(images, masks, samples, small=True))
    agg.draw()
    return np.array(agg.buffer_rgba())[..., :3]


@torch.no_grad()
def draw_samples(sample: Callable[..., Tensor], dataset: Any, folder: Path, name: str, seed: int,
                 device: torch.device | str = "cpu") -> Tensor:
    """Write <name>.png, 16 samples on each of four images, those of `four_of`. Returns the samples, bool.

    For the file's name see `file_stem`."""
    images, masks = four_of(dataset, device)
    samples = sample(images, 16, generator=torch.Generator(device).manual_seed(seed)) >= 0.5
    canvas.save(prediction_grid(images, masks, samples), folder / f"{file_stem(name)}.png")
    return samples


def file_stem(label: str) -> str:
    """The name of a file for a system's label: "atfm (best), 10 steps" -> "atfm_best_10_steps"."""
    return "_".join(re.findall(r"[^\s(),/\\]+", label))


def draw_comparison(drawn: Mapping[str, Tensor], dataset: Any, folder: Path) -> None:
    """Write comparison.png, if there are several systems: their samples on the same four images.

    drawn: by label, the samples that `draw_samples` returned."""
    if len(drawn) > 1:
        canvas.save(comparison(*four_of(dataset), drawn), folder / "comparison.png")


def four_of(dataset: Any, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Four images, evenly spaced over a data set, and their masks, see `to_draw`."""
    return to_draw(dataset, canvas.evenly_spaced(len(dataset), 4), device)


def write_samples(folder: Path, image: Tensor, masks: Tensor) -> None:
    """Write masks (n, side, side), bool, of an image (c, h, w) as PNGs of its size, enlarged by nearest.

    sample_00.png, ...: 0 and 255. mean.png: 255 is a mean of 1. variance.png: 255 is 1/4, the largest
    possible. picture.png: the image, contours, mean and variance. Files that exist are kept, as masks may
    have been corrected by hand."""
    h, w = image.shape[1:]
    digits = max(2, len(str(len(masks) - 1)))
    mean = masks.float().mean(0)
    maps = {f"sample_{i:0{digits}}.png": mask for i, mask in enumerate(masks)}
    maps |= {"mean.png": mean, "variance.png": variance_of(mean) / VARIANCE_MAX}
    for name, values in maps.items():
        if not (folder / name).exists():
            pixels = interpolate(values[None, None].float(), (h, w), mode="nearest-exact")[0, 0]
            with whole_file(folder / name) as file:
                Image.fromarray((255 * pixels).round().byte().numpy()).save(file, format="PNG")
    if (folder / "picture.png").exists():
        return
    # Only made smaller, never larger; a very long image keeps at least a pixel.
    size = [max(1, round(side * min(1, PICTURE_SIDE / max(h, w)))) for side in (h, w)]
    smaller = interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    # Only what is drawn is enlarged: all samples of a large image would take gigabytes as floats.
    *contours, mean = interpolate(torch.cat([masks[:CONTOURS].float(), mean[None]])[None], size,
                                  mode="nearest-exact")[0]
    canvas.save(samples_picture(smaller, torch.stack(contours), mean, len(masks)), folder / "picture.png")


def variance_of(mean: Any) -> Any:
    """The variance per pixel of binary masks with this mean, in [0, 1/4]."""
    return mean * (1 - mean)


def prediction_grid(images: Array, masks: Array, samples: Array, small: bool = False) -> Figure:
    """Qualitative results, as in the paper's figures: experts, samples and their variance, a row per image.

    The first samples are shown, as many as fit, and at most EXPERTS experts; the variance is over all
    samples. All panels but the first show the part of the image, framed there, that holds every mask shown.
    small: 600 pixels wide, the whole image with contours, up to NARROW_EXPERTS experts and 4 samples."""
    images, masks, samples = checked(
        images=(images, "m c h w"), masks=(masks, "m k h w"), samples=(samples, "m n h w"))
    m, count, h, w = masks.shape
    # The first of each, never the best: a reader should be able to trust what is not shown.
    masks = masks[:, :NARROW_EXPERTS if small else EXPERTS]
    k = masks.shape[1]
    shown = samples[:, :4 if small else max(2, 7 - k)]  # ten panels, if k <= 5
    n = shown.shape[1]
    gaps = [WIDE_GAP, *[GAP] * (k - 1), WIDE_GAP, *[GAP] * (n - 1)]
    titles = ["experts", *[f"expert {i + 1}" for i in range(k)], *[f"sample {i + 1}" for i in range(n)]]
    if small:
        note = first_of(k, count, "experts")
        figure, axes = panel_grid([[0, *gaps]] * m, h / w, titles, bottom=0.25 if note else 0.1, width=6,
                                  dpi=100)
        figure.text(0.5, 0.02, note or "", ha="center", va="bottom", fontsize=canvas.SMALL)
    else:
        titles = ["image", *titles, "variance"]
        figure, axes = panel_grid([[0, GAP, *gaps, WIDE_GAP]] * m, h / w, titles, experts=count, right=BAR)
    for row, image, experts, of_image, first in zip(axes, images, masks, samples, shown, strict=True):
        contours, *others = row if small else row[1:-1]
        show(contours, image)
        draw_contours(contours, experts)
        for ax, mask in zip(others, [*experts, *first], strict=True):
            show(ax, mask)
        # The frame of an expert's mask has the colour of its contour.
        for i, ax in enumerate(others[:k]):
            ax.spines[:].set(linewidth=1.5, color=canvas.colour(i))
        if not small:
            show(row[0], image)
            variance = show(row[-1], of_image.var(axis=0), "magma", high=VARIANCE_MAX)
            canvas.zoom(row[1:], experts, first, framed=row[0])
    if not small:
        canvas.colour_bar(figure, variance, axes[:, -1])
    return figure


def comparison(images: Array, masks: Array, drawn: Mapping[str, Array]) -> Figure:
    """The experts of each image, and below them as many samples of each system (paper, Fig. 4).

    drawn: samples (m, n, h, w) by the system's label, of which the first are shown, as many as there are
    experts, but at least 3 and at most NARROW_EXPERTS. Two images stand side by side, the next two below. The
    panels show the part of an image, framed on the left, that holds every mask shown."""
    images, masks = checked(images=(images, "m c h w"), masks=(masks, "m k h w"))
    m, count, h, w = masks.shape
    masks = masks[:, :NARROW_EXPERTS]
    k = masks.shape[1]
    # With fewer samples than 3 nothing would show how they differ.
    columns = max(3, k)
    shown = {name: checked(samples=(samples, "m n h w"))[0][:, :columns] for name, samples in drawn.items()}
    names, side_by_side = ["experts", *shown], min(2, m)
    # Where two images stand side by side, a wide gap separates them.
    gaps = [0, *[GAP] * columns, *[WIDE_GAP, *[GAP] * columns] * (side_by_side - 1)]
    below = -(-m // side_by_side)  # how many times the rows are repeated
    # Labels of systems may be long: they are measured, so that none is cut off.
    widest = max(TextPath((0, 0), name, size=canvas.SMALL).get_extents().width for name in names)  # points
    note = first_of(k, count, "experts")
    figure, axes = panel_grid([gaps] * len(names) * below, h / w, names=names * below, between=0.22,
                              left=widest / 72 + 0.15, bottom=0.25 if note else 0.05)
    figure.text(0.5, 0.05 / figure.get_figheight(), note or "", ha="center", fontsize=canvas.SMALL)
    for ax in axes[:, 0]:
        ax.yaxis.label.set(rotation=0, ha="right", va="center", fontsize=canvas.SMALL)
    # A group of panels (rows, columns) for each image; where m is odd, nothing stands beside the last.
    groups = axes.reshape(below, len(names), side_by_side, -1).swapaxes(1, 2).reshape(
        below * side_by_side, len(names), -1)
    for ax in groups[m:].flat:
        ax.remove()
    for i, (group, image, experts) in enumerate(zip(groups, images, masks)):
        rows = [experts, *(samples[i] for samples in shown.values())]
        for row, members in zip(group, rows, strict=True):
            of_experts = members is experts
            show(row[0], image)
            draw_contours(row[0], members, samples=not of_experts)
            row[0].set_title(f"image {i + 1}" if of_experts else "contours", fontsize=canvas.SMALL, pad=3)
            for j, (ax, mask) in enumerate(zip(row[1:], members)):
                show(ax, mask)
                ax.set_title(f"{'expert' if of_experts else 'sample'} {j + 1}", fontsize=canvas.SMALL, pad=3)
            for ax in row[1 + len(members):]:  # where there are fewer masks than columns
                ax.remove()
        canvas.zoom(group[:, 1:].flat, *rows, framed=group[0, 0])
    return figure


def samples_picture(image: Array, contours: Array, mean: Array, count: int) -> Figure:
    """Samples for one image that no expert has marked: contours of the first, mean and variance of all.

    contours: the first samples (m, h, w), 0/1, of `count`; mean (h, w) of all. All panels but the first show
    the part of the image, framed there, that holds the contours."""
    image, contours, mean = checked(image=(image, "c h w"), contours=(contours, "m h w"), mean=(mean, "h w"))
    h, w = mean.shape
    titles = ["image", first_of(len(contours), count, "samples") or f"{count} samples", "mean", "variance"]
    figure, (row,) = panel_grid([[0, GAP, GAP, BAR]], h / w, titles, bottom=0.1, right=BAR)
    show(row[0], image)
    show(row[1], image)
    draw_contours(row[1], contours, samples=True)
    canvas.colour_bar(figure, show(row[2], mean), row[2:3])
    canvas.colour_bar(figure, show(row[3], variance_of(mean), "magma", high=VARIANCE_MAX), row[3:])
    canvas.zoom(row[1:], contours, framed=row[0])
    return figure


def case_sheet(items: Sequence[tuple[Tensor, Tensor]]) -> Figure:
    """Images (above) and their experts' contours on them (below), to see whether these lie as they should.

    items: (image (c, h, w), masks (k, h, w)) of one size; k may differ between them."""
    k = max(len(masks) for _, masks in items)
    h, w = items[0][0].shape[1:]
    figure, axes = panel_grid([[0, *[GAP] * (len(items) - 1)]] * 2, h / w,
                              [f"image {i + 1}" for i in range(len(items))], ["image", "contours"], experts=k,
                              left=0.3)
    for (image, masks), (above, below) in zip(items, axes.T, strict=True):
        pixels, outlines = checked(image=(image, "c h w"), masks=(masks, "k h w"))
        show(above, pixels)
        show(below, pixels)
        draw_contours(below, outlines)
    return figure
