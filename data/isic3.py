"""ISIC3: a folder with Images/<image id>.* (RGB) and Segmentations/<image id>_*_<style>.png.

Three annotators outlined each lesion in one of three styles: f, m or p = 0, 1, 2.
"""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.cache import Writer

ANNOTATORS = 3
STYLES = ("f", "m", "p")


def source_files(folder: Path) -> list[Path]:
    """All images, then all masks of the folder, by name.

    Raises ValueError if a sub-folder is missing or there are no images."""
    for name in ("Images", "Segmentations"):
        if not (folder / name).is_dir():
            raise ValueError(f"{folder}: no folder {name}; expected Images and Segmentations in it")
    images = sorted(path for path in (folder / "Images").iterdir() if not path.name.startswith("."))
    if not images:
        raise ValueError(f"{folder / 'Images'}: no files; expected RGB images named <image id>.png or .jpg")
    return images + sorted((folder / "Segmentations").glob("[!.]*.png"))


def convert(files: Sequence[Path], writer: Writer) -> None:
    """Append every image that has exactly 3 masks to a cache, by image id; says how many were left out.

    Raises ValueError naming the file that is not an image, misnamed, of another size or not two-valued."""
    masks_of = _masks_by_image(files)
    complete = {image: masks for image, masks in masks_of.items() if len(masks) == ANNOTATORS}
    folder = files[0].parent.parent
    print(f"{folder}: {len(complete)} images with {ANNOTATORS} masks; "
          f"{len(masks_of) - len(complete)} with another number left out", flush=True)
    if not complete:
        raise ValueError(f"{folder}: no image has {ANNOTATORS} masks; expected masks named "
                         "Segmentations/<image id>_*_<style>.png")
    size = None
    for path, mask_paths in tqdm(complete.items(), desc=folder.name, unit="image", disable=None):
        image = _pixels(path, ("RGB",), size)
        size = image.shape[:2]
        masks = np.stack([_mask(mask, size) for mask in mask_paths])
        style = [_style(mask) for mask in mask_paths]
        writer.append(image, masks, patient=path.stem, id=path.stem, style=style)


def _masks_by_image(files: Sequence[Path]) -> dict[Path, list[Path]]:
    """Masks of each image, both by name; masks of images that are absent belong to none."""
    images: dict[str, Path] = {}
    for path in files:
        if path.parent.name == "Images":
            if path.stem in images:
                raise ValueError(f"{path}: same image id as {images[path.stem].name}; expected one per id")
            images[path.stem] = path
    masks_of: dict[Path, list[Path]] = {path: [] for path in images.values()}
    for path in files:
        if path.parent.name == "Segmentations":
            _style(path)
            parts = path.stem.split("_")
            # Both the id and what follows it may contain "_": the longest id that is an image's.
            ids = ("_".join(parts[:end]) for end in range(len(parts) - 2, 0, -1))
            owner = next((images[name] for name in ids if name in images), None)
            if owner is not None:
                masks_of[owner].append(path)
    return masks_of


def _style(path: Path) -> int:
    """0, 1 or 2 from the last part of a mask's name."""
    style = path.stem.rsplit("_", 1)[-1]
    if style not in STYLES or path.stem.count("_") < 2:
        raise ValueError(f"{path}: no style in its name; expected <image id>_*_<style>.png, style f, m or p")
    return STYLES.index(style)


def _mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """(h, w) uint8 of 0/1 from an image of 0 and one other value."""
    pixels = _pixels(path, ("L", "1"), size)
    values = np.unique(pixels)
    if len(values[values != 0]) > 1:
        raise ValueError(f"{path}: a mask with the values {values[:4]}, {len(values)} in all; "
                         "expected 0 and one other")
    return (pixels != 0).astype(np.uint8)


def _pixels(path: Path, modes: tuple[str, ...], size: tuple[int, int] | None) -> np.ndarray:
    """Decode a PNG or JPEG whose header has one of the modes and, if known, the size (h, w)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # From memory, where a part that announces 2 GB is not set aside room for before it is read.
            with Image.open(io.BytesIO(path.read_bytes()), formats=("PNG", "JPEG")) as image:
                found = (image.height, image.width)
                if image.mode not in modes:
                    raise WrongImage(f"{path}: colour mode {image.mode}, expected {' or '.join(modes)}; "
                                     "convert it")
                if size is not None and found != size:
                    raise WrongImage(f"{path}: {found[0]} x {found[1]} pixels, "
                                     f"expected {size[0]} x {size[1]} like the first image")
                return np.asarray(image).astype(np.uint8)
    except WrongImage:
        raise
    except Exception as error:  # Pillow's decoders raise anything on damaged files, OSError to SyntaxError
        raise ValueError(f"{path}: not a readable PNG or JPEG ({error}); restore or remove it") from error


class WrongImage(ValueError):
    """An image file that is readable but not what the data set should hold."""
