"""Samples for images of the user's own: how files are read, what is written, and which mistakes are named."""

import numpy as np
import pytest
import torch
from PIL import Image

from metrics.evaluation import image_seed
from models import checkpoint
from models.command_line import parse
from models.own_images import draw_own_images, enlarged, fitted, read_image, trained_on, unique_names, write
from models.stages import train_gtr, train_prior
from models.systems import flow_sampler, gtr_sampler, load_atfm, load_gtr
from models.testing import System
from models.testing import test_prior as run_test
from tests import tiny

ROTATED = 6  # EXIF's orientation of a picture to be turned by 90 degrees clockwise
GREY = np.array([[0, 51, 255], [102, 153, 204]], np.uint8)  # (2, 3): 0, .2, 1; .4, .6, .8 of 255


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def saved(path, pixels, mode=None, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def noise(path, *shape):
    """An image of random pixels, of which the noisy model of these tests draws different samples."""
    return saved(path, np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8))


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image)


# Reading.

@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_grey_is_divided_by_255(tmp_path, suffix):
    image = read_image(saved(tmp_path / f"a.{suffix}", GREY))
    torch.testing.assert_close(image, torch.tensor([[[0, 0.2, 1], [0.4, 0.6, 0.8]]]))


@pytest.mark.parametrize("suffix, kind", [("png", "<u2"), ("tif", "<u2"), ("tif", ">u2")])
def test_16_bits_are_divided_by_65535(tmp_path, suffix, kind):
    image = read_image(saved(tmp_path / f"a.{suffix}", (GREY.astype(np.uint16) * 257).astype(kind)))
    torch.testing.assert_close(image, torch.tensor([[[0, 0.2, 1], [0.4, 0.6, 0.8]]]))


def test_black_and_white_is_grey(tmp_path):
    image = read_image(saved(tmp_path / "a.png", GREY > 100))
    torch.testing.assert_close(image, torch.tensor([[[0.0, 0, 1], [1, 1, 1]]]))


def test_rgb_keeps_its_channels_and_transparency_is_left_out(tmp_path):
    rgb = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=-1)
    clear = np.dstack([rgb, np.zeros_like(GREY)])
    for name, pixels in (("rgb.png", rgb), ("clear.png", clear)):
        image = read_image(saved(tmp_path / name, pixels))
        np.testing.assert_allclose(image.numpy(), rgb.transpose(2, 0, 1) / 255, atol=1e-6)
    faint = read_image(saved(tmp_path / "faint.png", np.dstack([GREY, np.ones_like(GREY)])))  # grey and alpha
    np.testing.assert_allclose(faint.numpy(), GREY[None] / 255, atol=1e-6)


