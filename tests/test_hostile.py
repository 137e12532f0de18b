"""Damaged files: a reader reads them or names them in a plain error; it never crashes, hangs or fills memory.

ATFM_FUZZ is the number of files per reader. What a reader must refuse is in the tests of its module."""

import multiprocessing
import os
import pickle
import random
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
from data import Writer
from data.images import read_image
from metadata_manager import Metadata
from models import checkpoint

CASES = int(os.environ.get("ATFM_FUZZ", 60))
SECONDS, MEMORY = 30, 2**30  # that one file of a few kB may take
SIZE = 8
LIDC = Metadata(size=SIZE)
ISIC3 = Metadata("isic3_style_concat", reader="isic3", channels=3, annotators=3, size=SIZE)
MASKS = (np.arange(6 * 4 * SIZE * SIZE).reshape(6, 4, SIZE, SIZE) % 3 == 0).astype(np.uint8)
PIXELS = np.linspace(0, 1, 6 * SIZE * SIZE).reshape(6, SIZE, SIZE)


def write_pickles(folder: Path) -> None:
    for protocol in (2, 5):
        content = {f"{protocol}_{i}": {"image": PIXELS[i], "masks": list(MASKS[i]), "series_uid": f"1.2.{i}"}
                   for i in range(3)}
        (folder / f"{protocol}.pickle").write_bytes(pickle.dumps(content, protocol))


def write_isic3(folder: Path) -> None:
    for name in ("Images", "Segmentations"):
        (folder / name).mkdir()
    for i, suffix in enumerate((".png", ".jpg", ".jpg")):
        rgb = Image.fromarray(np.uint8(255 * PIXELS[i])).convert("RGB")
        rgb.save(folder / "Images" / f"ISIC_{i}{suffix}", progressive=i == 2)
        for mask, style in zip(MASKS[i], "fmp"):
            Image.fromarray(255 * mask).save(folder / "Segmentations" / f"ISIC_{i}_0_{style}.png")


def write_stores(folder: Path) -> None:
    """As we write them; as another program may: compressed, the patient a text of variable length."""
    with Writer(folder / "ours.h5", "a test") as writer:
        for i in range(6):
            image = np.uint16(65535 * PIXELS[i])
            writer.append(image, MASKS[i], patient=f"patient {i}", id=f"row {i}", nodule=0, slice=i)
    contents = {"images": np.uint8(255 * PIXELS), "masks_packed": np.packbits(MASKS.reshape(6, -1), axis=1),
                "patient": [f"patient {i}" for i in range(6)]}
    with h5py.File(folder / "foreign.h5", "w") as file:
        for name, value in contents.items():
            file.create_dataset(name, data=value, chunks=(2, *np.shape(value)[1:]), compression="gzip")


def write_phiseg(folder: Path) -> None:
    for name, uids, packing in (("text.hdf5", ["1.2.3", "1.2.4"], {"chunks": True, "compression": "gzip"}),
                                ("numbers.hdf5", [7, 9], {})):
        with h5py.File(folder / name, "w") as file:
            for number, fold in enumerate(("train", "val", "test")):
                rows = slice(2 * number, 2 * number + 2)
                file.create_dataset(f"{fold}/images", data=np.float32(PIXELS[rows]), **packing)
                file.create_dataset(f"{fold}/labels", data=np.moveaxis(MASKS[rows], 1, -1), **packing)
                file.create_dataset(f"{fold}/uids", data=uids)


