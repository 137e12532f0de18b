"""Samples for images of the user's own, from the command to the files. (Reading them: test_images.py.)"""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import test_prior_LIDC
from data.images import fitted, read_image
from fig import draw_own_images
from metadata_manager import experiment
from metrics import image_seed
from models import load_flow, load_gtr
from models.gtr import TrainedOn
from models.processes import Processes


def noise(path, *shape):
    """An image of random pixels, of which the noisy model of these tests draws different samples."""
    Image.fromarray(np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)).save(path)
    return path


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture
def draw(run, tmp_path):
    """Calls the test script on images, writing into tmp_path / "out", without any data set."""

    def call(*flags):
        test_prior_LIDC.main(["--images", *map(str, flags), "--output_path", str(tmp_path / "out"),
                              "--device", "cpu", "--gtr", str(run), "--prior", str(run)])
        return tmp_path / "out" / "images"

    return call


def test_the_flow_draws_from_an_image_of_any_shape_whatever_else_is_drawn(draw, run, tmp_path, capsys):
    path, other = noise(tmp_path / "scan.png", 16, 24), noise(tmp_path / "b.png", 8, 8)
    folder = draw(other, path, "--samples", "2", "3", "--seeds", "5", "--steps", "2") / "scan"
    found = np.stack([pixels_of(folder / f"sample_0{number}.png") for number in range(3)])
    metadata = replace(experiment("LIDC").metadata, crop=8)
    atfm = load_flow(run / "atfm" / "best.pt", "atfm", lambda: load_gtr(run / "GTR" / "best.pt", metadata), metadata)
    generator = torch.Generator().manual_seed(image_seed(5, "/".join(path.parts[-3:])))
    masks = atfm.sample(fitted(read_image(path), 1, 8), 3, 2, generator=generator)[0] >= 0.5
    np.testing.assert_array_equal(found, 255 * np.kron(masks, np.ones((1, 2, 3), int)))
    assert 0 < masks.float().mean() < 1  # else anything would do
    assert (folder / "picture.png").exists()
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"{path}: 16 x 24 grey (not square, so its proportions change) "
                           f"resized to 8 x 8 grey; 3 samples of atfm in {folder} ")


def test_of_several_processes_the_first_alone_draws(draw, tmp_path, monkeypatch):
    path = noise(tmp_path / "a.png", 8, 8)
    for rank, drawn in ((1, False), (0, True)):
        processes = Processes(torch.device("cpu"), rank, 2)
        monkeypatch.setattr(test_prior_LIDC, "join", lambda run, these=processes: nullcontext(these))
        draw(path, "--samples", "1")
        assert (tmp_path / "out").exists() == drawn


def test_nothing_is_drawn_if_one_file_is_wrong(draw, tmp_path):
    good, bad = noise(tmp_path / "good.png", 8, 8), tmp_path / "bad.png"
    bad.write_text("text")
    with pytest.raises(ValueError, match=f"--images {bad}"):
        draw(good, bad, "--samples", "1")
    assert not (tmp_path / "out").exists()


def test_grey_goes_through_a_model_of_rgb_and_a_diverged_model_writes_nothing(tmp_path, capsys):
    path, sizes = noise(tmp_path / "a.png", 9, 7), []

    def sample(value, image, n, generator):
        sizes.append(tuple(image.shape))
        return torch.full((1, n, 8, 8), value)

    system = SimpleNamespace(label="atfm", nfe=1, trained_on=TrainedOn(8, 3),
                             sample=partial(sample, torch.nan))
    with pytest.raises(ValueError, match="a.png: atfm gave probabilities that are not finite"):
        draw_own_images([system], [str(path)], 2, 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    system.sample = partial(sample, 1.0)
    draw_own_images([system], [str(path)], 2, 0, tmp_path / "out")
    assert sizes == [(1, 3, 8, 8)] * 2 and (pixels_of(tmp_path / "out" / "a" / "mean.png") == 255).all()
    assert "9 x 7 grey (not square, so its proportions change) resized to 8 x 8 RGB" in (
        capsys.readouterr().out)
