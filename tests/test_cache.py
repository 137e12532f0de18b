"""The on-disk layout: written, opened, refused when wrong, converted once, never left half-written."""

import fcntl
import multiprocessing
import os
import random
import resource
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import data
from data.cache import Cache, Writer, cached, open_cache
from data.slices import Slices
from metadata_manager import Metadata
from tests import tiny

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def images_and_masks(count=5, dtype=np.uint16, channels=1):
    random_state = np.random.RandomState(0)
    shape = (count, 6, 4) if channels == 1 else (count, 6, 4, 3)
    images = random_state.randint(0, np.iinfo(dtype).max + 1, shape).astype(dtype)
    return images, random_state.randint(0, 2, (count, 3, 6, 4)).astype(np.uint8)


def write(path, count=5, **kind):
    images, masks = images_and_masks(count, **kind)
    with Writer(path, "a test") as writer:
        for i in range(count):
            writer.append(images[i], masks[i], patient=f"p{i // 2}", id=f"é{i}", nodule=0, slice=i)
    return images, masks


def by_hand(path, **changes):
    """A foreign file: 5 images of 4 x 4, k = 3; `changes` replaces datasets or, with None, drops them."""
    contents = {"images": np.zeros((5, 4, 4), np.uint8), "masks_packed": np.zeros((5, 6), np.uint8),
                "patient": np.arange(5)} | changes
    with h5py.File(path, "w") as file:
        for name, value in contents.items():
            if value is not None:
                file[name] = value


@pytest.mark.parametrize(("dtype", "channels"), [(np.uint8, 1), (np.uint16, 1), (np.uint8, 3)])
def test_what_is_written_is_read_back(tmp_path, dtype, channels):
    images, masks = write(tmp_path / "set.h5", dtype=dtype, channels=channels)
    cache = open_cache(tmp_path / "set.h5")
    assert (cache.shape, cache.annotators) == ((5, 6, 4, channels), 3)
    assert cache.ids == ["é0", "é1", "é2", "é3", "é4"]
    assert list(cache.patient) == ["p0", "p0", "p1", "p1", "p2"]
    for i, (image, mask) in enumerate(Slices(cache, np.arange(5))):
        scaled = images[i].astype(np.float64) / np.iinfo(dtype).max
        expected = torch.from_numpy(scaled).reshape(6, 4, channels)
        assert image.dtype == mask.dtype == torch.float32
        torch.testing.assert_close(image, expected.permute(2, 0, 1).float())
        assert torch.equal(mask, torch.from_numpy(masks[i]).float())
    assert os.listdir(tmp_path) == ["set.h5"]


def test_rows_in_any_order_and_more_than_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr("data.cache.BLOCK", 4)
    images, masks = write(tmp_path / "set.h5", 11)
    rows = np.array([9, 0, 9, 3, 10, 4])  # repeats, as the released ISIC3 lists do
    slices = Slices(open_cache(tmp_path / "set.h5"), rows)
    image, mask = slices.batch([5, 0, 2])
    for b, row in enumerate((4, 9, 9)):
        assert (np.rint(image[b, 0].numpy() * 65535) == images[row]).all()
        assert (mask[b].numpy() == masks[row]).all()
    assert slices.ids == ["é9", "é0", "é9", "é3", "é10", "é4"]
    assert list(slices.groups[:2]) == ["p4", "p0"]


def test_names_of_rows_without_ids(tmp_path):
    by_hand(tmp_path / "a.h5", nodule=np.full(5, 2), slice=np.arange(5))
    by_hand(tmp_path / "b.h5", patient=["x"] * 5)
    assert open_cache(tmp_path / "a.h5").ids[1] == "patient 1, nodule 2, slice 1"
    assert open_cache(tmp_path / "b.h5").ids[1] == "patient x, row 1"


@pytest.mark.parametrize(("changes", "message"), [
    ({"images": None}, "masks_packed, patient, expected a dataset 'images'"),
    ({"patient": None}, "expected a dataset 'patient'"),
    ({"images": np.zeros((5, 4, 4), np.float32)}, "images is float32"),
    ({"images": np.zeros((5, 4), np.uint8)}, r"images is uint8 \(5, 4\)"),
    ({"images": np.zeros((5, 4, 4, 2), np.uint8)}, r"images is uint8 \(5, 4, 4, 2\)"),
    ({"images": np.zeros((0, 4, 4), np.uint8)}, r"images has shape \(0, 4, 4\), expected at least one"),
    ({"masks_packed": np.zeros((5, 6), np.int8)}, "masks_packed is int8"),
    ({"masks_packed": np.zeros((5, 6, 1), np.uint8)}, "masks_packed is uint8"),
    ({"masks_packed": np.zeros((5, 7), np.uint8)}, "7 bytes per image, expected k x 4 x 4 / 8"),
    ({"masks_packed": np.zeros((5, 1), np.uint8)}, "1 bytes per image"),
    ({"masks_packed": np.zeros((4, 6), np.uint8)}, "4 rows in masks_packed, 5 in images"),
    ({"patient": np.arange(4)}, r"patient has shape \(4,\)"),
    ({"patient": np.zeros(5)}, "patient is float64, expected integers"),
    ({"id": np.arange(5)}, "id is int64, expected text"),
    ({"style": np.zeros((5, 2), int)}, r"style has shape \(5, 2\), expected \(5, 3\)"),
    ({"images/inner": np.zeros(3), "images": None}, "'images' is a Group"),
])
def test_a_wrong_layout_is_named(tmp_path, changes, message):
    by_hand(tmp_path / "set.h5", **changes)
    with pytest.raises(ValueError, match=f"set.h5: .*{message}"):
        open_cache(tmp_path / "set.h5")


