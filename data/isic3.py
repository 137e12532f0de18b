"""ISIC3: a folder with Images/<image id>.* (RGB) and Segmentations/<image id>_*_<style>.png.

Three annotators outlined each lesion in one of three styles: f, m or p = 0, 1, 2.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.convert import Reader, files_in
from data.images import decoded
from data.splits import released_isic
from data.store import Store, nfc
from data.writer import Writer

ANNOTATORS = 3
STYLES = ("f", "m", "p")
FOLDERS = ("Images", "Segmentations")


def is_isic3(folder: Path) -> bool:
    """Whether a folder has the two folders of ISIC3."""
    return all((folder / name).is_dir() for name in FOLDERS)


def files_of(original: Path) -> list[Path]:
    """All images, then all masks of the folder, by name; prints how many files among the masks are not PNG.

    Raises ValueError if a sub-folder is missing or there are no images."""
    for name in FOLDERS:
        if not (original / name).is_dir():
            raise ValueError(f"{original}: no folder {name}; expected Images and Segmentations in it")
    images, others = (files_in(original / name) for name in FOLDERS)
    if not images:
        raise ValueError(f"{original / 'Images'}: no files; expected RGB images named <image id>.png or .jpg")
    masks = [path for path in others if path.suffix.lower() == ".png"]
    if unread := sorted(set(others) - set(masks)):
        print(f"warning: {len(unread)} files are passed over, as masks are .png, such as {unread[0]}; if "
              "they are masks, convert them", flush=True)
    return images + masks


def convert(files: Sequence[Path], writer: Writer) -> None:
    """Append every image that has exactly 3 masks to a store, by image id; prints how many are left out.

    Raises ValueError naming the file that is not an image, misnamed, of another size or not two-valued."""
    masks_of = _masks_by_image(files)
    complete = {image: masks for image, masks in masks_of.items() if len(masks) == ANNOTATORS}
    folder = files[0].parent.parent
    print(f"{folder}: {len(complete)} images with {ANNOTATORS} masks; "
          f"{len(masks_of) - len(complete)} with another number left out", flush=True)
    if not complete:
        raise ValueError(f"{folder}: no image has {ANNOTATORS} masks; expected masks named "
                         "Segmentations/<image id>_*_<style>.png")
    size = None  # of the first image, which the others must have: a batch needs one size
    for path, mask_paths in tqdm(complete.items(), desc=folder.name, unit="image", disable=None):
        image = _pixels(path, ("RGB",), size)
        size = image.shape[:2]
        masks = np.stack([_mask(mask, size) for mask in mask_paths])
        name = nfc(path.stem)
        writer.append(image, masks, patient=name, id=name, style=[_style(mask) for mask in mask_paths])


def _masks_by_image(files: Sequence[Path]) -> dict[Path, list[Path]]:
    """Masks of each image, both by name; prints how many masks are of images that are absent."""
    images: dict[str, Path] = {}
    masks_of: dict[Path, list[Path]] = {}
    without_image = []
    for path in files:  # images come first
        name = nfc(path.stem)
        if path.parent.name == "Images":
            if name in images:
                raise ValueError(f"{path}: same image id as {images[name].name}; expected one per id")
            images[name], masks_of[path] = path, []
            continue
        # Raises for a misnamed mask, even of an image that is not there.
        _style(path)
        parts = name.split("_")
        # Both the id and what follows it may contain "_": the longest id that is an image's.
        ids = ("_".join(parts[:end]) for end in range(len(parts) - 2, 0, -1))
        owner = next((images[name] for name in ids if name in images), None)
        (without_image if owner is None else masks_of[owner]).append(path)
    if without_image:
        print(f"warning: {len(without_image)} masks are left out, whose image is not there, such as "
              f"{without_image[0]}", flush=True)
    return masks_of


def _style(path: Path) -> int:
    """0, 1 or 2 from the last part of a mask's name."""
    style = path.stem.rsplit("_", 1)[-1]
    if style not in STYLES or path.stem.count("_") < 2:
        raise ValueError(f"{path}: no style in its name; expected <image id>_*_<style>.png, style f, m or p")
    return STYLES.index(style)


def _mask(path: Path, size: tuple[int, ...]) -> np.ndarray:
    """(h, w) uint8 of 0/1 from an image of 0 and one other value."""
    pixels = _pixels(path, ("L", "1"), size)
    values = np.unique(pixels)
    if len(values[values != 0]) > 1:
        raise ValueError(f"{path}: a mask with the values {values[:4]}, {len(values)} in all; "
                         "expected 0 and one other")
    return (pixels != 0).astype(np.uint8)


def _pixels(path: Path, modes: tuple[str, ...], size: tuple[int, ...] | None) -> np.ndarray:
    """(h, w) or (h, w, 3) uint8 of a PNG or JPEG of the size (h, w), if that is known."""
    # Mode 1 gives bool, which becomes 0 and 1.
    pixels = np.asarray(decoded(path, ("PNG", "JPEG"), modes)).astype(np.uint8)
    if size is not None and pixels.shape[:2] != size:
        raise ValueError(f"{path}: {pixels.shape[0]} x {pixels.shape[1]} pixels, "
                         f"expected {size[0]} x {size[1]} like the first image")
    return pixels


def released(store: Store) -> dict[str, np.ndarray]:
    """The authors' split of ISIC3, by style. Raises ValueError for a store without."""
    if store.style is None:
        raise ValueError("has no style; --split released needs it, use --split group")
    return released_isic(store.style)


READER = Reader("ISIC3 folder", is_isic3, files_of, convert, released)
