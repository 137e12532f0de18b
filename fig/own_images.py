"""Samples for images of the user's own, `--images` of the test: no expert has marked them, so no scores.

A volume is read, sampled and written before the next. Its samples are kept as bits, so that 100 of a CT of
300 slices of 512 x 512 pixels take less than a gigabyte.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from data.images import Fit, fitted, of_channels, opened, read_image, unique_names
from data.volumes import alone, axis_of, read_scan, suffix_of, unit_range, write_volume
from fig.canvas import VARIANCE_MAX
from fig.pictures import variance_of, write_samples
from metadata_manager import Metadata
from metrics.evaluation import image_seed, progress
from metrics.report import write_text

NAMES = 3  # of a file, its folder and the one above, that tell images apart wherever they all lie
Sampler = Callable[[Tensor], Tensor]  # a square image (1, c, side, side) -> n masks (n, side, side), bool


def draw_own_images(systems: Sequence[Any], files: Sequence[str], n: int, seed: int, folder: Path,
                    device: torch.device | str, metadata: Metadata) -> None:
    """Write n samples for each image file into a folder of its own below `folder`, named as the file.

    systems: as `models.systems.System`; the first flow samples, or without one the first system. metadata: of
    the data set that they were trained on, by whose reader an image is fitted, see FITTED. The seed and the
    names of a file and two folders about it seed its samples, whatever other images are drawn. What this
    command did not make is never replaced, see `claimed_folder`.
    Raises FileNotFoundError or ValueError, before anything is drawn, if one of the files is not such an image
    or the reader is not in FITTED; ValueError for samples that are not finite."""
    system = next((system for system in systems if system.nfe > 0), systems[0])
    paths = [Path(name).expanduser() for name in files]
    if metadata.reader not in FITTED:
        raise ValueError(f"--images: found reader {metadata.reader!r} of {metadata.what}, expected one of "
                         f"{', '.join(FITTED)}; say in fig.own_images.FITTED how its images are fitted")
    check, draw = FITTED[metadata.reader]
    for path in paths:
        check(path, system, metadata)
    for path, name in zip(paths, unique_names(paths)):
        settings = {"image": str(path.absolute()), "image_digest": digest(path), "samples": n, "seed": seed,
                    "system": {field: getattr(system, field) for field in
                               ("label", "weights", "solver", "steps", "precision")},
                    "fitted_as": [metadata.reader, metadata.size, metadata.axis, metadata.window],
                    "device": torch.device(device).type}
        sampler = partial(draw_masks, system, n, seed, path, device)
        claim = partial(claimed_folder, folder, name, settings)
        print(f"{path}: {draw(path, system, sampler, metadata, claim)}", flush=True)


def draw_masks(system: Any, n: int, seed: int, path: Path, device: torch.device | str, image: Tensor
               ) -> Tensor:
    """n masks (n, side, side), bool, of an image (1, c, side, side).

    Their random numbers follow from the seed, and from the names of the file and the two folders about it."""
    name = "/".join(path.absolute().parts[-NAMES:])
    generator = torch.Generator(device).manual_seed(image_seed(seed, name))
    samples = system.sample(image.to(device), n, generator=generator)[0].cpu()
    if not samples.isfinite().all():
        raise ValueError(f"{path}: {system.label} gave probabilities that are not finite; "
                         "the model has diverged")
    return samples >= 0.5


# Where images are stretched to a square, as those of LIDC and ISIC3 are square.


def check_picture(path: Path, system: Any, metadata: Metadata) -> None:
    """Raises FileNotFoundError or ValueError for a file that is not an image in a format of `data.images`."""
    opened(path)


def draw_stretched(path: Path, system: Any, sampler: Sampler, metadata: Metadata, claim: Callable) -> str:
    """Write PNGs, see `write_samples`, for an image of any shape; returns what was done, in words."""
    image = read_image(path)
    side, channels = system.trained_on.side, system.trained_on.channels
    masks = sampler(fitted(image, channels, side))
    with claim() as folder:
        write_samples(folder, image, masks)
    c, h, w = image.shape
    stretched = "" if h == w else " (not square, so its proportions change)"
    return (f"{h} x {w} {_colours(c)}{stretched} resized to {side} x {side} {_colours(channels)}; "
            f"{len(masks)} samples of {system.label} in {folder} "
            f"(mean.png: 255 is 1; variance.png: 255 is {VARIANCE_MAX})")


# Where images keep their proportions, in the middle of a square of zeros, as `data.prepare` does it.


def check_scan(path: Path, system: Any, metadata: Metadata) -> None:
    """Raises FileNotFoundError or ValueError for a file that is not an image in a format of `data.volumes`.

    Also where the model takes another number of channels, or was trained on crops, as these are not cut."""
    side, channels = system.trained_on.side, system.trained_on.channels
    if side != metadata.size:
        raise ValueError(f"--crop {side}: {system.label} was trained on a crop of {side} x {side} pixels, "
                         "--images are not cropped; train without --crop")
    values = alone(read_scan(path), channels)
    try:
        of_channels(torch.zeros(values.shape[-1], 1, 1), channels)
    except ValueError as error:
        raise ValueError(f"--images {path}: {error}") from error


def draw_padded(grow: bool, path: Path, system: Any, sampler: Sampler, metadata: Metadata, claim: Callable
                ) -> str:
    """Write NIfTI for a volume or a NIfTI file, PNGs for another image; returns what was done, in words.

    grow: images smaller than the model's are enlarged. Every slice of a volume is sampled from the same
    random numbers."""
    values = alone(read_scan(path), system.trained_on.channels)
    volume = values if values.ndim == 4 else values[None]  # (z, h, w, c)
    axis = axis_of(values.shape, metadata.axis) if values.ndim == 4 else 0
    sizes = np.delete(volume.shape[:3], axis).tolist()
    fit = Fit(*sizes, metadata.size, grow=grow)
    masks, extremes = Bits(), np.array([volume.min(), volume.max()], volume.dtype)
    for j in progress(range(volume.shape[axis]), path.name if volume.shape[axis] > 1 else None):
        image = _scaled(np.moveaxis(volume, axis, 0)[j], extremes, metadata.window)
        square = fit.put(of_channels(image, system.trained_on.channels))[None]
        masks.append(sampler(square)[(slice(None), *fit.window)].numpy())
    shape = volume.shape[:3]
    as_volume = shape[axis] > 1 or suffix_of(path).startswith(".nii")
    del values, volume  # what is written needs their room
    with claim() as folder:
        if as_volume:
            write_volumes(folder, masks, shape, axis, path)
        else:
            write_samples(folder, image, torch.from_numpy(masks.slice(0)))
    return (f"{shape[axis]} images of {sizes[0]} x {sizes[1]}; {masks.n} samples of {system.label}, mean and "
            f"variance in {folder}")


def _scaled(values: np.ndarray, extremes: np.ndarray, window: Sequence[float]) -> Tensor:
    """A slice (h, w, c) of a volume as (c, h, w) in [0, 1]; extremes: lowest and highest of the volume."""
    # `unit_range` scales by what it is given: with the extremes, a slice is scaled as the whole volume would
    # be, which as float64 takes gigabytes.
    scaled = unit_range(np.concatenate([extremes, values.ravel()]), window)[2:].reshape(values.shape)
    return torch.from_numpy(scaled).float().movedim(-1, 0)


class Bits:
    """Binary masks, n of each slice of a volume, in a bit per pixel."""

    def __init__(self) -> None:
        self.n = 0
        self._size = (0, 0)
        self._slices: list[np.ndarray] = []  # of each slice (n, bytes)

    def append(self, masks: np.ndarray) -> None:
        """Add the masks (n, h, w), bool, of the next slice."""
        self.n, *self._size = masks.shape
        self._slices.append(np.packbits(masks.reshape(len(masks), -1), axis=1))

    def slice(self, j: int) -> np.ndarray:
        """All masks of slice j, (n, h, w) bool."""
        return self._unpacked(self._slices[j])

    def sample(self, i: int) -> np.ndarray:
        """Mask i of all slices, (z, h, w) bool."""
        return self._unpacked(np.stack([packed[i] for packed in self._slices]))

    def _unpacked(self, packed: np.ndarray) -> np.ndarray:
        h, w = self._size
        return np.unpackbits(packed, axis=1, count=h * w).reshape(-1, h, w).astype(bool)


def write_volumes(folder: Path, masks: Bits, shape: Sequence[int], axis: int, like: Path) -> None:
    """Write a volume's masks as NIfTI of its file's size `shape` (z, h, w), orientation and affine.

    The slices lie along `axis`; they are enlarged to their size in the volume by nearest. The files
    sample_00.nii.gz, ... hold 0 and 1, mean.nii.gz and variance.nii.gz float32."""
    size = np.delete(shape, axis).tolist()

    def write(name: str, slices: Iterator[np.ndarray], kind: type) -> None:
        volume = np.empty(shape, kind)
        for j, values in enumerate(slices):
            pixels = torch.from_numpy(values)[None, None].float()
            enlarged = interpolate(pixels, size, mode="nearest-exact")[0, 0]
            np.moveaxis(volume, axis, 0)[j] = enlarged.numpy()
        write_volume(folder / name, volume, like)

    digits = max(2, len(str(masks.n - 1)))
    for i in range(masks.n):
        write(f"sample_{i:0{digits}}.nii.gz", iter(masks.sample(i)), np.uint8)
    means = [masks.slice(j).mean(0, dtype=np.float32) for j in range(shape[axis])]
    write("mean.nii.gz", iter(means), np.float32)
    write("variance.nii.gz", (variance_of(mean) for mean in means), np.float32)


# How a file is checked and drawn, by the reader of the data set that the model was trained on.
FITTED: dict[str, tuple[Callable[..., None], Callable[..., str]]] = {
    "lidc": (check_picture, draw_stretched),
    "isic3": (check_picture, draw_stretched),
    "cases": (check_scan, partial(draw_padded, False)),
    "mmis": (check_scan, partial(draw_padded, True)),
}


@contextmanager
def claimed_folder(parent: Path, name: str, settings: dict[str, Any]) -> Iterator[Path]:
    """The folder parent/name to write an image's samples into, held against other processes meanwhile.

    It is made now, or was made by the same command: then its settings.json holds `settings`, and what is in
    it is as that command left it. Otherwise it is name_2, ...; a line says so. settings: JSON's types."""
    settings = json.loads(json.dumps(settings))  # as it will be read: tuples become lists
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{parent}: cannot be made a folder of samples ({error}); choose another --output_path"
                      ) from error
    for number in count(1):
        folder = parent / (name if number == 1 else f"{name}_{number}")
        try:
            os.mkdir(folder)  # of several processes, one succeeds
            made = True
        except FileExistsError:
            made = False
        if made or folder.is_dir():
            with _locked(folder, wait=made) as locked:
                if locked and (made or _is_of(folder, settings)):
                    write_text(folder / "settings.json", settings | {"files": {}})
                    yield folder
                    files = {path.name: digest(path) for path in sorted(folder.iterdir())
                             if path.is_file() and path.name != "settings.json"}
                    write_text(folder / "settings.json", settings | {"files": files})
                    return
        print(f"{folder}: kept, it is not of this command, image and model, or was changed; the samples go "
              "beside it")


def _is_of(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a folder was made with these settings, and no file was changed since it was complete."""
    try:
        written = json.loads((folder / "settings.json").read_text())
    except (OSError, ValueError):  # there is none, or it is not JSON
        return False
    if not isinstance(written, dict) or written != settings | {"files": written.get("files")}:
        return False
    return all(digest(folder / name) == known for name, known in written["files"].items()
               if (folder / name).exists())


@contextmanager
def _locked(folder: Path, wait: bool) -> Iterator[bool]:
    """Holds a lock on a folder while the block runs; False if another process has it.

    wait: until others, who only look whether it is theirs, have let go. On a file system without locks it is
    True."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError as error:
            locked = not isinstance(error, BlockingIOError)
        yield locked
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    """A fingerprint of a file's content."""
    content = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            content.update(block)
    return content.hexdigest()


def _colours(channels: int) -> str:
    return "grey" if channels == 1 else "RGB"
