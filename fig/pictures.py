"""Pictures of images, experts' masks and samples: in training, in testing, of a user's own images.

image (c, h, w) in [0, 1]; masks (k, h, w) of 0/1; samples (n, h, w), of 0/1 or probabilities; the
plural `images` and what goes with it have m images in front. Arrays or tensors on any device; other shapes
and values raise ValueError. A system to draw is sample(images, n, generator=None) -> (m, n, h, w) in [0, 1];
an item of a data set is (image, masks), see `to_draw`.
"""

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
from fig.canvas import BAR, GAP, VARIANCE_MAX, WIDE_GAP, Array, checked, draw_contours, panel_grid, show
from metrics.files import whole_file

CONTOURS = 8  # of samples on one image
PICTURE_SIDE = 512  # pixels; a larger image is drawn smaller in picture.png, as contours take long


def to_draw(dataset: Any, indices: Sequence[int], device: torch.device | str = "cpu"
            ) -> tuple[Tensor, Tensor]:
    """Items of a data set as (images, masks) on a device; of masks as many as each of these images has."""
    images, masks = zip(*(dataset[index] for index in indices))
    k = min(map(len, masks))
    return torch.stack(images).to(device), torch.stack([of_image[:k] for of_image in masks]).to(device)


@torch.no_grad()
def validation_picture(sample: Callable[..., Tensor], dataset: Any, device: torch.device | str = "cpu"
                       ) -> np.ndarray:
    """For TensorBoard, (h, w, 3) uint8: contours, experts' masks and 4 samples of the first 4 images."""
    images, masks = to_draw(dataset, range(min(4, len(dataset))), device)
    samples = sample(images, 4, generator=torch.Generator(device).manual_seed(0)) >= 0.5
    agg = FigureCanvasAgg(prediction_grid(images, masks, samples, small=True))
    agg.draw()
    return np.array(agg.buffer_rgba())[..., :3]


@torch.no_grad()
def draw_samples(sample: Callable[..., Tensor], dataset: Any, folder: Path, name: str, seed: int,
                 device: torch.device | str = "cpu") -> Tensor:
    """Write <name>.png, 16 samples on each of four images, and <name>_uncertainty.png of the first of them.

    The images are those of `four_of`. In file names ", " and " " become "_". Returns the samples, bool."""
    images, masks = four_of(dataset, device)
    samples = sample(images, 16, generator=torch.Generator(device).manual_seed(seed)) >= 0.5
    name = name.replace(", ", "_").replace(" ", "_")
    canvas.save(prediction_grid(images, masks, samples), folder / f"{name}.png")
    canvas.save(variance_and_entropy(images[0], masks[0], samples[0]), folder / f"{name}_uncertainty.png")
    return samples


def draw_comparison(drawn: Mapping[str, Tensor], dataset: Any, folder: Path) -> None:
    """Write comparison.png, samples of several systems on the same four images; drawn: of `draw_samples`."""
    if len(drawn) > 1:
        canvas.save(comparison(*four_of(dataset), drawn), folder / "comparison.png")


