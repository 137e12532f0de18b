"""Pictures of images, experts' masks and samples: qualitative results, uncertainty maps, augmentation."""

from collections.abc import Iterable

import numpy as np
from matplotlib.figure import Figure

from fig.canvas import (
    BAR,
    COLOURS,
    GAP,
    NORMAL,
    VARIANCE_MAX,
    WIDE_GAP,
    Array,
    as_array,
    colour_bar,
    draw_contours,
    evenly_spaced,
    expert_legend,
    frame,
    panel_grid,
    show_experts,
    show_image,
    show_map,
    title_panels,
    window,
    zoom,
)


def prediction_grid(images: Array, masks: Array, samples: Array, variance: Array | None = None, *,
                    columns: int = 10, zoomed: bool = True) -> Figure:
    """Qualitative results, as in the paper's figures: experts, samples and their variance, a row per image.

    images (m, c, h, w) in [0, 1], c = 1 or 3; masks (m, k, h, w) 0/1; samples (m, n, h, w) 0/1 or
    probabilities. variance (m, h, w): pixel-wise population variance; None: of `samples`.
    At most `columns` panels a row, unless k leaves no room for one of the n samples; those shown are evenly
    spaced over them.
    zoomed: all panels but the first show a part of the image, framed there, that holds every mask shown.
    Raises ValueError for shapes that do not fit together and for values outside [0, 1]."""
    images, masks, samples = _batch(images, masks, samples)
    m, n, h, w = samples.shape
    variance = samples.var(axis=1) if variance is None else as_array("variance", variance, (m, h, w))
    k = masks.shape[1]
    shown = evenly_spaced(n, max(1, columns - 3 - k))
    gaps = [0, GAP, WIDE_GAP, *[GAP] * (k - 1), WIDE_GAP, *[GAP] * (len(shown) - 1), WIDE_GAP]
    figure, axes = panel_grid(m, gaps, h / w, bottom=0.3, right=BAR)
    samples = samples[:, shown]
    for row, image, experts, drawn, spread in zip(axes, images, masks, samples, variance, strict=True):
        show_image(row[0], image)
        show_image(row[1], image)
        draw_contours(row[1], experts)
        show_experts(row[2:2 + k], experts)
        for ax, sample in zip(row[2 + k:-1], drawn, strict=True):
            show_map(ax, sample)
        last = show_map(row[-1], spread, "magma", 0, VARIANCE_MAX)
        if zoomed:
            edges = window(np.concatenate([experts, drawn]))
            frame(row[0], edges)
            zoom(row[1:], edges)
    colour_bar(figure, last, axes[:, -1], (0, VARIANCE_MAX))
    titles = [*_numbered("expert", range(k)), *_numbered("sample", shown)]
    title_panels(axes[0], ["image", "experts", *titles, "variance"])
    expert_legend(figure, k)
    return figure


def validation_picture(images: Array, masks: Array, samples: Array, *, shown: int = 4) -> Figure:
    """A small `prediction_grid` for TensorBoard, 600 pixels wide: contours, experts' masks, `shown` samples.

    Shapes, ranges and errors as there; `figure_to_array` renders it."""
    images, masks, samples = _batch(images, masks, samples)
    m, n, h, w = samples.shape
    k, chosen = masks.shape[1], evenly_spaced(n, shown)
    gaps = [0, WIDE_GAP, *[GAP] * (k - 1), WIDE_GAP, *[GAP] * (len(chosen) - 1)]
    figure, axes = panel_grid(m, gaps, h / w, width=6, dpi=100)
    for row, image, experts, drawn in zip(axes, images, masks, samples[:, chosen], strict=True):
        show_image(row[0], image)
        draw_contours(row[0], experts)
        show_experts(row[1:1 + k], experts)
        for ax, sample in zip(row[1 + k:], drawn, strict=True):
            show_map(ax, sample)
    title_panels(axes[0], ["experts", *_numbered("expert", range(k)), *_numbered("sample", chosen)])
    return figure


