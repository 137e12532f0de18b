"""The ISIC3 folder reader: what it reads, counts and refuses."""

import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import isic3
from data.cache import cached
from metadata_manager import Metadata

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "isic3"
DESCRIBED = Metadata("isic3_style_concat", reader="isic3", channels=3, annotators=3, size=16)


def save_mask(path, mask, value=255):
    Image.fromarray((mask * value).astype(np.uint8)).save(path)


def add_image(folder, name, styles, seed=0):
    """An image and one mask per style, which are returned."""
    random_state = np.random.RandomState(seed)
    image = random_state.randint(0, 256, (16, 16, 3)).astype(np.uint8)
    masks = random_state.randint(0, 2, (len(styles), 16, 16))
    Image.fromarray(image).save(folder / "Images" / f"{name}.png")
    for number, style in enumerate(styles):
        save_mask(folder / "Segmentations" / f"{name}_{number}_{style}.png", masks[number])
    return image, masks


@pytest.fixture
def folder(tmp_path):
    for name in ("Images", "Segmentations"):
        (tmp_path / "ISIC3" / name).mkdir(parents=True)
    return tmp_path / "ISIC3"


def convert(folder):
    return cached(folder, isic3.source_files(folder), isic3.convert)


def test_images_masks_and_styles_are_read(folder, capsys):
    second, second_masks = add_image(folder, "ISIC_2", "fmf", seed=1)
    first, first_masks = add_image(folder, "ISIC_1", "pmp")
    add_image(folder, "ISIC_3", "fm")
    add_image(folder, "ISIC_4", "fmpf")
    save_mask(folder / "Segmentations" / "ISIC_9_0_f.png", first_masks[0])  # of an image that is not there
    (folder / "Images" / ".DS_Store").write_text("not an image")
    cache = convert(folder)
    assert "2 images with 3 masks; 2 with another number left out" in capsys.readouterr().out
    images, packed = cache.read(np.arange(2))
    np.testing.assert_array_equal(images, [first, second])
    read = np.unpackbits(packed, axis=1).reshape(2, 3, 16, 16)
    np.testing.assert_array_equal(read, [first_masks, second_masks])
    assert cache.ids == list(cache.patient) == ["ISIC_1", "ISIC_2"]
    assert cache.style.tolist() == [[2, 1, 2], [0, 1, 0]]


def test_ids_may_contain_each_other_and_underscores(folder):
    add_image(folder, "A", "fff", seed=1)
    _, masks = add_image(folder, "A_0", "mmm", seed=2)
    save_mask(folder / "Segmentations" / "A_0_x_y_m.png", masks[0])
    (folder / "Segmentations" / "A_0_0_m.png").unlink()
    cache = convert(folder)
    assert cache.ids == ["A", "A_0"] and cache.style.tolist() == [[0, 0, 0], [1, 1, 1]]


def test_masks_of_one_and_zero_and_empty_masks_are_read(folder):
    image, masks = add_image(folder, "A", "fmp")
    save_mask(folder / "Segmentations" / "A_0_f.png", masks[0], value=1)
    save_mask(folder / "Segmentations" / "A_1_m.png", 0 * masks[1])
    Image.fromarray(masks[2].astype(bool)).save(folder / "Segmentations" / "A_2_p.png")
    packed = convert(folder).read(np.arange(1))[1]
    read = np.unpackbits(packed).reshape(3, 16, 16)
    np.testing.assert_array_equal(read, [masks[0], 0 * masks[1], masks[2]])


def spoil(folder, what):
    """Make one thing wrong in a folder of one right image."""
    image, mask = folder / "Images" / "A.png", folder / "Segmentations" / "A_1_m.png"
    if what == "mask of another size":
        save_mask(mask, np.ones((16, 17)))
    elif what == "image of another size":
        add_image(folder, "B", "fmp")
        Image.new("RGB", (17, 16)).save(folder / "Images" / "B.png")
    elif what == "not an image":
        image.write_text("text")
    elif what == "grey image":
        Image.new("L", (16, 16)).save(image)
    elif what == "format that is not read":
        Image.new("RGB", (16, 16)).save(image, format="BMP")
    elif what == "grey mask":
        Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(mask)
    elif what == "coloured mask":
        Image.new("RGB", (16, 16)).save(mask)
    elif what == "no style":
        mask.rename(mask.with_name("A_1.png"))
    elif what == "unknown style":
        mask.rename(mask.with_name("A_1_q.png"))
    elif what == "two images of an id":
        Image.new("RGB", (16, 16)).save(folder / "Images" / "A.jpg")
    elif what == "truncated image":
        image.write_bytes(image.read_bytes()[:-200])
    elif what == "truncated mask":
        mask.write_bytes(mask.read_bytes()[:-30])
    elif what == "decompression bomb of 300 MB":
        image.write_bytes(png_bomb(10_000))
    elif what == "decompression bomb of 1.2 GB":
        image.write_bytes(png_bomb(20_000))


