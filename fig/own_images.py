"""Samples for a user's images, `--images` of the test: no expert has marked them, so there are no scores.

A volume is read, sampled and written before the next. Its samples are kept as bits, so that 100 of a CT of
300 slices of 512 x 512 pixels take less than a gigabyte.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from data.images import Fit, fitted, of_channels, opened, read_image, unique_names
from data.readers import reader_called
from data.volumes import axis_of, image_values, limits_of, read_scan, rescaled, suffix_of, write_volume
from fig.canvas import VARIANCE_MAX
from fig.pictures import variance_of, write_samples
from metadata_manager import Metadata
from metrics.evaluation import image_seed, progress
from metrics.folder import free_folder

NAMES = 3  # last parts of a path that seed its samples: two folders and the file
Sampler = Callable[[Tensor], Tensor]  # a square image (1, c, side, side) -> n masks (n, side, side), bool


def draw_own_images(systems: Sequence[Any], files: Sequence[str], n: int, seed: int, folder: Path,
                    device: torch.device | str, metadata: Metadata) -> None:
    """Write n samples for each image file into a separate folder below `folder`, named as the file.

    systems: as `models.systems.System`; the first flow samples, or without one the first system. metadata: of
    the data set that they were trained on, whose reader says how an image is fitted, see FITS. The seed and
    the names of a file and two folders about it seed its samples, whatever other images are drawn. Files that
    exist are never replaced, see `free_folder`.
    Raises FileNotFoundError or ValueError, before anything is drawn, if one of the files is not such an
    image; ValueError for samples that are not finite."""
    system = next((system for system in systems if system.nfe > 0), systems[0])
    paths = [Path(name).expanduser() for name in files]
    fit = reader_called(metadata.reader).fit
    check, draw = FITS[fit]
    # All first: a misspelt name should not come to light after hours of sampling.
    for path in paths:
        check(path, system, metadata)
    for path, name in zip(paths, unique_names(paths)):
        # All that samples depend on: other settings get another folder.
        settings = {"image": str(path.absolute()), "samples": n, "seed": seed,
                    "image_digest": hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest(),
                    "system": {field: getattr(system, field) for field in
                               ("label", "weights", "solver", "steps", "precision")},
                    "fitted_as": [fit, metadata.size, metadata.axis, metadata.window],
                    "device": torch.device(device).type}
        sampler = partial(draw_masks, system, n, seed, path, device)
        # Called once the samples are there: a failure leaves no empty folder behind.
        claim = partial(claimed_folder, folder / name, settings)
        print(f"{path}: {draw(path, system, sampler, metadata, claim)}", flush=True)


def claimed_folder(folder: Path, settings: dict[str, Any]) -> Path:
    """The folder of these settings, see `free_folder`; a line says if it has files of an earlier run."""
    place = free_folder(folder, **settings)
    if len(list(place.iterdir())) > 1:
        print(f"{place}: of an earlier run of this command; the files that are there are kept")
    return place


def draw_masks(system: Any, n: int, seed: int, path: Path, device: torch.device | str, image: Tensor
               ) -> Tensor:
    """n masks (n, side, side), bool, of an image (1, c, side, side).

    Their random numbers follow from the seed, and from the names of the file and the two folders about it."""
    # Not the whole path, so that a copy of the folders on another machine gives the same samples.
    name = "/".join(path.absolute().parts[-NAMES:])
    generator = torch.Generator(device).manual_seed(image_seed(seed, name))
    samples = system.sample(image.to(device), n, generator=generator)[0].cpu()
    if not samples.isfinite().all():
        raise ValueError(f"{path}: {system.label} gave probabilities that are not finite; "
                         "the model has diverged")
    return samples >= 0.5


def check_picture(path: Path, system: Any, metadata: Metadata) -> None:
    """Raises FileNotFoundError or ValueError for a file that is not an image in a format of `data.images`."""
    opened(path)


def draw_stretched(path: Path, system: Any, sampler: Sampler, metadata: Metadata, claim: Callable[[], Path]
                   ) -> str:
    """Write PNGs, see `write_samples`, for an image of any shape; returns what was done, in words."""
    image = read_image(path)
    side, channels = system.trained_on.side, system.trained_on.channels
    masks, folder = sampler(fitted(image, channels, side)), claim()
    write_samples(folder, image, masks)
    c, h, w = image.shape
    stretched = "" if h == w else " (not square, so its proportions change)"
    return (f"{h} x {w} {_colours(c)}{stretched} resized to {side} x {side} {_colours(channels)}; "
            f"{len(masks)} samples of {system.label} in {folder} "
            f"(mean.png: 255 is 1; variance.png: 255 is {VARIANCE_MAX})")


def check_scan(path: Path, system: Any, metadata: Metadata) -> None:
    """Raises FileNotFoundError or ValueError for a file that is not an image in a format of `data.volumes`.

    Also where the model takes another number of channels, or was trained on crops, as these are not cut."""
    side, channels = system.trained_on.side, system.trained_on.channels
    if side != metadata.size:
        raise ValueError(f"--crop {side}: {system.label} was trained on a crop of {side} x {side} pixels, "
                         "--images are not cropped; train without --crop")
    values = image_values(read_scan(path), channels)
    try:
        # A single pixel is enough to see whether the channels fit.
        of_channels(torch.zeros(values.shape[-1], 1, 1), channels)
    except ValueError as error:
        raise ValueError(f"--images {path}: {error}") from error


def draw_padded(grow: bool, path: Path, system: Any, sampler: Sampler, metadata: Metadata,
                claim: Callable[[], Path]) -> str:
    """Write NIfTI for a volume or a NIfTI file, PNGs for another image; returns what was done, in words.

    grow: images smaller than the model's are enlarged. Every slice of a volume is sampled from the same
    random numbers."""
    values = image_values(read_scan(path), system.trained_on.channels)
    volume = values if values.ndim == 4 else values[None]  # (z, h, w, c)
    axis = axis_of(values.shape, metadata.axis) if values.ndim == 4 else 0
    limits = limits_of(volume, metadata.window)  # of the whole volume: its slices keep their contrast
    shape, slices = volume.shape[:3], np.moveaxis(volume, axis, 0)
    h, w = slices.shape[1:3]
    fit, packed = Fit(h, w, metadata.size, grow=grow), []
    for pixels in progress(slices, path.name if len(slices) > 1 else None):
        image = torch.from_numpy(rescaled(pixels, *limits)).float().movedim(-1, 0)
        square = fit.put(of_channels(image, system.trained_on.channels))[None]
        # What is marked on the padding is cut off.
        masks = sampler(square)[(slice(None), *fit.window)]
        packed.append(np.packbits(masks.flatten(1).numpy(), axis=1))  # (n, bytes)
    del values, volume, slices  # what is written needs their room
    folder = claim()
    if len(packed) > 1 or suffix_of(path).startswith(".nii"):
        write_volumes(folder, np.stack(packed), fit.inner, shape, axis, path)
    else:
        write_samples(folder, image, masks)
    return (f"{len(packed)} images of {h} x {w}; {len(masks)} samples of {system.label}, mean and variance "
            f"in {folder}")


def write_volumes(folder: Path, packed: np.ndarray, size: tuple[int, int], shape: Sequence[int], axis: int,
                  like: Path) -> None:
    """Write a volume's masks as NIfTI of its size `shape` (z, h, w), with its file's orientation and affine.

    packed (slices, n, bytes): the masks of `size` as bits, of the slices along `axis`, enlarged to their size
    in the volume by nearest. The files sample_00.nii.gz, ... hold 0 and 1, mean.nii.gz and variance.nii.gz
    float32. Files that exist are kept."""
    sides, n = np.delete(shape, axis).tolist(), packed.shape[1]

    def masks_of(bits: np.ndarray) -> Tensor:
        pixels = np.unpackbits(bits, axis=1, count=size[0] * size[1])
        return torch.from_numpy(pixels).view(len(bits), *size)

    def write(name: str, maps: Tensor) -> None:
        # A file that is there may have been corrected by hand.
        if not (folder / name).exists():
            # Nearest, so that masks stay 0 and 1.
            volume = interpolate(maps[:, None], sides, mode="nearest-exact")[:, 0].numpy()
            write_volume(folder / name, np.moveaxis(volume, 0, axis), like)

    for i in range(n):
        write(f"sample_{i:0{max(2, len(str(n - 1)))}}.nii.gz", masks_of(packed[:, i]))
    # Slice by slice: all samples of a volume as floats would not fit into memory.
    mean = torch.stack([masks_of(of_slice).float().mean(0) for of_slice in packed])
    write("mean.nii.gz", mean)
    write("variance.nii.gz", variance_of(mean))


# How a file is checked and drawn, by `fit` of the reader of the data set that the model was trained on.
FITS: dict[str, tuple[Callable[..., None], Callable[..., str]]] = {
    "stretched": (check_picture, draw_stretched),  # to a square, as images of LIDC and ISIC3 are square
    # In its proportions in the middle of a square of zeros, as by `data.prepare`; a small one as it is, or
    # enlarged.
    "padded": (check_scan, partial(draw_padded, False)),
    "enlarged": (check_scan, partial(draw_padded, True)),
}


def _colours(channels: int) -> str:
    return "grey" if channels == 1 else "RGB"