def test_other_formats_are_refused(tmp_path):
    write(tmp_path / "set.h5")
    with h5py.File(tmp_path / "set.h5", "a") as file:
        file.attrs["atfm_format"] = 99
    with pytest.raises(ValueError, match="format 99, expected 1"):
        open_cache(tmp_path / "set.h5")
    (tmp_path / "text.h5").write_text("not HDF5")
    with pytest.raises(ValueError, match="text.h5: not a readable HDF5 file"):
        open_cache(tmp_path / "text.h5")
    with pytest.raises(FileNotFoundError, match="none.h5"):
        open_cache(tmp_path / "none.h5")


@pytest.mark.parametrize("link", [h5py.ExternalLink("other.h5", "/images"), h5py.SoftLink("/patient")])
def test_links_are_refused(tmp_path, link):
    by_hand(tmp_path / "other.h5")
    by_hand(tmp_path / "set.h5", images=None)
    with h5py.File(tmp_path / "set.h5", "a") as file:
        file["images"] = link
    with pytest.raises(ValueError, match="'images' is a (External|Soft)Link"):
        open_cache(tmp_path / "set.h5")


@pytest.mark.parametrize("kind", ["external", "virtual"])
def test_data_in_other_files_is_refused(tmp_path, kind):
    (tmp_path / "secret").write_bytes(bytes(80))
    by_hand(tmp_path / "other.h5")
    by_hand(tmp_path / "set.h5", images=None)
    with h5py.File(tmp_path / "set.h5", "a") as file:
        if kind == "external":
            file.create_dataset("images", (5, 4, 4), np.uint8, external=[(str(tmp_path / "secret"), 0, 80)])
        else:
            layout = h5py.VirtualLayout((5, 4, 4), np.uint8)
            layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "images", (5, 4, 4))
            file.create_virtual_dataset("images", layout)
    with pytest.raises(ValueError, match="keeps its data in other files"):
        open_cache(tmp_path / "set.h5")


def test_a_size_that_is_claimed_but_not_stored_is_refused(tmp_path):
    by_hand(tmp_path / "set.h5", images=None)
    with h5py.File(tmp_path / "set.h5", "a") as file:  # 16 TB of images, no chunk of which exists
        file.create_dataset("images", (10**12, 4, 4), np.uint8, chunks=(1, 4, 4))
    with pytest.raises(ValueError, match="claims 16000000000000 bytes and stores 0"):
        open_cache(tmp_path / "set.h5")


def test_writer_leaves_nothing_when_it_fails(tmp_path):
    images, masks = images_and_masks()
    before = (tmp_path / "set.h5")
    before.write_text("old")
    with pytest.raises(KeyboardInterrupt), Writer(before, "a test") as writer:
        writer.append(images[0], masks[0], patient=1)
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="set.h5: nothing was written"), Writer(before, "a test"):
        pass
    assert os.listdir(tmp_path) == ["set.h5"] and before.read_text() == "old"


@pytest.mark.parametrize(("image", "masks", "fields", "message"), [
    (np.zeros((6, 4), np.float32), np.zeros((3, 6, 4)), {"patient": 1}, "image float32"),
    (np.zeros((6, 4), np.uint8), np.zeros((3, 4, 6)), {"patient": 1}, r"masks \(3, 4, 6\)"),
    (np.zeros((6, 4), np.uint8), np.zeros((3, 6, 4)), {"id": "a"}, r"a row with \['id'\]"),
    (np.zeros((6, 4), np.uint8), np.zeros((3, 6, 4)), {"patient": 1, "colour": 2}, "colour"),
    (np.zeros((6, 4), np.uint16), np.zeros((3, 6, 4)), {"patient": 1}, "the first row had"),
    (np.zeros((6, 4), np.uint8), np.zeros((2, 6, 4)), {"patient": 1}, "the first row had"),
    (np.zeros((6, 4), np.uint8), np.zeros((3, 6, 4)), {"patient": 1, "slice": 1}, "the first row had"),
])
def test_writer_refuses_a_row_that_does_not_fit(tmp_path, image, masks, fields, message):
    refused = pytest.raises(ValueError, match=f"set.h5: .*{message}")
    with refused, Writer(tmp_path / "set.h5", "a test") as writer:
        writer.append(np.zeros((6, 4), np.uint8), np.zeros((3, 6, 4)), patient=0)
        writer.append(image, masks, **fields)
    assert not os.listdir(tmp_path)


