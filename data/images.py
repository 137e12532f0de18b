"""Image files, of ISIC3 and of users: decoding, channels, and how they are fitted into a square."""

import io
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from metadata_manager import GREY

DEPTHS = (8, 10, 12, 14, 16)  # bits that scanners use of 16
FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
GREY_8, GREY_16 = ("1", "L", "LA"), ("I;16", "I;16L", "I;16B")  # Pillow's modes
COLOUR = ("P", "RGB", "RGBA", "CMYK")


def decoded(path: Path, formats: tuple[str, ...] = FORMATS,
            modes: tuple[str, ...] = GREY_8 + GREY_16 + COLOUR) -> Image.Image:
    """The one image of a file, turned as its EXIF says, in one of Pillow's `modes`.

    Raises ValueError, naming the file, for anything else, and for what is too large to decode safely."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Read as a whole first: from a file, Pillow would reserve what a damaged chunk claims to hold.
            with Image.open(io.BytesIO(path.read_bytes()), formats=formats) as file:
                # An MPO is a phone's JPEG with more behind it, such as a depth map: page 1 is the photo.
                pages = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)
                if file.mode not in modes or pages > 1:
                    raise ValueError(f"colour mode {file.mode}, {pages} pages")
                return ImageOps.exif_transpose(file)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: too large to be decoded safely ({error}); make it smaller") from error
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # Pillow's decoders raise anything on damaged files, OSError to SyntaxError
        raise ValueError(f"{path}: not an image that can be read ({error}); expected one image of mode "
                         f"{', '.join(modes)} as {', '.join(formats)}; convert or restore it") from error


def pixels_of(image: Image.Image) -> np.ndarray:
    """(h, w) uint8 or uint16, or (h, w, 3) uint8 of colours and of a palette; transparency is left out."""
    if image.mode in GREY_16:
        return np.asarray(image).astype(np.uint16)  # of either byte order
    return np.asarray(image.convert("L" if image.mode in GREY_8 else "RGB"))


def opened(path: Path) -> Image.Image:
    """A user's PNG, JPEG, TIFF or BMP file, as `decoded`. Raises FileNotFoundError or ValueError."""
    if not path.exists():
        raise FileNotFoundError(f"--images {path}: no such file")
    try:
        return decoded(path)
    except ValueError as error:
        raise ValueError(f"--images {error}") from error


def read_image(path: Path) -> Tensor:
    """A user's image file as (c, h, w) in [0, 1], c = 1 if it is grey, 3 otherwise; errors as `opened`.

    8 bits per channel are divided by 255. Of 16, as many count as the largest value needs, since scanners
    store 12 in 16; a line says so."""
    pixels = pixels_of(opened(path))
    bits = 8
    if pixels.dtype == np.uint16:
        bits = next(depth for depth in DEPTHS if pixels.max() < 2 ** depth)
        if bits < 16:
            print(f"{path}: 16 bits per pixel, values up to {pixels.max()}: taken as {bits} bits")
    return torch.from_numpy(np.atleast_3d(pixels.astype(np.float32) / (2 ** bits - 1))).permute(2, 0, 1)


def fitted(image: Tensor, channels: int, side: int) -> Tensor:
    """An image (c, h, w) stretched to (1, channels, side, side), antialiased; errors as of `of_channels`."""
    return resized(of_channels(image, channels), (side, side))[None]


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(c, h, w) -> (c, *size), antialiased; its proportions are not kept."""
    # Imported late: it takes two seconds, and most commands resize nothing.
    from torchvision.transforms.v2.functional import resize
    return resize(image, list(size), antialias=True)


def of_channels(image: Tensor, channels: int) -> Tensor:
    """(c, h, w) -> (channels, h, w). RGB becomes grey as in ST-Net's input; grey is repeated to RGB.

    Raises ValueError for numbers of channels that neither does."""
    if channels == 1 and len(image) == 3:
        return torch.einsum("chw,c->hw", image, image.new_tensor(GREY))[None]
    if len(image) != channels and (len(image), channels) != (1, 3):
        raise ValueError(f"an image of {len(image)} channels, expected {channels} as in training")
    return image.expand(channels, -1, -1)


@dataclass(frozen=True)
class Fit:
    """How an image of height x width lies in a square: scaled in its proportions, in the middle of zeros."""

    height: int
    width: int
    side: int
    grow: bool = False  # enlarge a smaller image; without, only larger ones are scaled

    @property
    def inner(self) -> tuple[int, int]:
        """Height and width of the image in the square."""
        longest = max(self.height, self.width)
        scale = self.side / longest if self.grow or longest > self.side else 1.0
        # A very long image keeps at least a pixel.
        return max(1, round(self.height * scale)), max(1, round(self.width * scale))

    @property
    def window(self) -> tuple[slice, slice]:
        """The image's rows and columns in the square."""
        top, left = ((self.side - length) // 2 for length in self.inner)
        return slice(top, top + self.inner[0]), slice(left, left + self.inner[1])

    def put(self, image: Tensor) -> Tensor:
        """(c, height, width) float -> (c, side, side), antialiased."""
        square = image.new_zeros(len(image), self.side, self.side)
        if self.inner != (self.height, self.width):
            image = resized(image, self.inner)
        square[(slice(None), *self.window)] = image
        return square

    def put_pixels(self, image: Tensor) -> np.ndarray:
        """(c, height, width) float in [0, 1] -> (side, side, c) uint16, for a store."""
        # Rounding in the interpolation may leave [0, 1].
        square = self.put(image).clamp(0, 1).movedim(0, -1)
        return (square * 65535).round().numpy().astype(np.uint16)

    def put_masks(self, masks: Tensor) -> Tensor:
        """(k, height, width) bool -> (k, side, side) bool: a pixel that is half covered is marked."""
        return self.put(masks.float()) >= 0.5 - 1e-6  # whichever way the interpolation rounds


def unique_names(paths: Sequence[Path]) -> list[str]:
    """A folder name for each file: its stem, after its folder's name if another has it or it is `image`.

    What is still taken, letter case aside, becomes name_2, name_3, ..."""
    stems = [unicodedata.normalize("NFC", path.stem.removesuffix(".nii")) for path in paths]
    stems = [stem if stem.strip(". ") else "image" for stem in stems]  # `..` would name another folder
    count = Counter(stem.casefold() for stem in stems)  # some file systems ignore case
    names: list[str] = []
    for path, stem in zip(paths, stems):
        if path.parent.name and (count[stem.casefold()] > 1 or stem.casefold() == "image"):
            stem = f"{unicodedata.normalize('NFC', path.parent.name)}_{stem}"
        name, number = stem, 2
        while name.casefold() in map(str.casefold, names):
            name, number = f"{stem}_{number}", number + 1
        names.append(name)
    return names
