"""Samples for images of the user's own, `--images` of the test: no expert has marked them, so no scores."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import resize

import fig
from fig.canvas import VARIANCE_MAX, whole_file
from metrics import variance_map
from metrics.evaluation import image_seed
from models import checkpoint
from models.atfm import grey
from models.command_line import Settings
from models.stages import output
from models.systems import trained_size

if TYPE_CHECKING:
    from models.testing import System

FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
GREY_8, GREY_16 = ("1", "L", "LA"), ("I;16", "I;16L", "I;16B")  # Pillow's modes
COLOUR = ("P", "RGB", "RGBA", "CMYK")
PICTURE_SIDE = 512  # pixels; a larger image is drawn smaller in picture.png, as contours take long


def draw_own_images(settings: Settings, systems: Sequence["System"], device: torch.device) -> None:
    """Writes samples of the first flow of `systems`, or else of act-gtr, for each image of --images.

    Into <output_path>/images/<stem>/ go max(--samples) masks, their mean, variance and a picture: `write`.
    The first of --seeds and the file's name seed an image's samples, whatever other images are drawn.
    Raises FileNotFoundError or ValueError, before anything is drawn, if one of the files is not an image."""
    config = settings.experiment.sampling
    system = next((system for system in systems if system.evaluations > 0), systems[0])
    side, channels = trained_on(system.checkpoints[-1], settings)
    paths, n = [Path(name) for name in config.images], max(config.samples)
    for path in paths:
        read_image(path)
    for path, name in zip(paths, unique_names(paths)):
        image, folder = read_image(path), output(settings) / "images" / name
        generator = torch.Generator(device).manual_seed(image_seed(config.seeds[0], path.name))
        probabilities = system.sample(fitted(image, channels, side).to(device), n, generator)[0].cpu()
        if not probabilities.isfinite().all():
            raise ValueError(f"{path}: {system.label} gave probabilities that are not finite; "
                             "the model has diverged")
        write(folder, image, probabilities >= 0.5)
        print(f"{path}: {described(image)} resized to {side} x {side} {colours(channels)}; "
              f"{n} samples of {system.label} in {folder} "
              f"(mean.png: 255 is 1; variance.png: 255 is {VARIANCE_MAX})", flush=True)


def trained_on(path: str, settings: Settings) -> tuple[int, int]:
    """Side in pixels and channels of the images that a checkpoint was trained on.

    The authors' checkpoints do not say; theirs are those of the dataset and --crop."""
    metadata = settings.experiment.metadata
    if settings.experiment.sampling.released_checkpoint:
        return metadata.crop or metadata.size, metadata.channels
    config = checkpoint.load(Path(path))["config"]
    return trained_size(config), config["channels"]


def unique_names(paths: Sequence[Path]) -> list[str]:
    """A folder name for each file: its stem, or stem_2, stem_3, ... where an earlier file has taken it."""
    names: list[str] = []
    for path in paths:
        name, number = path.stem, 2
        while name.casefold() in map(str.casefold, names):  # some file systems ignore case
            name, number = f"{path.stem}_{number}", number + 1
        names.append(name)
    return names


def read_image(path: Path) -> Tensor:
    """A PNG, JPEG, TIFF or BMP file as (c, h, w) in [0, 1], c = 1 if it is grey, 3 otherwise.

    8 bits per channel are divided by 255, 16 by 65535; transparency is left out. Turned as EXIF says.
    Raises FileNotFoundError, or ValueError for what is not one such image or too large to decode safely."""
    if not path.exists():
        raise FileNotFoundError(f"--images {path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Read as a whole first: from a file, Pillow would reserve what a damaged chunk claims to hold.
            with Image.open(io.BytesIO(path.read_bytes()), formats=FORMATS) as file:
                # An MPO is a phone's JPEG with more behind it, such as a depth map: page 1 is the photo.
                pages = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)
                if file.mode not in GREY_8 + GREY_16 + COLOUR or pages > 1:
                    raise ValueError(f"colour mode {file.mode}, {pages} pages")
                image = ImageOps.exif_transpose(file)
                if image.mode in GREY_16:
                    return torch.from_numpy(np.asarray(image).astype(np.float32) / 65535)[None]
                pixels = np.asarray(image.convert("L" if image.mode in GREY_8 else "RGB"), np.float32) / 255
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"--images {path}: too large to be decoded safely ({error}); "
                         "make it smaller") from error
    except Exception as error:  # Pillow's decoders raise anything on damaged files, OSError to SyntaxError
        raise ValueError(f"--images {path}: not an image that can be read ({error}); expected one grey or "
                         f"RGB image of 8 or 16 bits per channel as {', '.join(FORMATS)}") from error
    return torch.from_numpy(np.atleast_3d(pixels)).permute(2, 0, 1)


def fitted(image: Tensor, channels: int, side: int) -> Tensor:
    """An image (c, h, w) as a model takes it: (1, channels, side, side), antialiased.

    Its proportions are not kept. RGB becomes grey as in ST-Net's input; grey is repeated to RGB."""
    batch = grey(image[None]) if channels == 1 else image[None].expand(-1, channels, -1, -1)
    return resize(batch, [side, side], antialias=True)


def write(folder: Path, image: Tensor, masks: Tensor) -> None:
    """Writes masks (n, side, side), bool, of an image (c, h, w) as PNGs of its size, enlarged by nearest.

    sample_00.png, ...: 0 and 255. mean.png: 255 is a mean of 1. variance.png: 255 is 1/4, the largest
    possible. picture.png: the image, contours, mean and variance. Samples of an earlier run are removed."""
    h, w = image.shape[1:]
    digits = max(2, len(str(len(masks) - 1)))
    names = [f"sample_{i:0{digits}}.png" for i in range(len(masks))]
    for name, mask in zip(names, masks):
        write_png(folder / name, enlarged(mask, h, w))
    write_png(folder / "mean.png", enlarged(masks.float().mean(0), h, w))
    write_png(folder / "variance.png", enlarged(variance_map(masks[None])[0] / VARIANCE_MAX, h, w))
    shrink = min(1.0, PICTURE_SIDE / max(h, w))
    size = [max(1, round(h * shrink)), max(1, round(w * shrink))]
    drawn = interpolate(masks[None].float(), size, mode="nearest-exact")[0]
    fig.save(fig.samples_picture(resize(image, size, antialias=True), drawn), folder / "picture.png")
    for old in folder.glob("sample_*.png"):
        if old.name not in names:
            old.unlink()


def enlarged(values: Tensor, h: int, w: int) -> np.ndarray:
    """A map (side, side) in [0, 1] as (h, w) uint8, nearest, 1 as 255."""
    pixels = interpolate(values[None, None].float(), (h, w), mode="nearest-exact")[0, 0]
    return (255 * pixels).round().byte().numpy()


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Writes (h, w) uint8, whole or not at all."""
    with whole_file(path) as file:
        Image.fromarray(pixels).save(file, format="PNG")


def described(image: Tensor) -> str:
    """Height, width and colours, and whether resizing to a square will change the proportions."""
    c, h, w = image.shape
    return f"{h} x {w} {colours(c)}" + ("" if h == w else " (not square, so its proportions change)")


def colours(channels: int) -> str:
    """What the channels are called."""
    return "grey" if channels == 1 else "RGB"
