"""The on-disk layout: written, opened, refused when wrong, never left half-written."""

import fcntl
import multiprocessing
import os
import resource
import tracemalloc

import h5py
import numpy as np
import pytest

from data.store import open_store
from data.writer import Writer

ZEROS = np.zeros((6, 4), np.uint8)


def write(path, count=5, dtype=np.uint16, channels=1, small=False):
    """A store of random content, which is returned: images and masks (count, 3, 6, 4)."""
    random = np.random.RandomState(0)
    shape = (count, 6, 4) if channels == 1 else (count, 6, 4, channels)
    images = random.randint(0, np.iinfo(dtype).max + 1, shape).astype(dtype)
    masks = random.randint(0, 2, (count, 3, 6, 4)).astype(np.uint8)
    with Writer(path, "a test", small=small) as writer:
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
    return path


@pytest.mark.parametrize(("dtype", "channels", "small"), [(np.uint8, 1, True), (np.uint16, 1, False),
                                                          (np.uint8, 3, False), (np.uint16, 5, False)])
def test_what_is_written_is_read_back(tmp_path, monkeypatch, dtype, channels, small):
    monkeypatch.setattr("data.store.BLOCK", 4)
    monkeypatch.setattr("data.writer.BLOCK", 4)
    images, masks = write(tmp_path / "set.h5", 11, dtype, channels, small)
    store = open_store(tmp_path / "set.h5")
    assert (store.shape, store.annotators) == ((11, 6, 4, channels), 3)
    assert store.ids[:3] == ["é0", "é1", "é2"] and list(store.patient[:3]) == ["p0", "p0", "p1"]
    rows = np.array([0, 3, 4, 9, 10])
    pixels, packed = store.read(rows)
    assert store.areas().tolist() == masks.sum((1, 2, 3)).tolist()
    assert (pixels.reshape(images[rows].shape) == images[rows]).all() and pixels.dtype == dtype
    assert (np.unpackbits(packed, axis=1).reshape(5, 3, 6, 4) == masks[rows]).all()
    assert os.listdir(tmp_path) == ["set.h5"]


@pytest.mark.parametrize("fields, name", [
    ({"nodule": np.full(5, 2), "slice": np.arange(5)}, "patient 1, nodule 2, slice 1"),
    ({"patient": ["x"] * 5}, "patient x, row 1"),
    ({"patient": np.zeros(5, int), "slice": np.array([0, 1, 1, 2, 3])}, "patient 0, slice 1, row 1")])
def test_rows_without_ids_have_names(tmp_path, fields, name):
    assert open_store(by_hand(tmp_path / "a.h5", **fields)).ids[1] == name


@pytest.mark.parametrize(("changes", "message"), [
    ({"images": None}, "masks_packed, patient, expected a dataset 'images'"),
    ({"patient": None}, "expected a dataset 'patient'"),
    ({"images": np.zeros((5, 4, 4), np.float32)}, "images is float32"),
    ({"images": np.zeros((5, 4, 4, 17), np.uint8)}, r"images is uint8 \(5, 4, 4, 17\)"),
    ({"experts": np.array([1, 2, 3, 4, 1])}, "experts from 1 to 4, expected 1 to 3"),
    ({"images": np.zeros((0, 4, 4), np.uint8)}, r"images is uint8 \(0, 4, 4\), .* at least one"),
    ({"masks_packed": np.zeros((5, 6), np.int8)}, "masks_packed is int8"),
    ({"masks_packed": np.zeros((5, 7), np.uint8)}, r"\(5, 7\), expected uint8 \(5, k x 4 x 4 / 8\)"),
    ({"masks_packed": np.zeros((4, 6), np.uint8)}, r"\(4, 6\), expected uint8 \(5,"),
    ({"patient": np.arange(4)}, r"patient has shape \(4,\)"),
    ({"patient": np.zeros(5)}, "patient is float64, expected integers"),
    ({"id": np.arange(5)}, "id is int64, expected text"),
    ({"style": np.zeros((5, 2), int)}, r"style has shape \(5, 2\), expected \(5, 3\)"),
    ({"images/inner": np.zeros(3), "images": None}, "'images' is a Group"),
    ({"images": h5py.ExternalLink("other.h5", "/images")}, "'images' is a ExternalLink"),
])
def test_a_wrong_layout_is_named(tmp_path, changes, message):
    by_hand(tmp_path / "other.h5")
    with pytest.raises(ValueError, match=f"set.h5: .*{message}"):
        open_store(by_hand(tmp_path / "set.h5", **changes))


def external(file, folder):
    (folder / "secret").write_bytes(bytes(80))
    file.create_dataset("images", (5, 4, 4), np.uint8, external=[(str(folder / "secret"), 0, 80)])


def virtual(file, folder):
    layout = h5py.VirtualLayout((5, 4, 4), np.uint8)
    layout[:] = h5py.VirtualSource(by_hand(folder / "other.h5"), "images", (5, 4, 4))
    file.create_virtual_dataset("images", layout)


def forged(file, folder):
    """16 TB of images, no chunk of which exists."""
    file.create_dataset("images", (10**12, 4, 4), np.uint8, chunks=(1, 4, 4))


@pytest.mark.parametrize(("make", "message"), [
    (external, "keeps its data in other files"), (virtual, "keeps its data in other files"),
    (forged, "claims 16000000000000 bytes and stores 0")])
