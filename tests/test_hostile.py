"""Damaged files: a reader reads them or names them in a plain error; it never crashes, hangs or fills memory.

ATFM_FUZZ is the number of files per reader. What a reader must refuse is in the tests of its module."""

import multiprocessing
import os
import pickle
import random
import resource
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
from data.cache import Writer
from metadata_manager import Metadata
from models import checkpoint
from models.own_images import read_image

CASES = int(os.environ.get("ATFM_FUZZ", 60))
SECONDS, MEMORY = 30, 2**30  # that one file of a few kB may take
SIZE = 8
LIDC = Metadata(size=SIZE)
MASKS = (np.arange(6 * 4 * SIZE * SIZE).reshape(6, 4, SIZE, SIZE) % 3 == 0).astype(np.uint8)
PIXELS = np.linspace(0, 1, 6 * SIZE * SIZE).reshape(6, SIZE, SIZE)


@dataclass(frozen=True)
class Reader:
    """How to read a source: `write` fills a folder and gives the files to damage; `read` reads all of it."""

    write: Callable[[Path], list[Path]]
    read: Callable[[Path, Path], None]  # folder, the damaged file


def write_pickles(folder: Path) -> list[Path]:
    (folder / "LIDC").mkdir()
    for protocol in (2, 5):
        content = {f"{protocol}_{i}": {"image": PIXELS[i], "masks": list(MASKS[i]), "series_uid": f"1.2.{i}"}
                   for i in range(3)}
        (folder / "LIDC" / f"{protocol}.pickle").write_bytes(pickle.dumps(content, protocol))
    return list((folder / "LIDC").iterdir())


def read_pickles(folder: Path, path: Path) -> None:
    load(replace(LIDC, data_path=str(folder / "LIDC")))


def write_isic3(folder: Path) -> list[Path]:
    (folder / "ISIC3" / "Images").mkdir(parents=True)
    (folder / "ISIC3" / "Segmentations").mkdir()
    for i, suffix in enumerate((".png", ".jpg", ".jpg")):
        rgb = Image.fromarray(np.uint8(255 * PIXELS[i])).convert("RGB")
        rgb.save(folder / "ISIC3" / "Images" / f"ISIC_{i}{suffix}", progressive=i == 2)
        for mask, style in zip(MASKS[i], "fmp"):
            Image.fromarray(255 * mask).save(folder / "ISIC3" / "Segmentations" / f"ISIC_{i}_0_{style}.png")
    return list((folder / "ISIC3").rglob("ISIC_*"))


def read_isic3(folder: Path, path: Path) -> None:
    load(Metadata("isic3_style_concat", reader="isic3", channels=3, annotators=3, size=SIZE,
                  data_path=str(folder / "ISIC3")))


def write_caches(folder: Path) -> list[Path]:
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
    return [folder / "ours.h5", folder / "foreign.h5"]


def read_h5(folder: Path, path: Path) -> None:
    load(replace(LIDC, data_path=str(path)))


def write_phiseg(folder: Path) -> list[Path]:
    for name, uids, packing in (("text.hdf5", ["1.2.3", "1.2.4"], {"chunks": True, "compression": "gzip"}),
                                ("numbers.hdf5", [7, 9], {})):
        with h5py.File(folder / name, "w") as file:
            for number, fold in enumerate(("train", "val", "test")):
                rows = slice(2 * number, 2 * number + 2)
                file.create_dataset(f"{fold}/images", data=np.float32(PIXELS[rows]), **packing)
                file.create_dataset(f"{fold}/labels", data=np.moveaxis(MASKS[rows], 1, -1), **packing)
                file.create_dataset(f"{fold}/uids", data=uids)
    return [folder / "text.hdf5", folder / "numbers.hdf5"]


def write_checkpoint(folder: Path) -> list[Path]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    checkpoint.save(folder / "last.pt", {
        "stage": "GTR", "config": {"num_filters": (4, 8), "lr": 1e-3}, "model": model.state_dict(),
        "optimizer": optimizer.state_dict(), "state": {"step": 3, "best": 0.5}, "versions": {"torch": "2"}})
    return [folder / "last.pt"]