def in_child(function, *arguments):
    """A started process: what it crashes, hangs or limits is its own."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def exit_code(process, seconds=60):
    process.join(seconds)
    return process.exitcode


def write_to_a_full_disk(path):
    """A limit on the file size stands in for the full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    with pytest.raises(OSError, match="set.h5: cannot be written"), Writer(path, "a test") as writer:
        for i in range(100):
            writer.append(np.ones((64, 64), np.uint16), np.ones((4, 64, 64)), patient=i)


def test_a_full_disk_leaves_nothing(tmp_path):
    assert exit_code(in_child(write_to_a_full_disk, tmp_path / "set.h5")) == 0
    assert not os.listdir(tmp_path)


def convert(files, writer):
    """One image per file, its brightness the file's content."""
    for file in files:
        image = np.full((4, 4), int(file.read_text()), np.uint8)
        writer.append(image, np.zeros((3, 4, 4)), patient=file.name, id=file.name)


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "data" / "source"
    folder.mkdir(parents=True)
    for i in range(3):
        (folder / f"{i}.txt").write_text(str(i))
    return folder


def brightness(cache: Cache) -> list[int]:
    return cache.read(np.arange(len(cache)))[0][:, 0, 0, 0].tolist()


def test_a_source_is_converted_once_and_again_when_it_changes(source, capsys):
    files = sorted(source.iterdir())
    assert brightness(cached(source, files, convert)) == [0, 1, 2]
    place = source.with_name("source.atfm.h5")
    assert f"converting once, into {place}" in capsys.readouterr().out
    cached(source, files, None)  # `None` cannot be called
    assert capsys.readouterr().out == ""
    files[1].write_text("77")
    os.utime(files[1], ns=(time.time_ns(), time.time_ns() + 1))
    assert brightness(cached(source, files, convert)) == [0, 77, 2]
    assert "its files changed" in capsys.readouterr().out
    assert brightness(cached(source, files[:2], convert)) == [0, 77]
    assert sorted(os.listdir(source.parent)) == ["source", "source.atfm.h5"]


def test_a_read_only_folder_is_cached_in_the_home(source, tmp_path, monkeypatch, capsys):
    class ReadOnly(Writer):
        def __init__(self, path, *rest):
            if path.parent == source.parent:
                raise PermissionError(f"{path}: read-only")
            super().__init__(path, *rest)

    monkeypatch.setattr("data.cache.Writer", ReadOnly)
    files = sorted(source.iterdir())
    found = cached(source, files, convert)
    assert found.path.parent == tmp_path / "home" / "atfm" and str(found.path) in capsys.readouterr().out
    assert brightness(cached(source, files, None)) == [0, 1, 2]

    def refuse(self, path, *rest):
        raise PermissionError(f"{path}: read-only")

    monkeypatch.setattr(ReadOnly, "__init__", refuse)
    with pytest.raises(OSError, match="set XDG_CACHE_HOME"):
        cached(source, files[:1], convert)


def test_a_damaged_cache_is_converted_again(source, capsys):
    files = sorted(source.iterdir())
    place = cached(source, files, convert).path
    place.write_bytes(place.read_bytes()[:2000])
    assert brightness(cached(source, files, convert)) == [0, 1, 2]
    assert "unusable" in capsys.readouterr().out


def test_a_failed_conversion_leaves_nothing(source):
    (source / "3.txt").write_text("not a number")
    with pytest.raises(ValueError):
        cached(source, sorted(source.iterdir()), convert)
    assert os.listdir(source.parent) == ["source"]


def convert_slowly(source):
    def convert_and_wait(files, writer):
        image = np.zeros((64, 64), np.uint16)
        for i in range(1000):  # 8 MB
            writer.append(image + i, np.zeros((3, 64, 64)), patient=i)

    cached(source, sorted(source.iterdir()), convert_and_wait)


