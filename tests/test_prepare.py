"""From a folder of cases to a file that all three scripts take, and back into the images' geometry."""

import shutil
import tracemalloc
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
from PIL import Image

import data
import test_prior_LIDC
import train_GTR
import train_prior_LIDC
from data import prepare
from data.dataset import ExpertDataset
from data.store import open_store
from models.flags import experiment
from tests import tiny

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
KEPT = "--split file keeps it"
LOOP = ["--device", "cpu", *tiny.LOOP]


def write_case(folder, image, masks, suffix="png"):
    """image.<suffix> and seg_00.<suffix>, ... of a case."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"image": image} | {f"seg_{i:02}": 255 * mask for i, mask in enumerate(masks.astype(np.uint8))}
    for name, values in arrays.items():
        path = folder / f"{name}.{suffix}"
        if suffix == "npy":
            np.save(path, values)
        elif suffix == "dcm":
            tiny.write_dicom(path, values)
        elif suffix == "nii.gz":
            nibabel.save(nibabel.Nifti1Image(values.T, np.diag([-1.0, -1.0, 2.0, 1.0])), path)
        else:
            Image.fromarray(values).save(path)


@pytest.fixture
def undrawn(no_pictures, monkeypatch):
    monkeypatch.setattr(prepare, "draw", lambda *arguments: None)


@pytest.fixture
def folder(tmp_path):
    """Eight cases of 13 x 22 pixels, of 2 or 3 experts."""
    random = np.random.RandomState(0)
    for number in range(8):
        masks = np.stack([np.pad(mask, ((1, 0), (5, 5))) for mask in tiny.expert_masks(random, 3, 12)])
        image = np.uint8(255 * tiny.image_of(random, masks))
        write_case(tmp_path / "cases" / f"c{number}", image, masks[:2 + number % 2])
    return tmp_path / "cases"


def run(folder, *flags):
    output = folder.with_name("mine.h5")
    prepare.main([str(folder), "--output", str(output), *map(str, flags)])
    return output


def test_the_content_is_printed_drawn_and_kept(folder, capsys):
    path = run(folder)
    said = capsys.readouterr().out
    for line in ("8 cases", "8 images of 24 x 24, 1 channel", "8 patients, such as c0",
                 "were fitted: 13 x 22 (8)", "experts per image: 2 (4 images), 3 (4 images)",
                 *(f"  python {script} --what {path} --preset best\n" for script in (
                     "train_GTR.py", "train_prior_LIDC.py", "test_prior_LIDC.py"))):
        assert line in said
    store = open_store(path)
    images = ExpertDataset(store, np.arange(8))
    masks = [images[i][1].numpy().astype(bool) for i in range(8)]
    dice = [np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for i, a in enumerate(of) for b in of[i + 1:]])
            for of in masks]
    assert f"mean pairwise Dice of experts: {np.mean(dice):.3f}, over 8 images" in said
    assert f"fingerprint: {images.fingerprint}" in said
    assert f"nothing: {np.mean([not mask.any() for of in masks for mask in of]):.1%}" in said
    assert (store.ids[3], store.patient[3], store.experts[3]) == ("c3", "c3", 3)
    fields = store.fields
    assert (fields["height"][3], fields["width"][3], fields["axis"][3]) == (13, 22, -1)
    assert fields["file"][3] == str(folder / "c3" / "image.png")
    pixels = np.asarray(Image.open(folder / "c3" / "image.png"))
    np.testing.assert_allclose(images[3][0][0, 5:18, 1:23], pixels / 255, atol=1e-6)
    assert images[3][0].sum() == pytest.approx(pixels.sum() / 255, rel=1e-5)  # zeros about it
    assert Image.open(path.with_suffix(".png")).size[0] > 1000


def test_three_commands_train_test_and_export(folder, tmp_path, capsys, undrawn):
    path, output = run(folder), ["--output_path", str(tmp_path / "run")]
    flags = ["--what", str(path), *output]
    train_GTR.main([*flags, *LOOP, "--num_filters", "4", "8", "--epochs", "1"])
    train_prior_LIDC.main([*flags, *LOOP, "--dim", "4", "--dim_mults", "1", "--num_epochs", "1"])
    test_prior_LIDC.main([*flags, "--device", "cpu", "--samples", "3", "--seeds", "0"])
    assert "| atfm, ours |" in capsys.readouterr().out
    image = folder / "c3" / "image.png"
    volume = np.random.RandomState(0).rand(3, 20, 9).astype(np.float32)  # (x, y, z): cut across x
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([1.0, 1.0, 3.0, 1.0])), tmp_path / "v.nii.gz")
    test_prior_LIDC.main([*flags, "--device", "cpu", "--samples", "2", "--images", str(image),
                          str(tmp_path / "v.nii.gz")])
    with Image.open(tmp_path / "run" / "images" / "c3_image" / "sample_00.png") as sample:
        assert sample.size == (22, 13)
    samples = [nibabel.load(tmp_path / "run" / "images" / "v" / f"sample_0{i}.nii.gz") for i in range(2)]
    values = np.stack([np.asarray(sample.dataobj) for sample in samples])
    assert values.shape == (2, 3, 20, 9) and values.dtype == np.uint8 and set(np.unique(values)) <= {0, 1}
    np.testing.assert_allclose(samples[0].affine, np.diag([1.0, 1.0, 3.0, 1.0]))
    variance = nibabel.load(tmp_path / "run" / "images" / "v" / "variance.nii.gz")
    np.testing.assert_allclose(variance.get_fdata(), values.var(0), atol=1e-6)


def test_a_volume_is_cut_and_fitted_and_a_window_is_kept(tmp_path, undrawn):
    volume = np.arange(3 * 40 * 20).reshape(3, 40, 20).astype(np.int16)
    write_case(tmp_path / "cases" / "a", volume, np.repeat(volume[None] % 2 > 0, 2, axis=0), "npy")
    path = run(tmp_path / "cases", "--size", 16, "--window", 0, 2400)
    store = open_store(path)
    assert store.ids == ["a/000", "a/001", "a/002"] and store.fields["axis"].tolist() == [0] * 3
    image, masks = ExpertDataset(store, np.arange(3))[1]
    assert image.shape == (1, 16, 16) and masks.shape == (2, 16, 16)
    assert image[:, :, 4:12].mean() == pytest.approx(volume[1].mean() / 2400, abs=0.01)
    assert image[:, :, :4].max() == image[:, :, 12:].max() == 0
    metadata = experiment(str(path)).metadata
    assert metadata.window == (0, 2400) and metadata.axis == "z"  # which --images are cut across too
    path.unlink()
    assert len(open_store(run(tmp_path / "cases", "--axis", "x"))) == 20


@pytest.mark.parametrize("folds, line, tested", [
    ({"train": 5, "Test": 3}, f"came as 5 train, 3 test; {KEPT}; of train, 20% of the patients validate", 3),
    ({"a/training": 4, "a/validation": 4}, f"came as 4 train, 4 test; {KEPT}; of train, 20%", 4),
    ({"Train": 4, "val": 2, "test": 2}, f"came as 4 train, 2 val, 2 test; {KEPT}\n", 2),
    ({"train": 4, ".": 4}, "none came with them; --split group, by patient, 64 / 16 / 20 %", 2),
])
def test_the_split_of_folders_is_kept_and_said(folder, tmp_path, capsys, undrawn, folds, line, tested):
    cases_of = iter(sorted(folder.iterdir()))
    for fold, count in folds.items():
        for _, case in zip(range(count), cases_of):
            shutil.copytree(case, tmp_path / "split" / fold / case.name)
    metadata = experiment(str(run(tmp_path / "split"))).metadata
    assert f"split: {line}" in capsys.readouterr().out
    assert metadata.split == ("group" if "none" in line else "file")
    parts = {part: set(data.load(metadata, part).patients) for part in ("train", "val", "test")}
    assert len(parts["test"]) == tested and sum(map(len, parts.values())) == 8
    if metadata.split == "file":
        names = {part: set(data.load(metadata, part).ids) for part in parts}
        assert all(name.startswith("test/") for name in names["test"])
        assert not any(name.startswith("test/") for name in names["train"] | names["val"])


@pytest.mark.parametrize("damage, flags, message", [
    (lambda folder: None, ["--size", "20"], "--size 20: expected a multiple of 8, 8 to 2048"),
    (lambda folder: None, ["--size", "800000"], "--size 800000: expected"),
    (lambda folder: None, ["--window", "300", "100"], "--window 300 100: expected two numbers of which"),
    (lambda folder: None, ["--label", "7"], r"no mask marks anything with --label \[7\]"),
    (lambda folder: shutil.copytree(folder / "c1", folder / "d"), [], "c1/image.png, of another patient"),
    (lambda folder: Image.new("L", (22, 14)).save(folder / "c1" / "seg_01.png"), [],
     r"c1/seg_01.png: a mask of \(14, 22\), expected \(13, 22\)"),
    (lambda folder: Image.new("L", (22, 13), 9).save(folder / "c1" / "seg_01.png"), [],
     "c1: masks with the labels 9, 255; choose with --label"),
    (lambda folder: Image.new("RGB", (22, 13)).save(folder / "c1" / "image.png"), [],
     "c1/image.png: 3 channels, expected 1"),
    (lambda folder: write_case(folder / "z", np.zeros((9, 300), np.uint8), np.ones((2, 9, 300))), [],
     "images of up to 300 pixels per side; choose --size"),
])
def test_what_makes_no_sense_is_named_and_nothing_is_written(folder, damage, flags, message):
    damage(folder)
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as end:
        run(folder, *flags)
    assert len(str(end.value)) < 400 and "\n" not in str(end.value)
    assert not folder.with_name("mine.h5").exists()


@pytest.mark.parametrize("name, message", [
    ("cases/c1/image.h5", "--output .*image.h5: lies in"),
    ("a.png", "--output .*a.png: expected a name that ends in .h5"),
    ("raw.h5", "--output .*raw.h5: exists and was not made by this"),
    ("mine.h5", "--output .*mine.png, which was not made by this program")])
def test_the_output_is_no_input_and_nothing_of_another_s(folder, tmp_path, name, message):
    with h5py.File(tmp_path / "raw.h5", "w") as file:
        file["ct"] = np.zeros(9)
    (tmp_path / "mine.png").write_text("a picture of the user's")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        prepare.main([str(folder), "--output", str(tmp_path / name)])
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.*")}


def test_a_file_is_replaced_by_its_command_alone(folder, undrawn):
    for _ in range(2):  # the same command
        output = run(folder)
    before = output.read_bytes()
    with pytest.raises(SystemExit, match="^error: --output .*mine.h5: exists and is of another origin, '"):
        run(folder, "--window", 0, 9)
    assert output.read_bytes() == before


@pytest.mark.parametrize("error, message", [
    (MemoryError("Unable to allocate 3 GiB"), "^error: out of memory. What helps: smaller volumes.* 3 GiB.$"),
    (PermissionError(13, "Permission denied", "seg.nii"), "^error: .*Permission denied: 'seg.nii'"),
    (OSError(28, "No space left on device"), "^error: .*No space left on device"),
])
def test_what_the_machine_lacks_ends_the_command_in_one_line(folder, monkeypatch, error, message):
    def fail(*arguments):
        raise error

    monkeypatch.setattr("data.volumes.decoded", fail)
    with pytest.raises(SystemExit, match=message):
        run(folder)
    assert not folder.with_name("mine.h5").exists()


def test_memory_is_of_one_volume_at_a_time(tmp_path, undrawn):
    for number in range(4):  # of 8 MB each, with three masks
        volume = np.random.RandomState(number).randint(0, 2000, (16, 512, 512)).astype(np.int16)
        masks = np.repeat(volume[None] > 1990, 3, axis=0)
        write_case(tmp_path / "cases" / f"c{number}", volume, masks, "npy")
    tracemalloc.start()
    run(tmp_path / "cases", "--size", 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 16 * 512 * 512 * 2  # 67 MB; as float64, the four volumes alone take 134 MB


def test_check_says_what_every_form_holds(folder, lidc, lidc_folder, isic_folder, tmp_path, capsys,
                                          monkeypatch):
    (tmp_path / "lidc").symlink_to(lidc_folder)
    for path, form, line in ((folder, "folder of cases", "8 images of 24 x 24"),
                             (lidc, "store", "30 images of 128 x 128, 1 channel"),
                             (lidc_folder, "LIDC pickles", "not these, 15 of 15 series"),
                             (isic_folder, "ISIC3 folder", "experts per image: 3 (15 images)")):
        before = sorted(path.parent.iterdir())
        prepare.main(["--check", str(path)])
        said = capsys.readouterr().out
        assert f"{path}: {form}\n" in said and line in said and "fingerprint: " in said
        assert sorted(path.parent.iterdir()) == before  # nothing is converted beside it
    with pytest.raises(SystemExit, match="^error: --check .*none: no such file"):
        prepare.main(["--check", str(tmp_path / "none")])
    monkeypatch.setattr(prepare, "PAPER_FILE", (30, 15))
    prepare.main(["--check", str(lidc)])
    assert "30 slices of 15 series: the same numbers" in capsys.readouterr().out


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_real_slices_are_the_same_through_five_containers(tmp_path, undrawn):
    with h5py.File(SHARED / "lidc_dev.h5") as file:
        rows = slice(100, 1100, 200)
        images = file["images"][rows]
        masks = np.unpackbits(file["masks_packed"][rows], axis=-1).reshape(-1, 4, 128, 128)
    for suffix in ("png", "tif", "npy", "nii.gz", "dcm"):
        for number, (image, of_experts) in enumerate(zip(images, masks)):
            write_case(tmp_path / suffix / f"c{number}", image, of_experts, suffix)
        (tmp_path / "mine.h5").unlink(missing_ok=True)
        run(tmp_path / suffix)
        train = data.load(experiment(str(tmp_path / "mine.h5")).metadata, "train")
        assert len(train) == 3
        for name, (image, its_masks) in zip(train.ids, (train[i] for i in range(3))):
            number = int(name.removeprefix("c"))
            np.testing.assert_allclose(image[0], images[number] / 255, atol=1e-5)
            np.testing.assert_array_equal(its_masks, masks[number])