def variance_and_entropy(image: Array, masks: Array, samples: Array, *, contours: int = 8,
                         zoomed: bool = True) -> Figure:
    """Uncertainty of one image: mean, variance and entropy per pixel, of experts above, of samples below.

    image (c, h, w) in [0, 1]; masks (k, h, w) 0/1; samples (n, h, w) 0/1 or probabilities.
    Entropy is of the mean p, -p log2 p - (1 - p) log2 (1 - p), in bits, so at most 1. The first panel has all
    experts' contours above, those of `contours` samples below.
    zoomed: show the part of the image that holds the contours.
    Raises ValueError for shapes that do not fit and for values outside [0, 1]."""
    image = as_array("image", image, ("c", "h", "w"))
    h, w = image.shape[1:]
    masks, samples = as_array("masks", masks, ("k", h, w)), as_array("samples", samples, ("n", h, w))
    figure, axes = panel_grid(2, [0, GAP, GAP, BAR], h / w, left=0.3, right=BAR, width=6.6, bottom=0.3)
    drawn = samples[evenly_spaced(len(samples), contours)]
    for row, members in zip(axes, (masks, samples), strict=True):
        show_image(row[0], image)
        p = members.mean(axis=0)
        show_map(row[1], p)
        variance = show_map(row[2], members.var(axis=0), "magma", 0, VARIANCE_MAX)
        entropy = show_map(row[3], binary_entropy(p), "magma")
    draw_contours(axes[0, 0], masks)
    draw_contours(axes[1, 0], drawn, COLOURS[-1:])
    axes[0, 0].set_ylabel("experts", fontsize=NORMAL)
    axes[1, 0].set_ylabel("samples", fontsize=NORMAL)
    if zoomed:
        zoom(axes.flat, window(np.concatenate([masks, drawn])))
    colour_bar(figure, variance, axes[:, 2], (0, VARIANCE_MAX))
    colour_bar(figure, entropy, axes[:, 3], (0, 1))
    title_panels(axes[0], ["contours", "mean", "variance", "entropy (bits)"])
    expert_legend(figure, len(masks))
    return figure


def samples_picture(image: Array, samples: Array, *, contours: int = 8, zoomed: bool = True) -> Figure:
    """Samples for one image that no expert has marked: contours of some of them, mean and variance per pixel.

    image (c, h, w) in [0, 1], c = 1 or 3; samples (n, h, w) 0/1 or probabilities. The contours are of at most
    `contours` samples, evenly spaced over the n.
    zoomed: all panels but the first show the part of the image, framed there, that holds the contours.
    Raises ValueError for shapes that do not fit and for values outside [0, 1]."""
    image = as_array("image", image, ("c", "h", "w"))
    h, w = image.shape[1:]
    samples = as_array("samples", samples, ("n", h, w))
    drawn = samples[evenly_spaced(len(samples), contours)]
    figure, axes = panel_grid(1, [0, GAP, GAP, BAR], h / w, right=BAR)
    row = axes[0]
    show_image(row[0], image)
    show_image(row[1], image)
    draw_contours(row[1], drawn, COLOURS[-1:])
    mean = show_map(row[2], samples.mean(axis=0))
    variance = show_map(row[3], samples.var(axis=0), "magma", 0, VARIANCE_MAX)
    if zoomed:
        edges = window(drawn)
        frame(row[0], edges)
        zoom(row[1:], edges)
    colour_bar(figure, mean, row[2:3], (0, 1))
    colour_bar(figure, variance, row[3:], (0, VARIANCE_MAX))
    title_panels(row, ["image", f"{len(drawn)} of {len(samples)} samples", "mean", "variance"])
    return figure


def binary_entropy(p: np.ndarray) -> np.ndarray:
    """Entropy in bits of Bernoulli(p), 0 for p = 0 and p = 1; same shape as p."""
    certain = (p <= 0) | (p >= 1)
    q = np.where(certain, 0.5, p)
    return np.where(certain, 0.0, -q * np.log2(q) - (1 - q) * np.log2(1 - q))


def augmentation_sheet(images: Array, masks: Array, augmented_images: Array,
                       augmented_masks: Array) -> Figure:
    """Images before (above) and after (below) augmentation with their contours: do both move together?

    images, augmented_images (m, c, h, w) in [0, 1]; masks, augmented_masks (m, k, h, w) in [0, 1].
    Raises ValueError for shapes that do not fit together and for values outside [0, 1]."""
    images = as_array("images", images, ("m", "c", "h", "w"))
    m, _, h, w = images.shape
    masks = as_array("masks", masks, (m, "k", h, w))
    augmented_images = as_array("augmented_images", augmented_images, images.shape)
    augmented_masks = as_array("augmented_masks", augmented_masks, masks.shape)
    figure, axes = panel_grid(2, [0, *[GAP] * (m - 1)], h / w, top=0.05, left=0.3, bottom=0.3)
    pairs = (("before", images, masks), ("after", augmented_images, augmented_masks))
    for row, (name, some_images, some_masks) in zip(axes, pairs, strict=True):
        row[0].set_ylabel(name, fontsize=NORMAL)
        for ax, image, experts in zip(row, some_images, some_masks, strict=True):
            show_image(ax, image)
            draw_contours(ax, experts)
    expert_legend(figure, masks.shape[1])
    return figure


def _batch(images: Array, masks: Array, samples: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Checked images (m, c, h, w), masks (m, k, h, w) and samples (m, n, h, w)."""
    images = as_array("images", images, ("m", "c", "h", "w"))
    m, _, h, w = images.shape
    return images, as_array("masks", masks, (m, "k", h, w)), as_array("samples", samples, (m, "n", h, w))


def _numbered(name: str, indices: Iterable[int]) -> list[str]:
    """Titles counted from 1."""
    return [f"{name} {i + 1}" for i in indices]