def png_bomb(side):
    """A PNG of a few kB that announces side x side RGB pixels."""
    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    rows = zlib.compress(bytes(10**6))
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("what", "message"), [
    ("mask of another size", "A_1_m.png: 16 x 17 pixels, expected 16 x 16"),
    ("image of another size", "B.png: 16 x 17 pixels, expected 16 x 16"),
    ("not an image", "A.png: not a readable PNG or JPEG"),
    ("grey image", "A.png: colour mode L, expected RGB"),
    ("format that is not read", "A.png: not a readable PNG or JPEG"),
    ("grey mask", "A_1_m.png: a mask with the values .*256 in all"),
    ("coloured mask", "A_1_m.png: colour mode RGB, expected L or 1"),
    ("no style", "A_1.png: no style in its name"),
    ("unknown style", "A_1_q.png: no style in its name"),
    ("two images of an id", "A.png: same image id as A.jpg"),
    ("truncated image", "A.png: not a readable PNG or JPEG"),
    ("truncated mask", "A_1_m.png: not a readable PNG or JPEG"),
    ("decompression bomb of 300 MB", "A.png: not a readable PNG or JPEG .*decompression bomb"),
    ("decompression bomb of 1.2 GB", "A.png: not a readable PNG or JPEG .*decompression bomb"),
])
def test_what_is_wrong_is_named_and_leaves_no_cache(folder, what, message):
    add_image(folder, "A", "fmp")
    spoil(folder, what)
    with pytest.raises(ValueError, match=message):
        convert(folder)
    assert os.listdir(folder.parent) == ["ISIC3"]


def test_a_folder_without_complete_images_is_named(folder):
    with pytest.raises(ValueError, match="Images: no files"):
        convert(folder)
    add_image(folder, "A", "fm")
    with pytest.raises(ValueError, match="ISIC3: no image has 3 masks"):
        convert(folder)
    (folder / "Images" / "A.png").unlink()
    (folder / "Images").rmdir()
    with pytest.raises(ValueError, match="ISIC3: no folder Images"):
        convert(folder)


def test_released_split_goes_by_mask_and_says_how_much_it_overlaps(folder, capsys):
    for number in range(10):
        add_image(folder, f"ISIC_{number}", "fmp", seed=number)
    described = replace(DESCRIBED, data_path=str(folder), split="released")
    test, train = data.load(described, "test"), data.load(described, "train_prior")
    assert test.ids == [f"ISIC_{number}" for number in range(4, 10)]  # the last 6 of 30 entries: style p
    assert len(train) == 24
    both = len(set(test.ids) & set(train.ids))
    assert f"{both} of 6 test images ({both / 6:.1%})" in capsys.readouterr().out
    assert len(data.load(described, "train")) == 18 and len(data.load(described, "val")) == 6


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_the_real_images(tmp_path, capsys):
    (tmp_path / "ISIC3").mkdir()  # of links, so that the cache lies beside it
    for name in ("Images", "Segmentations"):
        (tmp_path / "ISIC3" / name).symlink_to(SHARED / name)
    described = replace(DESCRIBED, data_path=str(tmp_path / "ISIC3"), size=256)
    parts = [data.load(described, split) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [45, 11, 14]
    assert len({name for part in parts for name in part.ids}) == 70
    name = parts[2].ids[3]
    image, masks = parts[2][3]
    with Image.open(SHARED / "Images" / f"{name}.jpg") as file:
        np.testing.assert_allclose(image.permute(1, 2, 0), np.asarray(file) / 255, atol=1e-7)
    for mask, path in zip(masks, sorted((SHARED / "Segmentations").glob(f"{name}_*.png"))):
        with Image.open(path) as file:
            np.testing.assert_array_equal(mask, np.asarray(file) / 255)
