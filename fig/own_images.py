"""Samples for images of the user's own, `--images` of the test: no expert has marked them, so no scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.images import Fit, fitted, of_channels, opened, read_image, unique_names
from data.volumes import alone, axis_of, read_scan, suffix_of, unit_range, write_volume
from fig.canvas import VARIANCE_MAX
from fig.pictures import write_samples
from metadata_manager import Metadata
from metrics.evaluation import image_seed

NAMES = 3  # of a file, its folder and the one above, that tell images apart wherever they all lie
PADDED = ("cases", "mmis")  # readers that keep an image's proportions


def draw_own_images(systems: Sequence[Any], files: Sequence[str], n: int, seed: int, folder: Path,
                    device: torch.device | str = "cpu", metadata: Metadata | None = None) -> None:
    """Write n samples for each image file into folder/<stem>, see `write_samples`: of the first flow, if any.

    systems: as `models.systems.System`. metadata: of the data set that they were trained on; if it was
    padded, these are, and may be any file of `data.volumes`, see `draw_like_cases`. The seed and the
    names of a file and two folders about it seed its samples, whatever other images are drawn. Raises
    FileNotFoundError or ValueError, before anything is drawn, if one of them is not an image; ValueError for
    samples that are not finite."""
    system = next((one for one in systems if one.nfe > 0), systems[0])
    paths, side, channels = [Path(name) for name in files], system.trained_on.side, system.trained_on.channels
    if metadata is not None and metadata.reader in PADDED:
        return draw_like_cases(system, paths, n, seed, folder, device, metadata)
    for path in paths:
        opened(path)
    for path, name in zip(paths, unique_names(paths)):
        image = read_image(path)
        samples = drawn(system, fitted(image, channels, side), n, seed, path, device)
        write_samples(folder / name, image, samples)
        c, h, w = image.shape
        stretched = "" if h == w else " (not square, so its proportions change)"
        print(f"{path}: {h} x {w} {_colours(c)}{stretched} resized to {side} x {side} {_colours(channels)}; "
              f"{n} samples of {system.label} in {folder / name} "
              f"(mean.png: 255 is 1; variance.png: 255 is {VARIANCE_MAX})", flush=True)


def draw_like_cases(system: Any, paths: Sequence[Path], n: int, seed: int, folder: Path,
                    device: torch.device | str, metadata: Metadata) -> None:
    """The same for images as `data.prepare` takes them: scaled, cut and padded as it does, without --crop.

    Every slice of a volume is sampled from the same random numbers. NIfTI and other volumes give NIfTI, see
    `write_volumes`, other images PNGs."""
    channels, side = system.trained_on.channels, metadata.size
    if system.trained_on.side != side:
        raise ValueError(f"--crop {system.trained_on.side}: {system.label} was trained on a crop of {side} x "
                         f"{side} pixels, --images are not cropped; train without --crop")
    scans = [alone(read_scan(path), channels) for path in paths]
    for path, name, values in zip(paths, unique_names(paths), scans):
        number = axis_of(values.shape, metadata.axis) if values.ndim == 4 else 0
        image = torch.from_numpy(unit_range(values, metadata.window)).float()
        volume = image if values.ndim == 4 else image[None]
        planes = volume.movedim(number, 0).movedim(-1, 1)  # (z, c, h, w)
        fit = Fit(planes.shape[2], planes.shape[3], side, grow=metadata.reader == "mmis")
        squares = [fit.put(of_channels(plane, channels))[None] for plane in planes]
        masks = torch.stack([fit.back(drawn(system, square, n, seed, path, device)) for square in squares], 1)
        if len(planes) == 1 and not suffix_of(path).startswith(".nii"):
            write_samples(folder / name, planes[0], masks[:, 0])
        else:
            write_volumes(folder / name, masks.movedim(1, number + 1).numpy(), path)
        print(f"{path}: {len(planes)} images of {fit.height} x {fit.width}; {n} samples of {system.label}, "
              f"mean and variance in {folder / name}", flush=True)


def write_volumes(folder: Path, masks: np.ndarray, like: Path) -> None:
    """Masks (n, z, h, w) bool of a volume as NIfTI of its file's own size, orientation and affine.

    sample_00.nii.gz, ... of 0 and 1, mean.nii.gz, variance.nii.gz. Samples of an earlier run are removed."""
    digits = max(2, len(str(len(masks) - 1)))
    maps = {f"sample_{i:0{digits}}.nii.gz": mask.astype(np.uint8) for i, mask in enumerate(masks)}
    maps["mean.nii.gz"] = masks.mean(0, dtype=np.float32)
    maps["variance.nii.gz"] = masks.var(0, dtype=np.float32)
    for name, values in maps.items():
        write_volume(folder / name, values, like)
    for old in set(folder.glob("sample_*.nii.gz")) - {folder / name for name in maps}:
        old.unlink()


def drawn(system: Any, image: Tensor, n: int, seed: int, path: Path, device: torch.device | str) -> Tensor:
    """n masks (n, side, side) bool of an image (1, c, side, side).

    Their random numbers follow from the seed, and from the names of the file and the two folders about it."""
    name = "/".join(path.absolute().parts[-NAMES:])
    generator = torch.Generator(device).manual_seed(image_seed(seed, name))
    samples = system.sample(image.to(device), n, generator=generator)[0].cpu()
    if not samples.isfinite().all():
        raise ValueError(f"{path}: {system.label} gave probabilities that are not finite; "
                         "the model has diverged")
    return samples >= 0.5


def _colours(channels: int) -> str:
    return "grey" if channels == 1 else "RGB"
