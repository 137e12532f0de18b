"""Samples for images of the user's own, `--images` of the test: no expert has marked them, so no scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data.images import fitted, opened, read_image, unique_names
from fig.canvas import VARIANCE_MAX
from fig.pictures import write_samples
from metrics.evaluation import image_seed


def draw_own_images(systems: Sequence[Any], files: Sequence[str], n: int, seed: int, folder: Path,
                    device: torch.device | str = "cpu") -> None:
    """Write n samples for each image file into folder/<stem>, see `write_samples`: of the first flow, if any.

    systems: as `models.systems.System`. The seed and a file's name seed an image's samples, whatever other
    images are drawn. Raises FileNotFoundError or ValueError, before anything is drawn, if one of the files is
    not an image; ValueError for samples that are not finite."""
    system = next((one for one in systems if one.evaluations > 0), systems[0])
    paths, side, channels = [Path(name) for name in files], system.trained_on.side, system.trained_on.channels
    for path in paths:
        opened(path)
    for path, name in zip(paths, unique_names(paths)):
        image = read_image(path)
        generator = torch.Generator(device).manual_seed(image_seed(seed, path.name))
        samples = system.sample(fitted(image, channels, side).to(device), n, generator=generator)[0].cpu()
        if not samples.isfinite().all():
            raise ValueError(f"{path}: {system.label} gave probabilities that are not finite; "
                             "the model has diverged")
        write_samples(folder / name, image, samples >= 0.5)
        c, h, w = image.shape
        stretched = "" if h == w else " (not square, so its proportions change)"
        print(f"{path}: {h} x {w} {_colours(c)}{stretched} resized to {side} x {side} {_colours(channels)}; "
              f"{n} samples of {system.label} in {folder / name} "
              f"(mean.png: 255 is 1; variance.png: 255 is {VARIANCE_MAX})", flush=True)


def _colours(channels: int) -> str:
    return "grey" if channels == 1 else "RGB"
