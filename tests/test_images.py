"""A user's own image files: how they are read and fitted to a model, and which mistakes are named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.images import fitted, read_image, unique_names

ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # orientation of a picture to be turned by 90 degrees clockwise
GREY = np.array([[0, 51, 255], [102, 153, 204]], np.uint8)  # (2, 3): 0, .2, 1; .4, .6, .8 of 255
RGB = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=-1)
DEEP = GREY.astype(np.uint16) * 257
UNIT = torch.tensor([[[0, 0.2, 1], [0.4, 0.6, 0.8]]])


def saved(path, pixels, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


@pytest.mark.parametrize("name, pixels, expected", [
    ("a.png", GREY, UNIT), ("a.bmp", GREY, UNIT), ("a.tif", GREY, UNIT),
    ("a.png", DEEP, UNIT), ("a.tif", DEEP, UNIT), ("a.tif", DEEP.astype(">u2"), UNIT),
    ("a.png", GREY > 100, (UNIT > 0.39).float()),
    ("a.png", np.dstack([GREY, np.ones_like(GREY)]), UNIT),  # grey and alpha: transparency is left out
    ("a.png", RGB, torch.from_numpy(RGB / 255).float().permute(2, 0, 1)),
    ("a.png", np.dstack([RGB, np.zeros_like(GREY)]), torch.from_numpy(RGB / 255).float().permute(2, 0, 1)),
])
def test_pixels_are_scaled_to_the_unit_range(tmp_path, name, pixels, expected):
    torch.testing.assert_close(read_image(saved(tmp_path / name, pixels)), expected)


@pytest.mark.parametrize("bits, name", [(8, "a.png"), (12, "a.png"), (14, "a.tif"), (16, "a.tif")])
def test_the_bits_that_a_scanner_used_of_16_are_its_range(tmp_path, name, bits, capsys):
    values = np.array([[0, 2 ** bits - 1, 2 ** (bits - 1)]], np.uint16)
    image = read_image(saved(tmp_path / name, values))
    torch.testing.assert_close(image, torch.tensor([[[0, 1, 0.5]]]), rtol=0, atol=0.002)
    assert (f"{name}: 16 bits per pixel, values up to {values.max()}: taken as {bits} bits"
            in capsys.readouterr().out) == (bits < 16)


def test_a_palette_is_looked_up(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([255, 0, 51, 0, 102, 204])
    pixels = read_image(saved(tmp_path / "a.png", image))
    torch.testing.assert_close(pixels, torch.tensor([[[1, 0.0]], [[0, 0.4]], [[0.2, 0.8]]]))


@pytest.mark.parametrize("pixels", [GREY, DEEP, np.dstack([GREY] * 3)], ids=["grey", "16 bits", "rgb"])
def test_a_picture_is_turned_as_exif_says(tmp_path, pixels):
    image = read_image(saved(tmp_path / "a.png", pixels, exif=ROTATED))
    expected = torch.tensor([[0.4, 0], [0.6, 0.2], [0.8, 1]])  # GREY's lower row becomes the left column
    torch.testing.assert_close(image, expected.expand(len(image), 3, 2))


def test_a_photo_with_a_second_picture_inside_is_its_first(tmp_path):
    first, second = (Image.new("RGB", (16, 16), (value,) * 3) for value in (51, 255))
    path = saved(tmp_path / "phone.jpg", first, format="MPO", save_all=True, append_images=[second])
    torch.testing.assert_close(read_image(path), torch.full((3, 16, 16), 0.2))


def half(path):
    noise = np.random.RandomState(0).randint(0, 256, (64, 64)).astype(np.uint8)
    path.write_bytes(saved(path, noise).read_bytes()[:2000])


@pytest.mark.parametrize("name, make", [
    ("notes.png", lambda path: path.write_text("not an image")),
    ("empty.png", lambda path: path.touch()),
    ("folder.png", lambda path: path.mkdir()),
    ("half.png", half),
    ("a.gif", lambda path: saved(path, GREY)),
    ("float.tif", lambda path: saved(path, GREY.astype(np.float32))),
    ("pages.tif", lambda path: saved(path, GREY, save_all=True, append_images=[Image.fromarray(GREY)])),
])
def test_what_is_no_image_is_named(tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(ValueError) as error:
        read_image(tmp_path / name)
    assert str(error.value).startswith(f"--images {tmp_path / name}: not an image that can be read (")
    assert "as PNG, JPEG, TIFF, BMP; " in str(error.value)
    with pytest.raises(FileNotFoundError, match="--images .*absent.png: no such file"):
        read_image(tmp_path / "absent.png")


def test_an_image_is_made_square_and_gets_the_models_channels():
    rgb = torch.tensor([1.0, 0.5, 0.2])[:, None, None].expand(3, 4, 8)
    torch.testing.assert_close(fitted(rgb, 1, 2), torch.full((1, 1, 2, 2), 0.299 + 0.587 * 0.5 + 0.114 * 0.2))
    assert fitted(rgb, 3, 2).shape == (1, 3, 2, 2)
    grey = torch.tensor([[[0.1, 0.1, 0.9, 0.9]] * 4])
    torch.testing.assert_close(fitted(grey, 3, 4), grey[None].expand(1, 3, 4, 4))
    stripes = torch.tensor([0.0, 1.0]).repeat(32)[None, None].expand(1, 64, 64)  # averaged, not picked
    assert (fitted(stripes, 1, 8)[0, 0, :, 1:-1] - 0.5).abs().max() < 0.1


def test_names_are_unique_on_every_file_system():
    paths = [Path(name) for name in ("x/a.png", "y/a.png", "A.png", "z/x_a.png", "z/b.png")]
    assert unique_names(paths) == ["x_a", "y_a", "A", "x_a_2", "b"]
    assert unique_names([Path("1/x/a.png"), Path("2/x/A.png"), Path("a_2.png")]) == ["x_a", "x_A_2", "a_2"]
    assert unique_names([Path("case1/image.nii.gz")]) == ["case1_image"]
    # No name leads out of the folder, and no two are of the same letters.
    names = ["...png", "..png", "caf\u00e9.png", "cafe\u0301.png", ".hidden.png"]
    assert unique_names([Path(name) for name in names]) == [
        "image", "image_2", "caf\u00e9", "caf\u00e9_2", ".hidden"]
