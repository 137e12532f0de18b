"""Data sets of a few images and settings of a few weights, on which every script runs in about a second."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from data import Writer

KILLS = int(os.environ.get("ATFM_KILLS", 3))  # of each kind of process; more search for rarer moments
SIZE = 8  # of a batch
PATIENTS = 15  # 64/16/20 %: 10 to train, 2 to validate, 3 to test
DATA = ["--crop", "8", "--limit", "6", "--device", "cpu"]
LOOP = ["--val_images", "2", "--val_samples", "2", "--val_steps", "1"]
GTR = [*DATA, *LOOP, "--num_filters", "4", "8", "--rank", "2"]
PRIOR = [*DATA, *LOOP, "--dim", "4", "--dim_mults", "1", "--annotators_per_pass", "4"]
TEST = [*DATA, "--samples", "2", "4", "--seeds", "0", "1"]


def where(data_path: Path | str, output_path: Path | str) -> list[str]:
    """The flags for the data and for the folder of a run."""
    return ["--data_path", str(data_path), "--output_path", str(output_path)]


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Leaves out the pictures, which take most of the time of a tiny run."""
    patch.setattr("fig.draw_samples", lambda *arguments: None)
    patch.setattr("fig.draw_comparison", lambda *arguments: None)
    patch.setattr("fig.validation_picture", lambda *arguments: np.zeros((2, 2, 3), np.uint8))


def seeded(seed: int = 0, device: str | torch.device = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def batch(b: int = 2, k: int = 3, channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (b, channels, SIZE, SIZE) and masks (b, k, SIZE, SIZE), the same at each call."""
    image = torch.rand(b, channels, SIZE, SIZE, generator=seeded(1))
    return image, (torch.rand(b, k, SIZE, SIZE, generator=seeded(2)) < 0.4).float()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars in a run's TensorBoard files, of each step the last value: name -> (step, value), ..."""
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0})  # 0: all points, not a random choice
    events.Reload()
    return {name: sorted({event.step: event.value for event in events.Scalars(name)}.items())
            for name in events.Tags()["scalars"]}


def checkpoints(folder: Path) -> list[str]:
    """Names of the checkpoints in a folder."""
    return sorted(path.name for path in folder.glob("*.pt"))


def equal(a: object, b: object) -> bool:
    """Whether two contents of checkpoints are the same, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_runs(ours: Path, theirs: Path) -> None:
    """The same checkpoints with the same weights, optimizer, best score and place in the run."""
    assert checkpoints(ours) == checkpoints(theirs) != []
    for name in checkpoints(theirs):
        a, b = torch.load(ours / name), torch.load(theirs / name)
        assert equal(a, b), name


def to_older_form(path: Path) -> None:
    """Rewrites a checkpoint as it was written until November 2026."""
    content = torch.load(path)
    del content["state"]["epoch"]
    content["config"]["checkpoint"] = content["config"].pop("recompute", False)
    if "amp" in content["config"]:
        content["config"]["amp"] = content["config"]["amp"] == "True"
    for name in ("schedule", "clip", "backbone", "network", "loss", "nll_first", "nll_weight", "temperature",
                 "tta"):
        content["config"].pop(name, None)
    # Settings that were removed since.
    content["config"] |= {"groups": 1, "draws": 1, "times": "uniform", "objective": "velocity"}
    content.pop("preset", None)
    for group in content["optimizer"]["param_groups"]:  # AdamW without weight decay, which is Adam
        group["decoupled_weight_decay"] = True
    torch.save(content, path)


def expert_masks(random: np.random.RandomState, annotators: int, size: int) -> np.ndarray:
    """Discs about the middle whose radii differ between annotators: (k, size, size) of 0/1."""
    distance = np.hypot(*(np.indices((size, size)) - (size - 1) / 2 - random.uniform(-1, 1, (2, 1, 1))))
    return (distance < random.uniform(1, 4, (annotators, 1, 1))).astype(np.uint8)


def image_of(random: np.random.RandomState, masks: np.ndarray) -> np.ndarray:
    """A noisy picture of what the experts marked: (h, w) in [0, 1]."""
    return 0.6 * masks.mean(0) + 0.4 * random.uniform(size=masks.shape[1:])


def write_lidc_h5(path: Path) -> Path:
    """Two slices of each patient in the layout of data.store, 128 x 128 pixels with 4 experts."""
    random = np.random.RandomState(0)
    with Writer(path, "rendered by the tests") as writer:
        for row in range(2 * PATIENTS):
            masks = expert_masks(random, 4, 128)
            image = np.uint8(255 * image_of(random, masks))
            writer.append(image, masks, patient=row // 2, nodule=row // 2, slice=row % 2)
    return path


def write_lidc_folder(folder: Path) -> Path:
    """A slice of each patient in the pickle format, in two files."""
    random = np.random.RandomState(1)
    slices = {}
    for patient in range(PATIENTS):
        masks = expert_masks(random, 4, 128)
        slices[f"LIDC-IDRI-{patient:04d}_nodule00_slice000"] = {
            "image": image_of(random, masks), "masks": [mask.astype(float) for mask in masks],
            "series_uid": f"1.3.6.{patient}"}
    folder.mkdir()
    names = sorted(slices)
    for number, part in enumerate((names[:8], names[8:])):
        (folder / f"part{number}.pickle").write_bytes(pickle.dumps({name: slices[name] for name in part}))
    return folder


def write_dicom(path: Path, pixels: np.ndarray, **tags: Any) -> Path:
    """A DICOM image of uint8 or int16, (h, w)."""
    header, bits = pydicom.Dataset(), 8 * pixels.itemsize
    header.SOPClassUID, header.SOPInstanceUID = pydicom.uid.CTImageStorage, pydicom.uid.generate_uid()
    header.PhotometricInterpretation, header.SamplesPerPixel = "MONOCHROME2", 1
    header.PixelRepresentation = int(pixels.dtype.kind == "i")
    header.BitsAllocated, header.BitsStored, header.HighBit = bits, bits, bits - 1
    (header.Rows, header.Columns), header.PixelData = pixels.shape, pixels.tobytes()
    for name, value in tags.items():
        setattr(header, name, value)
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    header.save_as(path, enforce_file_format=True)
    return path


def write_isic_folder(folder: Path) -> Path:
    """Images/ and Segmentations/ of 256 x 256 pixels with 3 experts of different styles."""
    random = np.random.RandomState(2)
    for name in ("Images", "Segmentations"):
        (folder / name).mkdir(parents=True)
    for number in range(PATIENTS):
        masks = expert_masks(random, 3, 256)
        rgb = np.stack([image_of(random, masks) for _ in range(3)], axis=-1)
        Image.fromarray(np.uint8(255 * rgb)).save(folder / "Images" / f"ISIC_{number:07d}.jpg", quality=95)
        for annotator, mask in enumerate(masks):
            name = f"ISIC_{number:07d}_{annotator}_{'fmp'[annotator]}.png"
            Image.fromarray(255 * mask).save(folder / "Segmentations" / name)
    return folder
