"""The ISIC3 folder reader: what it reads, counts and refuses."""

import os
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import isic3
from data.convert import converted
from metadata_manager import Metadata

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "isic3"
DESCRIBED = Metadata("isic3_style_concat", reader="isic3", channels=3, annotators=3, size=16)


def save_mask(path, mask, value=255):
    Image.fromarray((mask * value).astype(np.uint8)).save(path)


def add_image(folder, name, styles, seed=0):
    """An image and one mask per style, which are returned."""
    random = np.random.RandomState(seed)
    image = random.randint(0, 256, (16, 16, 3)).astype(np.uint8)
    masks = random.randint(0, 2, (len(styles), 16, 16))
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
    return converted(folder, isic3.files_of(folder), isic3.convert)


def unpacked(packed):
    return np.unpackbits(packed, axis=1).reshape(-1, 3, 16, 16)


def test_images_masks_and_styles_are_read(folder, capsys):
    second, second_masks = add_image(folder, "ISIC_2", "fmf", seed=1)
    first, first_masks = add_image(folder, "ISIC_1", "pmp")
    add_image(folder, "ISIC_3", "fm")
    add_image(folder, "ISIC_4", "fmpf")
    save_mask(folder / "Segmentations" / "ISIC_9_0_f.png", first_masks[0])  # of an image that is not there
    (folder / "Images" / ".DS_Store").write_text("not an image")
    (folder / "Segmentations" / "ISIC_1_0_p.png").rename(folder / "Segmentations" / "ISIC_1_0_p.PNG")
    (folder / "Segmentations" / "ISIC_1_3_m.bmp").write_text("a mask in another form")
    store = convert(folder)
    said = capsys.readouterr().out
    assert "2 images with 3 masks; 2 with another number left out" in said
    assert "1 masks are left out, whose image is not there, such as " in said and "ISIC_9_0_f.png" in said
    assert "1 files are passed over, as masks are .png, such as " in said and "ISIC_1_3_m.bmp" in said
    images, packed = store.read(np.arange(2))
    np.testing.assert_array_equal(images, [first, second])
    np.testing.assert_array_equal(unpacked(packed), [first_masks, second_masks])
    assert store.ids == list(store.patient) == ["ISIC_1", "ISIC_2"]
    assert store.style.tolist() == [[2, 1, 2], [0, 1, 0]]


def test_letters_in_one_and_in_two_characters_are_the_same_name(folder):
    add_image(folder, "le\u0301sion_1", "fmp")  # as macOS writes it
    for path in (folder / "Segmentations").iterdir():
        path.rename(path.with_name(unicodedata.normalize("NFC", path.name)))
    assert convert(folder).ids == ["l\u00e9sion_1"]


def test_ids_may_contain_each_other_and_underscores(folder):
    add_image(folder, "A", "fff", seed=1)
    _, masks = add_image(folder, "A_0", "mmm", seed=2)
    save_mask(folder / "Segmentations" / "A_0_x_y_m.png", masks[0])
    (folder / "Segmentations" / "A_0_0_m.png").unlink()
    store = convert(folder)
    assert store.ids == ["A", "A_0"] and store.style.tolist() == [[0, 0, 0], [1, 1, 1]]


def test_masks_of_one_and_zero_and_empty_masks_are_read(folder):
    _, masks = add_image(folder, "A", "fmp")
    save_mask(folder / "Segmentations" / "A_0_f.png", masks[0], value=1)
    save_mask(folder / "Segmentations" / "A_1_m.png", 0 * masks[1])
    Image.fromarray(masks[2].astype(bool)).save(folder / "Segmentations" / "A_2_p.png")
    read = unpacked(convert(folder).read(np.arange(1))[1])
    np.testing.assert_array_equal(read[0], [masks[0], 0 * masks[1], masks[2]])


MASK, IMAGE = "Segmentations/A_1_m.png", "Images/A.png"
UNREADABLE = "A.png: not an image that can be read"


def save_new(mode, side, **options):
    return lambda path: Image.new(mode, (side, 16 if side < 100 else side)).save(path, **options)


@pytest.mark.parametrize(("name", "spoil", "message"), [
    (MASK, save_new("L", 17), "A_1_m.png: 16 x 17 pixels, expected 16 x 16"),
    ("Images/B.png", save_new("RGB", 17), "B.png: 16 x 17 pixels, expected 16 x 16"),
    (IMAGE, lambda path: path.write_text("text"), UNREADABLE),
    (IMAGE, save_new("L", 16), rf"{UNREADABLE} .colour mode L, 1 pages.; expected one image of mode RGB as"),
    (IMAGE, save_new("RGB", 16, format="BMP"), UNREADABLE),
    (MASK, lambda path: Image.linear_gradient("L").resize((16, 16)).save(path), "a mask with the values"),
    (MASK, save_new("RGB", 16), "A_1_m.png: .*colour mode RGB, .* mode L, 1 as"),
    (MASK, save_new("1", 14_000), "A_1_m.png: too large to be decoded safely"),  # a file of a few kB
    (MASK, lambda path: path.rename(path.with_name("A_1.png")), "A_1.png: no style"),
    ("Images/A.jpg", save_new("RGB", 16), "A.png: same image id as A.jpg"),
])
def test_what_is_wrong_is_named_and_leaves_no_store(folder, name, spoil, message):
    add_image(folder, "A", "fmp")
    add_image(folder, "B", "fmp")
    spoil(folder / name)
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
    (tmp_path / "ISIC3").mkdir()  # of links, so that the store lies beside it
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