def test_a_conversion_killed_at_random_moments_leaves_no_half_cache(source):
    begin = time.perf_counter()
    assert exit_code(in_child(convert_slowly, source)) == 0
    seconds, place = time.perf_counter() - begin, source.with_name("source.atfm.h5")
    moments = random.Random(0)
    for _ in range(tiny.KILLS):
        place.unlink(missing_ok=True)
        process = in_child(convert_slowly, source)
        process.join(moments.uniform(0, seconds))
        process.kill()
        process.join()
        if place.exists():
            assert open_cache(place).read(np.arange(1000))[0][:, 0, 0, 0].tolist() == list(range(1000))
    convert_slowly(source)
    assert sorted(os.listdir(source.parent)) == ["source", "source.atfm.h5"]


def convert_together(source, barrier):
    def convert_and_wait(files, writer):
        convert(files, writer)
        barrier.wait(30)  # passes when both have found no cache and written their rows

    assert brightness(cached(source, sorted(source.iterdir()), convert_and_wait)) == [0, 1, 2]


def test_a_cache_is_read_while_its_writer_still_holds_its_lock(source):
    cached(source, sorted(source.iterdir()), convert)
    with open(source.with_name("source.atfm.h5"), "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert brightness(cached(source, sorted(source.iterdir()), None)) == [0, 1, 2]


def test_processes_that_convert_at_once_do_not_meet(source):
    barrier = multiprocessing.get_context("fork").Barrier(2)
    both = [in_child(convert_together, source, barrier) for _ in range(2)]
    assert [exit_code(process) for process in both] == [0, 0]
    assert sorted(os.listdir(source.parent)) == ["source", "source.atfm.h5"]
    assert brightness(open_cache(source.with_name("source.atfm.h5"))) == [0, 1, 2]


def test_load_refuses_what_does_not_match_the_metadata(tmp_path):
    by_hand(tmp_path / "set.h5")
    fits = {"data_path": str(tmp_path / "set.h5"), "annotators": 3, "size": 4}
    assert len(data.load(Metadata(**fits), "train")) == 3
    for wrong, message in (
        ({"annotators": 4}, "3 annotators, expected 4"), ({"channels": 3}, "1 image channels"),
        ({"size": 5}, "pixels per side"), ({"crop": 5}, "--crop 5"), ({"limit": 0}, "--limit 0"),
        ({"split": "random"}, "--split random"), ({"data_path": "nowhere"}, "--data_path"),
        ({"data_path": ""}, "--data_path"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            data.load(Metadata(**(fits | wrong)), "train")
    with pytest.raises(ValueError, match="split 'dev'"):
        data.load(Metadata(**fits), "dev")


def test_limit_and_crop(tmp_path):
    write(tmp_path / "set.h5", 9)
    cache = open_cache(tmp_path / "set.h5")
    whole, cropped = Slices(cache, np.arange(9)), Slices(cache, np.arange(9), crop=2)
    for part in (0, 1):
        assert torch.equal(cropped[3][part], whole[3][part][:, 2:4, 1:3])
    assert cropped.fingerprint != whole.fingerprint
    with pytest.raises(ValueError, match="--crop 5: .* 6 x 4"):
        Slices(cache, np.arange(9), crop=5)
    with pytest.raises(ValueError, match="no image"):
        Slices(cache, np.arange(0))


def test_limit_keeps_the_first_images_of_each_split(tmp_path):
    by_hand(tmp_path / "set.h5")
    described = Metadata(data_path=str(tmp_path / "set.h5"), annotators=3, size=4)
    limited = Metadata(data_path=str(tmp_path / "set.h5"), annotators=3, size=4, limit=2)
    assert data.load(limited, "train").ids == data.load(described, "train").ids[:2]
    assert len(data.load(limited, "test")) == 1


def test_fingerprint_follows_content_and_rows_not_the_path(tmp_path):
    write(tmp_path / "a.h5")
    write(tmp_path / "b.h5")
    of = {name: Slices(open_cache(tmp_path / f"{name}.h5"), np.arange(3)).fingerprint for name in "ab"}
    assert of["a"] == of["b"]
    assert Slices(open_cache(tmp_path / "a.h5"), np.array([0, 2, 1])).fingerprint != of["a"]
    with h5py.File(tmp_path / "b.h5", "a") as file:
        file["masks_packed"][1, 0] ^= 1
    assert Slices(open_cache(tmp_path / "b.h5"), np.arange(3)).fingerprint != of["a"]


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_real_slices():
    described = Metadata(data_path=str(SHARED / "lidc_dev.h5"))
    parts = {split: data.load(described, split) for split in ("train", "val", "test")}
    assert sum(map(len, parts.values())) == 4150
    groups = [set(part.groups) for part in parts.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 235
    row = parts["test"].rows[5]
    with h5py.File(SHARED / "lidc_dev.h5") as file:
        masks = np.unpackbits(file["masks_packed"][row], axis=-1).reshape(4, 128, 128)
        image = file["images"][row]
    assert (parts["test"][5][1].numpy() == masks).all()
    np.testing.assert_allclose(parts["test"][5][0][0], image / 255, atol=1e-7)
