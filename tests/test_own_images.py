"""Samples for a user's images, from the command to the files. (Reading them: test_images.py.)"""

import gzip
import tracemalloc
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import count
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

import test_prior_LIDC
from data.convert import Reader
from data.images import fitted, read_image
from data.readers import READERS
from fig import draw_own_images, pictures
from metrics import image_seed
from models import load_flow, load_gtr
from models.flags import experiment
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
    drawn = np.stack([pixels_of(folder / f"sample_0{number}.png") for number in range(3)])
    metadata = replace(experiment("LIDC").metadata, crop=8)
    atfm = load_flow(run / "atfm" / "best.pt", "atfm", lambda: load_gtr(run / "GTR" / "best.pt", metadata),
                     metadata)
    generator = torch.Generator().manual_seed(image_seed(5, "/".join(path.parts[-3:])))
    masks = atfm.sample(fitted(read_image(path), 1, 8), 3, 2, generator=generator)[0] >= 0.5
    np.testing.assert_array_equal(drawn, 255 * np.kron(masks, np.ones((1, 2, 3), int)))
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


def system(sample, side=8, channels=1, **changes):
    """A flow, as `models.systems.System`, that was trained on square images of that side."""
    return SimpleNamespace(**{"label": "atfm", "nfe": 1, "trained_on": TrainedOn(side, channels),
                              "sample": sample, "weights": "0123", "solver": "euler", "steps": 1,
                              "precision": "float32"} | changes)


def discs(image, n, generator):
    """Samples that differ: discs of random radius about the middle."""
    h, w = image.shape[2:]
    distance = torch.hypot(torch.arange(h)[:, None] - h / 2, torch.arange(w)[None] - w / 2)
    return (distance < h / 2 * torch.rand(1, n, 1, 1, generator=generator)).float()


def bright(image, n, generator):
    """n times the image itself: its mask is where it is at least 1/2."""
    return image[:, :1].expand(-1, n, -1, -1)


LIDC = experiment("LIDC").metadata
CASES = replace(LIDC, reader="cases", size=8)


def test_grey_goes_through_a_model_of_rgb_and_a_diverged_model_writes_nothing(tmp_path, capsys):
    path, sizes = noise(tmp_path / "a.png", 9, 7), []

    def sample(value, image, n, generator):
        sizes.append(tuple(image.shape))
        return torch.full((1, n, 8, 8), value)

    with pytest.raises(ValueError, match="a.png: atfm gave probabilities that are not finite"):
        draw_own_images([system(partial(sample, torch.nan), channels=3)], [str(path)], 2, 0,
                        tmp_path / "out", "cpu", LIDC)
    assert not (tmp_path / "out").exists()
    draw_own_images([system(partial(sample, 1.0), channels=3)], [str(path)], 2, 0, tmp_path / "out", "cpu",
                    LIDC)
    assert sizes == [(1, 3, 8, 8)] * 2 and (pixels_of(tmp_path / "out" / "a" / "mean.png") == 255).all()
    assert "9 x 7 grey (not square, so its proportions change) resized to 8 x 8 RGB" in (
        capsys.readouterr().out)


def test_a_new_reader_is_one_entry(tmp_path, monkeypatch):
    monkeypatch.setitem(READERS, "new", Reader("a new form", lambda path: False))
    path = noise(tmp_path / "a.png", 8, 8)
    draw_own_images([system(discs)], [str(path)], 2, 0, tmp_path, "cpu", replace(LIDC, reader="new"))
    assert (tmp_path / "a" / "sample_01.png").exists()


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sampled(tmp_path, path, **changes):
    """Draws the samples of an image below tmp_path / "out"; returns the folders there."""
    draw_own_images([system(discs, **changes)], [str(path)], 3, 0, tmp_path / "out", "cpu", LIDC)
    return sorted(place.name for place in (tmp_path / "out").iterdir())


def test_samples_of_two_files_of_a_name_are_kept_side_by_side(tmp_path, capsys):
    paths = [tmp_path / who / "scan.png" for who in ("anna", "bert")]
    for path in paths:
        path.parent.mkdir()
        noise(path, 8, 8)
    sampled(tmp_path, paths[0])
    before = contents(tmp_path / "out")
    assert sampled(tmp_path, paths[1]) == ["scan", "scan_2"]
    assert contents(tmp_path / "out" / "scan") == {
        name.removeprefix("scan/"): content for name, content in before.items()}
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith(f"{tmp_path}/out/scan: kept, the results of another command; image differ")
    assert f"{tmp_path}/out/scan_2" in lines[-1]


@pytest.mark.parametrize("change", [{"weights": "4567"}, {"steps": 2}, "image"])
def test_another_command_writes_beside_what_was_made(tmp_path, change):
    path = noise(tmp_path / "a.png", 8, 8)
    sampled(tmp_path, path)
    before = contents(tmp_path / "out" / "a")
    if change == "image":
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    assert sampled(tmp_path, path, **({} if change == "image" else change)) == ["a", "a_2"]
    assert contents(tmp_path / "out" / "a") == before


def test_the_same_command_makes_what_is_missing_and_keeps_what_is_there(tmp_path, capsys):
    path, folder = noise(tmp_path / "a.png", 8, 8), tmp_path / "out" / "a"
    sampled(tmp_path, path)
    (folder / "notes.txt").write_text("the user's")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "sample_00.png")  # corrected by hand
    before = contents(folder)
    for name in ("sample_01.png", "picture.png"):
        (folder / name).unlink()
    assert sampled(tmp_path, path) == ["a"]
    assert contents(folder) == before
    assert f"{folder}: of an earlier run of this command; the files that" in capsys.readouterr().out