def read_phiseg(folder: Path, path: Path) -> None:
    load(replace(LIDC, data_path=str(path), split="file"))


def read_checkpoint(folder: Path, path: Path) -> None:
    found = checkpoint.load(path, "GTR")
    checkpoint.fill(nn.Linear(3, 2), found, path)
    assert found["config"] == {"num_filters": (4, 8), "lr": 1e-3}
    assert found["state"] == {"step": 3, "best": 0.5}


def write_own_images(folder: Path) -> list[Path]:
    colour = Image.fromarray(np.uint8(255 * np.stack([PIXELS[0], PIXELS[1], PIXELS[2]], axis=-1)))
    deep = Image.fromarray(np.uint16(65535 * PIXELS[0]))
    saves = [(colour, "a.png", {}), (deep, "b.png", {}), (colour.quantize(4), "c.png", {}),
             (colour, "d.jpg", {}), (colour, "e.jpg", {"progressive": True}), (colour, "f.bmp", {}),
             (deep, "g.tif", {}), (colour, "h.tif", {"compression": "tiff_lzw"}),
             (colour, "i.tif", {"compression": "tiff_deflate"}), (colour, "j.tif", {"compression": "jpeg"})]
    for image, name, options in saves:
        image.save(folder / name, **options)
    return [folder / name for _, name, _ in saves]


def read_own_image(folder: Path, path: Path) -> None:
    image = read_image(path)
    assert image.dtype == torch.float32 and image.ndim == 3 and 0 <= image.min() and image.max() <= 1


READERS = {
    "LIDC pickles": Reader(write_pickles, read_pickles),
    "ISIC3 folder": Reader(write_isic3, read_isic3),
    "HDF5 layout": Reader(write_caches, read_h5),
    "PHiSeg's HDF5": Reader(write_phiseg, read_phiseg),
    "checkpoint": Reader(write_checkpoint, read_checkpoint),
    "own images": Reader(write_own_images, read_own_image),
}


def load(described: Metadata) -> None:
    """Every pixel of a data set; images are in [0, 1] and masks two-valued, or damage got through."""
    for split in ("train", "test"):
        image, masks = (part := data.load(described, split)).batch(range(len(part)))
        assert 0 <= image.min() and image.max() <= 1 and masks.unique().numel() <= 2
        assert image.shape[1:] == (described.channels, SIZE, SIZE) and masks.shape[1] == described.annotators


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


def attack(reader: Reader, folder: Path, report: Path) -> None:
    """Reads CASES damaged files; `report` names the seed in progress and what went wrong with it."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, also within a library
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    originals = {path: path.read_bytes() for path in reader.write(folder)}
    before = sorted(folder.rglob("*"))
    refused = 0
    for seed in range(CASES):
        generator = random.Random(seed)
        path = sorted(originals)[seed % len(originals)]
        path.write_bytes(damaged(originals[path], list(originals.values()), generator))
        report.write_text(f"{path.name}, seed {seed}: the process ended")
        signal.alarm(SECONDS)
        try:
            refused += not clean(reader, folder, path, before)
        except BaseException:
            report.write_text(f"{path.name}, seed {seed}: {traceback.format_exc()}")
            os._exit(1)
        signal.alarm(0)
        path.write_bytes(originals[path])
    report.write_text(str(refused))


def clean(reader: Reader, folder: Path, path: Path, before: list[Path]) -> bool:
    """Whether the damaged file is read; False if it is refused by name, with nothing left behind."""
    try:
        reader.read(folder, path)
    except (ValueError, OSError) as error:
        assert str(folder) in str(error), "the message names no file"
        assert not isinstance(error.__cause__, MemoryError)
        assert sorted(folder.rglob("*")) == before
        return False
    for cache in set(folder.rglob("*")) - set(before):
        cache.unlink()
    return True


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(name, tmp_path):
    (tmp_path / "files").mkdir()
    report = tmp_path / "report"
    process = multiprocessing.get_context("fork").Process(
        target=attack, args=(READERS[name], tmp_path / "files", report), daemon=True)
    process.start()
    process.join()
    assert process.exitcode == 0, report.read_text()
    print(f"{name}: {CASES} damaged files, {report.read_text()} refused")
    assert int(report.read_text()) > CASES / 4