def test_a_palette_is_looked_up(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([255, 0, 51, 0, 102, 204])
    found = read_image(saved(tmp_path / "a.png", image))
    torch.testing.assert_close(found, torch.tensor([[[1, 0.0]], [[0, 0.4]], [[0.2, 0.8]]]))


@pytest.mark.parametrize("pixels", [GREY, GREY.astype(np.uint16) * 257, np.dstack([GREY] * 3)],
                         ids=["grey", "16 bits", "rgb"])
def test_a_picture_is_turned_as_exif_says(tmp_path, pixels):
    found = read_image(saved(tmp_path / "a.png", pixels, exif=exif(ROTATED)))
    expected = torch.tensor([[0.4, 0], [0.6, 0.2], [0.8, 1]])  # GREY's lower row becomes the left column
    torch.testing.assert_close(found, expected.expand(len(found), 3, 2))


def test_a_photo_with_a_second_picture_inside_is_its_first(tmp_path):
    first, second = (Image.fromarray(np.full((16, 16, 3), value, np.uint8)) for value in (51, 255))
    path = saved(tmp_path / "phone.jpg", first, format="MPO", save_all=True, append_images=[second])
    torch.testing.assert_close(read_image(path), torch.full((3, 16, 16), 0.2))


@pytest.mark.parametrize("name, make", [
    ("notes.png", lambda path: path.write_text("not an image")),
    ("empty.png", lambda path: path.touch()),
    ("folder.png", lambda path: path.mkdir()),
    ("half.png", lambda path: path.write_bytes(noise(path, 64, 64).read_bytes()[:2000])),
    ("a.gif", lambda path: saved(path, GREY)),
    ("float.tif", lambda path: saved(path, GREY.astype(np.float32))),
    ("pages.tif", lambda path: saved(path, GREY, save_all=True, append_images=[Image.fromarray(GREY)])),
])
def test_what_is_no_image_is_named(tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(ValueError) as error:
        read_image(tmp_path / name)
    assert str(error.value).startswith(f"--images {tmp_path / name}: not an image that can be read (")
    assert str(error.value).endswith(
        "expected one grey or RGB image of 8 or 16 bits per channel as PNG, JPEG, TIFF, BMP")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--images .*absent.png: no such file"):
        read_image(tmp_path / "absent.png")


@pytest.mark.parametrize("limit", [4, 2])  # pixels; Pillow warns above it, and refuses above twice as many
def test_an_image_too_large_to_decode_is_refused(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match="a.png: too large to be decoded safely .*; make it smaller"):
        read_image(saved(tmp_path / "a.png", GREY))


# Fitting it to the model, and writing.

def test_an_image_is_made_square_and_gets_the_models_channels():
    rgb = torch.tensor([1.0, 0.5, 0.2])[:, None, None].expand(3, 4, 8)
    torch.testing.assert_close(fitted(rgb, 1, 2), torch.full((1, 1, 2, 2), 0.299 + 0.587 * 0.5 + 0.114 * 0.2))
    assert fitted(rgb, 3, 2).shape == (1, 3, 2, 2)
    grey = torch.tensor([[[0.1, 0.1, 0.9, 0.9]] * 4])
    torch.testing.assert_close(fitted(grey, 3, 4), grey[None].expand(1, 3, 4, 4))
    halves = fitted(grey, 1, 2)[0, 0]
    assert (halves[:, 0] < 0.3).all() and (halves[:, 1] > 0.7).all()


def test_fine_stripes_are_averaged_not_picked():
    stripes = torch.tensor([0.0, 1.0]).repeat(32)[None, None].expand(1, 64, 64)
    inner = fitted(stripes, 1, 8)[0, 0, :, 1:-1]
    assert (inner - 0.5).abs().max() < 0.1


def test_enlarged_repeats_pixels():
    values = torch.tensor([[0, 0.5], [1, 0.2]])
    np.testing.assert_array_equal(enlarged(values, 2, 4), [[0, 0, 128, 128], [255, 255, 51, 51]])


def test_files_hold_the_masks_their_mean_and_their_variance(tmp_path):
    masks = torch.tensor([[[0, 1], [1, 1]], [[0, 0], [1, 1]], [[0, 0], [0, 1]], [[0, 0], [1, 1]]]).bool()
    write(tmp_path, torch.full((3, 4, 6), 0.5), masks)
    assert {path.name for path in tmp_path.iterdir()} == {
        "sample_00.png", "sample_01.png", "sample_02.png", "sample_03.png",
        "mean.png", "variance.png", "picture.png"}
    big = np.ones((2, 3), int)  # a pixel of the model's is 2 x 3 of the image's
    for number, mask in enumerate(masks):
        found = pixels_of(tmp_path / f"sample_{number:02}.png")
        np.testing.assert_array_equal(found, 255 * np.kron(mask, big))
    # means 0, 1/4, 3/4, 1; variances 0, 3/16, 3/16, 0, of which 1/4 is 255
    np.testing.assert_array_equal(pixels_of(tmp_path / "mean.png"), np.kron([[0, 64], [191, 255]], big))
    np.testing.assert_array_equal(pixels_of(tmp_path / "variance.png"), np.kron([[0, 191], [191, 0]], big))


def test_numbers_of_101_samples_have_three_digits_and_older_samples_go(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda file: None)  # slow for 100 files
    write(tmp_path, torch.zeros(1, 2, 2), torch.zeros(101, 2, 2).bool())
    assert (tmp_path / "sample_000.png").exists() and (tmp_path / "sample_100.png").exists()
    (tmp_path / "notes.txt").write_text("the user's")
    write(tmp_path, torch.zeros(1, 2, 2), torch.zeros(1, 2, 2).bool())
    assert {path.name for path in tmp_path.iterdir()} == {
        "sample_00.png", "mean.png", "variance.png", "picture.png", "notes.txt"}


def test_equal_stems_get_folders_of_their_own(tmp_path):
    names = ["a/scan.png", "a/scan.jpg", "a/scan_2.png", "b/Scan.png", "b/other.tif"]
    assert unique_names([tmp_path / name for name in names]) == [
        "scan", "scan_2", "scan_2_2", "Scan_3", "other"]


# The command.

@pytest.fixture(scope="module")
def runs(lidc, isic_folder, tmp_path_factory):
    """Folder of a run on grey images of 8 x 8 pixels, and of a GTR alone on RGB images."""
    folder = tmp_path_factory.mktemp("runs")
    for what, source in (("LIDC", lidc), ("isic3_style_concat", isic_folder)):
        where = ["--data_path", str(source), "--output_path", str(folder / what)]
        train_gtr(what, [*tiny.GTR, *where, "--epochs", "1"])
        if what == "LIDC":
            train_prior(what, [*tiny.PRIOR, *where, "--num_epochs", "1"])
    return folder


@pytest.fixture
def draw(runs, tmp_path):
    """Calls the test script on images, writing into tmp_path / "out", without any data set."""

    def call(what, *flags):
        flow = [] if "act-gtr" in flags else ["--prior", str(runs / what / "atfm")]
        run_test(what, ["--images", *map(str, flags), "--output_path", str(tmp_path / "out"),
                        "--device", "cpu", "--gtr", str(runs / what / "GTR"), *flow])
        return tmp_path / "out" / "images"

    return call


def settings_of(what, *flags):
    return parse(flags, what, ("metadata", "sampling"), "")


def flow_of(run):
    gtr = load_gtr(run / "GTR" / "best.pt", settings_of(run.name).experiment.metadata)[0]
    return load_atfm(run / "atfm" / "best.pt", "atfm", gtr)[0]


def test_the_flow_draws_from_a_grey_image_of_any_shape(draw, runs, tmp_path, capsys):
    path = noise(tmp_path / "scan.png", 16, 24)
    folder = draw("LIDC", path, "--samples", "2", "3", "--seeds", "5", "--steps", "2") / "scan"
    found = np.stack([pixels_of(folder / f"sample_0{number}.png") for number in range(3)])
    sample = flow_sampler(flow_of(runs / "LIDC"), 2, "euler")
    generator = torch.Generator().manual_seed(image_seed(5, "scan.png"))
    masks = sample(fitted(read_image(path), 1, 8), 3, generator)[0] >= 0.5
    np.testing.assert_array_equal(found, 255 * np.kron(masks, np.ones((1, 2, 3), int)))
    assert 0 < masks.float().mean() < 1  # else anything would do
    with Image.open(folder / "picture.png") as picture:
        assert picture.width == 1660
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"{path}: 16 x 24 grey (not square, so its proportions change) "
                           f"resized to 8 x 8 grey; 3 samples of atfm in {folder} ")


def test_grey_images_go_through_a_model_of_rgb_images_and_the_other_way_round(draw, tmp_path, capsys):
    grey, rgb = noise(tmp_path / "grey.png", 8, 8), noise(tmp_path / "rgb.png", 9, 7, 3)
    draw("isic3_style_concat", grey, "--samples", "1", "--methods", "act-gtr")
    assert "8 x 8 grey resized to 8 x 8 RGB" in capsys.readouterr().out
    folder = draw("LIDC", rgb, "--samples", "1", "--steps", "1")
    assert ("9 x 7 RGB (not square, so its proportions change) resized to 8 x 8 grey"
            in capsys.readouterr().out)
    assert pixels_of(folder / "rgb" / "sample_00.png").shape == (9, 7)


def test_gtr_alone_draws_too_and_no_image_changes_anothers_samples(draw, runs, tmp_path):
    (tmp_path / "b").mkdir()
    first, second = noise(tmp_path / "a.png", 8, 8), noise(tmp_path / "b" / "a.png", 8, 8)
    folder = draw("LIDC", first, second, "--samples", "4", "--methods", "act-gtr")
    both = [[pixels_of(folder / name / f"sample_0{i}.png") for i in range(4)] for name in ("a", "a_2")]
    np.testing.assert_array_equal(*both)  # the same pixels under the same file name
    sample = gtr_sampler(flow_of(runs / "LIDC").gtr)
    generator = torch.Generator().manual_seed(image_seed(0, "a.png"))
    with torch.no_grad():
        masks = sample(fitted(read_image(first), 1, 8), 4, generator)[0] >= 0.5
    np.testing.assert_array_equal(both[0], 255 * masks.numpy())


def test_nothing_is_drawn_if_one_file_is_wrong(draw, tmp_path):
    good, bad = noise(tmp_path / "good.png", 8, 8), tmp_path / "bad.png"
    bad.write_text("text")
    with pytest.raises(SystemExit, match=f"error: --images {bad}: not an image"):
        draw("LIDC", good, bad, "--samples", "1")
    assert not (tmp_path / "out").exists()


def test_a_diverged_model_writes_nothing(runs, tmp_path):
    path = noise(tmp_path / "a.png", 8, 8)
    system = System("atfm", "atfm", lambda image, n, generator: torch.full((1, n, 8, 8), torch.nan), 25,
                    (str(runs / "LIDC" / "atfm" / "best.pt"),))
    settings = settings_of("LIDC", "--images", str(path), "--output_path", str(tmp_path / "out"))
    with pytest.raises(ValueError, match="a.png: atfm gave probabilities that are not finite"):
        draw_own_images(settings, [system], torch.device("cpu"))
    assert not (tmp_path / "out").exists()


def test_the_side_is_that_of_training_and_for_the_authors_weights_that_of_the_flags(runs):
    path = runs / "isic3_style_concat" / "GTR" / "best.pt"
    assert checkpoint.load(path)["config"]["size"] == 256
    assert trained_on(str(path), settings_of("LIDC")) == (8, 3)
    authors = ["--released_checkpoint", "True"]
    assert trained_on("authors.pth", settings_of("LIDC", *authors)) == (128, 1)
    assert trained_on("authors.pth", settings_of("isic3_style_concat", *authors, "--crop", "96")) == (96, 3)