def test_what_the_user_made_is_kept_whatever_it_is(tmp_path):
    path = noise(tmp_path / "a.png", 8, 8)
    (tmp_path / "out" / "a").mkdir(parents=True)  # a folder
    (tmp_path / "out" / "a" / "sample_00.png").write_text("the user's")
    (tmp_path / "out" / "a_2").write_text("a file")
    before = contents(tmp_path / "out")
    assert sampled(tmp_path, path) == ["a", "a_2", "a_3"]
    assert before.items() <= contents(tmp_path / "out").items()


def nifti(path, values, affine, **header):
    """Values (x, y, z) as NIfTI."""
    image = nibabel.Nifti1Image(values, affine)
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize("shape, axis, grow", [
    ((6, 8, 3), 0, False), ((16, 12, 3), 0, False), ((2, 4, 5), 2, True)])
def test_a_volumes_masks_lie_where_its_voxels_do_under_a_header_without_range_and_scaling(
        tmp_path, shape, axis, grow):
    random, affine = np.random.RandomState(0), np.diag([-1.0, -1, 2, 1])
    coarse = random.randint(0, 2, [-(-side // 2) for side in shape])  # blocks, which resizing by 2 keeps
    inside = np.kron(coarse, np.ones((2, 2, 2)))[tuple(map(slice, shape))]
    values = (1000 * inside - 500).astype(np.int16)
    path = nifti(tmp_path / "ct.nii", values, affine, cal_min=-160, cal_max=240, scl_slope=2, scl_inter=-24)
    metadata = replace(CASES, reader="mmis" if grow else "cases", axis="xyz"[2 - axis] if axis else "fewest")
    draw_own_images([system(bright)], [str(path)], 3, 0, tmp_path / "out", "cpu", metadata)
    folder = tmp_path / "out" / "ct"
    assert sorted(place.name for place in folder.iterdir()) == [
        "mean.nii.gz", *[f"sample_0{i}.nii.gz" for i in range(3)], "settings.json", "variance.nii.gz"]
    for name in ("sample_02", "mean", "variance"):
        written = nibabel.load(folder / f"{name}.nii.gz")
        expected = 0 * inside if name == "variance" else inside
        np.testing.assert_array_equal(np.asarray(written.dataobj), expected)
        np.testing.assert_allclose(written.affine, affine)
        raw = gzip.decompress((folder / f"{name}.nii.gz").read_bytes())  # nibabel hides what it applies
        header = nibabel.Nifti1Header(raw[:348])
        assert (float(header["cal_min"]), float(header["cal_max"])) == (0, 0)
        assert float(header["scl_slope"]) in (0, 1) and float(header["scl_inter"]) == 0


def peak(action):
    """Bytes that an action held at most beyond what there was, of Python's and NumPy's."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("values", [np.int16([-500, 0, 1500, 500]), np.uint8([0, 51, 255, 102])])
def test_the_slices_of_a_volume_keep_their_contrast(values, tmp_path):
    """Each slice has one intensity, which the model sees as a fraction of the whole volume's range."""
    seen = []

    def sample(image, n, generator):
        seen.append(image.mean().item())
        return torch.zeros(1, n, 8, 8)

    volume = np.broadcast_to(values, (8, 8, 4))
    path = nifti(tmp_path / "a.nii", np.ascontiguousarray(volume), np.diag([-1.0, -1, 1, 1]))
    draw_own_images([system(sample)], [str(path)], 1, 0, tmp_path / "out", "cpu", replace(CASES, axis="z"))
    low, high = (0, 255) if values.dtype == np.uint8 else (-500, 1500)
    assert seen == pytest.approx((values.astype(float) - low) / (high - low), abs=1e-6)


def test_memory_is_that_of_one_volume_and_a_bit_per_sample_and_voxel(tmp_path):
    values = np.random.RandomState(0).normal(0, 1, (64, 64, 40)).astype(np.float32)
    voxels = values.size
    paths = [nifti(tmp_path / f"{i}.nii", values, np.eye(4)) for i in range(4)]

    folders = (tmp_path / str(number) for number in count(1))

    def memory(volumes, n):
        return peak(lambda: draw_own_images([system(discs, side=64)], list(map(str, paths[:volumes])), n, 0,
                                            next(folders), "cpu", replace(CASES, size=64)))

    memory(1, 2)  # what is imported and cached once
    base = memory(1, 2)
    assert (memory(1, 42) - base) / 40 / voxels < 0.5  # bytes; an eighth, and a slice's samples
    assert (memory(4, 2) - base) / 3 / voxels < 0.5


def test_the_samples_of_a_large_picture_are_not_all_enlarged(tmp_path):
    image, masks = torch.zeros(1, 1024, 1024), torch.zeros(64, 8, 8, dtype=torch.bool)
    largest = []

    def interpolated(values, size, **settings):
        largest.append(values.shape[1] * size[0] * size[1])
        return interpolate(values, size, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "interpolate", interpolated)
        pictures.write_samples(tmp_path, image, masks)
    assert max(largest) <= 9 * 512 ** 2