def four_of(dataset: Any, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Four images, evenly spaced over a data set, and their masks."""
    return to_draw(dataset, canvas.evenly_spaced(len(dataset), 4), device)


def write_samples(folder: Path, image: Tensor, masks: Tensor) -> None:
    """Write masks (n, side, side), bool, of an image (c, h, w) as PNGs of its size, enlarged by nearest.

    sample_00.png, ...: 0 and 255. mean.png: 255 is a mean of 1. variance.png: 255 is 1/4, the largest
    possible. picture.png: the image, contours, mean and variance. Samples of an earlier run are removed."""
    h, w = image.shape[1:]
    digits = max(2, len(str(len(masks) - 1)))
    maps = {f"sample_{i:0{digits}}.png": mask for i, mask in enumerate(masks)}
    maps["mean.png"] = masks.float().mean(0)
    maps["variance.png"] = masks.double().var(0, correction=0) / VARIANCE_MAX
    for name, values in maps.items():
        pixels = interpolate(values[None, None].float(), (h, w), mode="nearest-exact")[0, 0]
        with whole_file(folder / name) as file:
            Image.fromarray((255 * pixels).round().byte().numpy()).save(file, format="PNG")
    size = [max(1, round(side * min(1, PICTURE_SIDE / max(h, w)))) for side in (h, w)]
    smaller = interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    drawn = interpolate(masks[None].float(), size, mode="nearest-exact")[0]
    canvas.save(samples_picture(smaller, drawn), folder / "picture.png")
    for old in set(folder.glob("sample_*.png")) - {folder / name for name in maps}:
        old.unlink()


def prediction_grid(images: Array, masks: Array, samples: Array, small: bool = False) -> Figure:
    """Qualitative results, as in the paper's figures: experts, samples and their variance, a row per image.

    As many samples as fit are shown, evenly spaced. All panels but the first show the part of the image,
    framed there, that holds every mask shown. small: 600 pixels wide, the whole image with contours, experts
    and 4 samples only."""
    images, masks, samples = checked(
        images=(images, "m c h w"), masks=(masks, "m k h w"), samples=(samples, "m n h w"))
    m, k, h, w = masks.shape
    shown = canvas.evenly_spaced(samples.shape[1], 4 if small else max(1, 7 - k))  # ten panels, if k <= 6
    gaps = [WIDE_GAP, *[GAP] * (k - 1), WIDE_GAP, *[GAP] * (len(shown) - 1)]
    titles = ["experts", *[f"expert {i + 1}" for i in range(k)], *[f"sample {i + 1}" for i in shown]]
    if small:
        figure, axes = panel_grid([[0, *gaps]] * m, h / w, titles, bottom=0.1, width=6, dpi=100)
    else:
        titles = ["image", *titles, "variance"]
        figure, axes = panel_grid([[0, GAP, *gaps, WIDE_GAP]] * m, h / w, titles, experts=k, right=BAR)
    for row, image, experts, of_image in zip(axes, images, masks, samples, strict=True):
        contours, *others = row if small else row[1:-1]
        show(contours, image)
        draw_contours(contours, experts)
        for ax, mask in zip(others, [*experts, *of_image[shown]], strict=True):
            show(ax, mask)
        for i, ax in enumerate(others[:k]):
            ax.spines[:].set(linewidth=1.5, color=canvas.colour(i))
        if not small:
            show(row[0], image)
            variance = show(row[-1], of_image.var(axis=0), "magma", high=VARIANCE_MAX)
            canvas.zoom(row[1:], experts, of_image[shown], framed=row[0])
    if not small:
        canvas.colour_bar(figure, variance, axes[:, -1])
    return figure


def comparison(images: Array, masks: Array, drawn: Mapping[str, Array]) -> Figure:
    """The experts of each image, and below them as many samples of each system (paper, Fig. 4).

    drawn: samples (m, n, h, w) by the system's label. A group of columns for each image; the panels show the
    part of it, framed on the left, that holds every mask shown."""
    images, masks = checked(images=(images, "m c h w"), masks=(masks, "m k h w"))
    m, k, h, w = masks.shape
    shown = {name: checked(samples=(samples, "m n h w"))[0][:, :k] for name, samples in drawn.items()}
    gaps = [0, *[GAP] * k, *[WIDE_GAP, *[GAP] * k] * (m - 1)]
    names = ["experts", *shown]
    widest = max(TextPath((0, 0), name, size=canvas.SMALL).get_extents().width for name in names)  # points
    figure, axes = panel_grid([gaps] * len(names), h / w, names=names, top=0.05, left=widest / 72 + 0.15)
    for ax in axes[:, 0]:
        ax.yaxis.label.set(rotation=0, ha="right", va="center", fontsize=canvas.SMALL)
    groups = axes.reshape(len(axes), m, k + 1).swapaxes(0, 1)  # (m, rows, k + 1)
    for i, (group, image, experts) in enumerate(zip(groups, images, masks, strict=True)):
        rows = [experts, *(samples[i] for samples in shown.values())]
        for row, members in zip(group, rows, strict=True):
            show(row[0], image)
            draw_contours(row[0], members, alike=members is not experts)
            for ax, mask in zip(row[1:], members):
                show(ax, mask)
        canvas.zoom(group[:, 1:].flat, *rows, framed=group[0, 0])
    return figure


def variance_and_entropy(image: Array, masks: Array, samples: Array) -> Figure:
    """Uncertainty of one image: mean, variance and entropy per pixel, of experts above, of samples below.

    Entropy is of the mean p, -p log2 p - (1 - p) log2 (1 - p), in bits, so at most 1. The panels show the
    part of the image that holds the contours of the first: all experts' above, CONTOURS samples' below."""
    image, masks, samples = checked(
        image=(image, "c h w"), masks=(masks, "k h w"), samples=(samples, "n h w"))
    k, h, w = masks.shape
    figure, axes = panel_grid(
        [[0, GAP, GAP, BAR]] * 2, h / w, ["contours", "mean", "variance", "entropy (bits)"],
        ["experts", "samples"], experts=k, left=0.3, right=BAR, width=6.6)
    for row, members in zip(axes, (masks, samples), strict=True):
        show(row[0], image)
        p = members.mean(axis=0)
        show(row[1], p)
        variance = show(row[2], members.var(axis=0), "magma", high=VARIANCE_MAX)
        entropy = show(row[3], -sum(q * np.log2(np.where(q > 0, q, 1)) for q in (p, 1 - p)), "magma")
    drawn = samples[canvas.evenly_spaced(len(samples), CONTOURS)]
    draw_contours(axes[0, 0], masks)
    draw_contours(axes[1, 0], drawn, alike=True)
    canvas.zoom(axes.flat, masks, drawn)
    canvas.colour_bar(figure, variance, axes[:, 2])
    canvas.colour_bar(figure, entropy, axes[:, 3])
    return figure


def samples_picture(image: Array, samples: Array) -> Figure:
    """Samples for one image that no expert has marked: contours of CONTOURS of them, mean and variance.

    All panels but the first show the part of the image, framed there, that holds the contours."""
    image, samples = checked(image=(image, "c h w"), samples=(samples, "n h w"))
    n, h, w = samples.shape
    drawn = samples[canvas.evenly_spaced(n, CONTOURS)]
    titles = ["image", f"{len(drawn)} of {n} samples", "mean", "variance"]
    figure, (row,) = panel_grid([[0, GAP, GAP, BAR]], h / w, titles, bottom=0.1, right=BAR)
    show(row[0], image)
    show(row[1], image)
    draw_contours(row[1], drawn, alike=True)
    canvas.colour_bar(figure, show(row[2], samples.mean(axis=0)), row[2:3])
    canvas.colour_bar(figure, show(row[3], samples.var(axis=0), "magma", high=VARIANCE_MAX), row[3:])
    canvas.zoom(row[1:], drawn, framed=row[0])
    return figure


def augmentation_sheet(images: Array, masks: Array, moved_images: Array, moved_masks: Array) -> Figure:
    """Images before (above) and after (below) augmentation with their contours: do both move together?"""
    images, masks, moved_images, moved_masks = checked(
        images=(images, "m c h w"), masks=(masks, "m k h w"), moved_images=(moved_images, "m c h w"),
        moved_masks=(moved_masks, "m k h w"))
    m, k, h, w = masks.shape
    figure, axes = panel_grid([[0, *[GAP] * (m - 1)]] * 2, h / w, names=["before", "after"], experts=k,
                              top=0.05, left=0.3)
    for ax, image, experts in zip(axes.flat, [*images, *moved_images], [*masks, *moved_masks], strict=True):
        show(ax, image)
        draw_contours(ax, experts)
    return figure


def case_sheet(items: Sequence[tuple[Tensor, Tensor]]) -> Figure:
    """Images (above) and their experts' contours on them (below): do they lie as they should?

    items: (image (c, h, w), masks (k, h, w)) of one size, k may differ."""
    k = max(len(masks) for _, masks in items)
    h, w = items[0][0].shape[1:]
    figure, axes = panel_grid([[0, *[GAP] * (len(items) - 1)]] * 2, h / w, experts=k, top=0.05)
    for (image, masks), (above, below) in zip(items, axes.T, strict=True):
        pixels, outlines = checked(image=(image, "c h w"), masks=(masks, "k h w"))
        show(above, pixels)
        show(below, pixels)
        draw_contours(below, outlines)
    return figure