def test_data_that_is_not_in_the_file_is_refused(tmp_path, make, message):
    with h5py.File(by_hand(tmp_path / "set.h5", images=None), "a") as file:
        make(file, tmp_path)
    with pytest.raises(ValueError, match=f"set.h5: 'images' {message}"):
        open_store(tmp_path / "set.h5")


def test_other_formats_are_refused(tmp_path):
    with h5py.File(by_hand(tmp_path / "set.h5"), "a") as file:
        file.attrs["atfm_format"] = 99
    with pytest.raises(ValueError, match="format 99, expected 1"):
        open_store(tmp_path / "set.h5")
    (tmp_path / "text.h5").write_text("not HDF5")
    with pytest.raises(ValueError, match="text.h5: not a readable HDF5 file"):
        open_store(tmp_path / "text.h5")
    with pytest.raises(FileNotFoundError, match="none.h5"):
        open_store(tmp_path / "none.h5")


def test_writer_leaves_nothing_when_it_fails(tmp_path):
    path = tmp_path / "set.h5"
    write(path)
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), Writer(path, "a test") as writer:
        writer.append(ZEROS, np.zeros((3, 6, 4)), patient=1)
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="set.h5: nothing was written"), Writer(path, "a test"):
        pass
    assert os.listdir(tmp_path) == ["set.h5"] and path.read_bytes() == before


@pytest.mark.parametrize("make, message", [
    (lambda path: path.write_text("a user's"), "exists and was not made by this program"),
    (lambda path: by_hand(path), "exists and was not made by this program"),
    (lambda path: write(path), "exists and is of another origin, 'a test'; it is"),
])
def test_a_writer_replaces_only_what_the_same_command_made(tmp_path, make, message):
    path = tmp_path / "set.h5"
    make(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"set.h5: {message}"):
        Writer(path, "another test")
    assert os.listdir(tmp_path) == ["set.h5"] and path.read_bytes() == before


def test_two_rows_have_two_ids_whatever_their_unicode_form(tmp_path):
    twice = pytest.raises(ValueError, match="set.h5: two rows with the id 'é' .a.png and b.png.")
    with twice, Writer(tmp_path / "set.h5", "a test") as writer:
        writer.append(ZEROS, np.zeros((3, 6, 4)), patient=0, id="e\u0301", file="a.png")
        writer.append(ZEROS, np.zeros((3, 6, 4)), patient=0, id="\u00e9", file="b.png")
    with pytest.raises(ValueError, match="foreign.h5: rows 1 and 3 have the same id 'b'; expected one"):
        open_store(by_hand(tmp_path / "foreign.h5", id=["a", "b", "c", "b", "e"]))
    store = open_store(by_hand(tmp_path / "p.h5", patient=["e\u0301", "\u00e9", "f", "f", "g"]))
    assert store.patient.tolist() == ["é", "é", "f", "f", "g"]


def test_a_file_that_a_writer_has_open_is_in_use_and_not_damaged(tmp_path):
    path = by_hand(tmp_path / "set.h5")
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])  # as a writer leaves it between two of its writes
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as HDF5 does
        with pytest.raises(ValueError, match="set.h5: in use by a program that has it open for writing"):
            open_store(path)
    with pytest.raises(ValueError, match="set.h5: not a readable HDF5 file"):
        open_store(path)


def test_a_store_is_written_in_little_memory(tmp_path):
    image, masks = np.zeros((256, 256), np.uint16), np.zeros((4, 256, 256))
    tracemalloc.start()
    with Writer(tmp_path / "set.h5", "a test") as writer:
        for row in range(1000):  # 131 MB of images, of which a block of 34 MB is in memory
            writer.append(image, masks, patient=row)
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


@pytest.mark.parametrize(("image", "masks", "fields", "message"), [
    (ZEROS.astype(np.float32), (3, 6, 4), {"patient": 1}, "image float32"),
    (ZEROS, (3, 4, 6), {"patient": 1}, r"masks \(3, 4, 6\)"),
    (ZEROS, (3, 6, 4), {"id": "a"}, r"a row with \['id'\]"),
    (ZEROS, (3, 6, 4), {"patient": 1, "colour": 2}, "colour"),
    (ZEROS.astype(np.uint16), (3, 6, 4), {"patient": 1}, "the first row had"),
    (ZEROS, (2, 6, 4), {"patient": 1}, "the first row had"),
    (ZEROS, (3, 6, 4), {"patient": 1, "slice": 1}, "the first row had"),
])
def test_writer_refuses_a_row_that_does_not_fit(tmp_path, image, masks, fields, message):
    refused = pytest.raises(ValueError, match=f"set.h5: .*{message}")
    with refused, Writer(tmp_path / "set.h5", "a test") as writer:
        writer.append(ZEROS, np.zeros((3, 6, 4)), patient=0)
        writer.append(image, np.zeros(masks), **fields)
    assert not os.listdir(tmp_path)


def write_to_a_full_disk(path, size):
    """A limit on the file size stands in for the full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    with pytest.raises(OSError, match="set.h5: cannot be written"), Writer(path, "a test") as writer:
        for i in range(300):  # about 200 kB: a block, and the rest when it closes
            writer.append(np.ones((16, 16), np.uint16), np.ones((4, 16, 16)), patient=i, id=str(i))


@pytest.mark.parametrize("size", [0, 3_000, 58_800, 190_000, 195_000])
def test_a_full_disk_leaves_nothing(tmp_path, size):
    process = multiprocessing.get_context("fork").Process(
        target=write_to_a_full_disk, args=(tmp_path / "set.h5", size), daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == 0 and not os.listdir(tmp_path)