def write_checkpoint(folder: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    for weight in model.parameters():  # not by backward(): autograd refuses a process forked after it ran
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    checkpoint.save(folder / "last.pt", {
        "stage": "GTR", "config": {"num_filters": (4, 8), "lr": 1e-3}, "model": model.state_dict(),
        "optimizer": optimizer.state_dict(), "state": {"step": 3, "best": 0.5}, "versions": {"torch": "2"}})


def read_checkpoint(path: Path) -> None:
    content = checkpoint.load(path, "GTR")
    checkpoint.fill(nn.Linear(3, 2), content, path)
    assert content["config"] == {"num_filters": (4, 8), "lr": 1e-3}
    assert content["state"] == {"step": 3, "best": 0.5}


def write_images(folder: Path) -> None:
    colour = Image.fromarray(np.uint8(255 * np.stack([PIXELS[0], PIXELS[1], PIXELS[2]], axis=-1)))
    deep = Image.fromarray(np.uint16(65535 * PIXELS[0]))
    for image, name, options in (
            (colour, "a.png", {}), (deep, "b.png", {}), (colour.quantize(4), "c.png", {}),
            (colour, "d.jpg", {}), (colour, "e.jpg", {"progressive": True}), (colour, "f.bmp", {}),
            (deep, "g.tif", {}), (colour, "h.tif", {"compression": "tiff_lzw"}),
            (colour, "i.tif", {"compression": "tiff_deflate"}), (colour, "j.tif", {"compression": "jpeg"})):
        image.save(folder / name, **options)


def read_own_image(path: Path) -> None:
    image = read_image(path)
    assert image.dtype == torch.float32 and image.ndim == 3 and 0 <= image.min() and image.max() <= 1


def load(described: Metadata) -> None:
    """Every pixel of a data set; images are in [0, 1] and masks two-valued, or damage got through."""
    for split in ("train", "test"):
        image, masks = (part := data.load(described, split)).batch(range(len(part)))
        assert 0 <= image.min() and image.max() <= 1 and masks.unique().numel() <= 2
        assert image.shape[1:] == (described.channels, SIZE, SIZE) and masks.shape[1] == described.annotators


# name: (fills a folder with the files to damage; reads all of the damaged file at a path)
READERS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "LIDC pickles": (write_pickles, lambda path: load(replace(LIDC, data_path=str(path.parent)))),
    "ISIC3 folder": (write_isic3, lambda path: load(replace(ISIC3, data_path=str(path.parent.parent)))),
    "HDF5 layout": (write_stores, lambda path: load(replace(LIDC, data_path=str(path)))),
    "PHiSeg's HDF5": (write_phiseg, lambda path: load(replace(LIDC, data_path=str(path), split="file"))),
    "checkpoint": (write_checkpoint, read_checkpoint),
    "own images": (write_images, read_own_image),
}


def damaged(content: bytes, others: list[bytes], generator: random.Random) -> bytes:
    """Bytes flipped, cut off, dropped, repeated or taken from another valid file of the reader."""
    kind = generator.choice(("flip", "flip", "flip", "flip", "cut", "drop", "repeat", "splice"))
    low, high = sorted(generator.choices(range(len(content) + 1), k=2))
    if kind == "cut":
        return content[:low]
    if kind == "drop":
        return content[:low] + content[min(high, low + 64):]
    if kind == "repeat":
        return content[:high] + content[max(low, high - 64):]
    if kind == "splice":
        other = generator.choice(others)
        return content[:low] + other[low:high] + content[high:]
    changed = bytearray(content)
    for _ in range(generator.choice((1, 1, 2, 8))):
        value = generator.choice((0, 1, 0x7F, 0xFF, generator.randrange(256)))  # as in a length or offset
        changed[generator.randrange(len(content))] = value
    return bytes(changed)


def attack(name: str, folder: Path, report: Path) -> None:
    """Reads CASES damaged files; `report` names the seed in progress and what went wrong with it."""
    write, read = READERS[name]
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, also within a library
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    write(folder)
    originals = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    before = set(folder.parent.rglob("*"))
    refused = 0
    for seed in range(CASES):
        path = list(originals)[seed % len(originals)]
        path.write_bytes(damaged(originals[path], list(originals.values()), random.Random(seed)))
        report.write_text(f"{path.name}, seed {seed}: it crashed or raised the error above")
        signal.alarm(SECONDS)
        try:
            read(path)
        except (ValueError, OSError) as error:
            assert str(folder) in str(error), f"{path.name}, seed {seed}: the message names no file"
            assert not isinstance(error.__cause__, MemoryError)
            assert set(folder.parent.rglob("*")) <= before | {report}
            refused += 1
        signal.alarm(0)
        for store in set(folder.parent.rglob("*")) - before - {report}:
            store.unlink()
        path.write_bytes(originals[path])
    report.write_text(str(refused))


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(name, tmp_path):
    (tmp_path / "files").mkdir()
    report = tmp_path / "report"
    process = multiprocessing.get_context("fork").Process(
        target=attack, args=(name, tmp_path / "files", report), daemon=True)  # prints what it raises
    process.start()
    process.join()
    assert process.exitcode == 0, report.read_text()
    print(f"{name}: {CASES} damaged files, {report.read_text()} refused")
    assert int(report.read_text()) > CASES / 4
