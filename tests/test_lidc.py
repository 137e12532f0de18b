"""The pickle reader: what it reads, what it names when a slice is wrong, and what it refuses to run."""

import os
import pickle
import struct
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import data
from data import lidc
from data.convert import converted
from data.safe_pickle import read_pickle
from metadata_manager import Metadata

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "lidc_pickle" / "data_lidc.pickle"


def slice_of(seed=0, series="1.2.3"):
    random = np.random.RandomState(seed)
    masks = [random.randint(0, 2, (8, 4)).astype(np.uint8) for _ in range(4)]
    return {"image": random.rand(8, 4), "masks": masks, "series_uid": series}


def slices(count=3, first=0):
    return {f"slice{i}": slice_of(i, f"series {i}") for i in range(first, first + count)}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "LIDC").mkdir()
    return tmp_path / "LIDC"


def convert(original):
    return converted(original, lidc.files_of(original), lidc.convert)


def save(path, content, protocol=pickle.DEFAULT_PROTOCOL):
    path.write_bytes(pickle.dumps(content, protocol))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_every_protocol_and_numpy_path_is_read(folder, protocol, core):
    content = slices()
    content["slice1"]["image"] = np.asfortranarray(content["slice1"]["image"])
    content["slice2"]["image"] = content["slice2"]["image"].astype(">f4")
    content["slice2"]["masks"][3] = content["slice2"]["masks"][3].astype(bool)
    path = folder / "a.pickle"
    path.write_bytes(with_core(pickle.dumps(content, protocol), core))
    assert core + b"." in path.read_bytes()
    read = read_pickle(path)
    assert list(read) == list(content)
    for key, expected in content.items():
        np.testing.assert_array_equal(read[key]["image"].values, expected["image"])
        np.testing.assert_array_equal([mask.values for mask in read[key]["masks"]], expected["masks"])


def with_core(pickled: bytes, core: bytes) -> bytes:
    """The pickle as another NumPy writes it: module names replaced, the lengths of names and frame mended."""
    ours = b"numpy._core" if b"numpy._core" in pickled else b"numpy.core"
    for module in (b".multiarray", b".numeric"):
        old, new = ours + module, core + module
        pickled = pickled.replace(bytes([len(old)]) + old, bytes([len(new)]) + new)
        pickled = pickled.replace(b"c" + old, b"c" + new)
    if pickled[2:3] == pickle.FRAME and len(pickled) < 60_000:
        pickled = pickled[:3] + struct.pack("<Q", len(pickled) - 11) + pickled[11:]
    return pickled


def test_conversion_keeps_masks_order_and_images_to_16_bits(folder):
    content = slices(3) | slices(3, first=7)
    save(folder / "a.PICKLE", slices(3))
    save(folder / "b.pkl", slices(3, first=7))
    (folder / "._b.pkl").write_bytes(b"left by macOS")
    store = convert(folder)
    images, packed = store.read(np.arange(6))
    assert store.ids == list(content)
    assert list(store.patient) == [entry["series_uid"] for entry in content.values()]
    for row, entry in enumerate(content.values()):
        assert np.abs(images[row, :, :, 0] / 65535 - entry["image"]).max() < 1e-5
        np.testing.assert_array_equal(np.unpackbits(packed[row]).reshape(4, 8, 4), entry["masks"])
    assert len(convert(folder / "b.pkl")) == 3  # a file of its own


@pytest.mark.parametrize("key", ["LIDC-IDRI-0009_nodule00_slice000", "a key without a patient"])
def test_patients_are_read_from_the_keys_and_a_series_of_two_is_refused(folder, key):
    save(folder / "a.pickle", {
        "LIDC-IDRI-0007_nodule01_slice002": slice_of(0, "first scan"),
        "LIDC-IDRI-0007_nodule00_slice000": slice_of(1, "second scan"),
        "LIDC-IDRI-0008_nodule00_slice000": slice_of(3, "third scan"),
    })
    assert list(convert(folder).patient) == ["LIDC-IDRI-0007"] * 2 + ["LIDC-IDRI-0008"]
    save(folder / "a.pickle", {"LIDC-IDRI-0007_nodule00_slice000": slice_of(1, "a scan"),
                               key: slice_of(2, "a scan")})
    with pytest.raises(ValueError, match=f"a.pickle, key '{key}': series a scan is of patient LIDC"):
        convert(folder)


def changed(**changes):
    content = slices(2)
    content["slice1"] |= changes
    return content


ZEROS = np.zeros((8, 4), np.uint8)


@pytest.mark.parametrize(("content", "message"), [
    (changed(image=np.full((8, 4), 1.01)), "key 'slice1': image from 1.01 to 1.01"),
    (changed(image=np.full((8, 4), np.nan)), "image from nan"),
    (changed(image=np.full((8, 4, 3), 0.5)), r"image is an array float64 \(8, 4, 3\)"),
    (changed(image=[[0.5]]), "image is a list"),
    (changed(image=np.zeros((4, 8)), masks=[np.zeros((4, 8))] * 4), r"shape \(4, 8\), expected \(8, 4\)"),
    (changed(masks=[ZEROS] * 3), "masks is a list of 3, expected a list of 4"),
    (changed(masks=np.zeros((4, 8, 4))), "masks is an array float64"),
    (changed(masks=[ZEROS, ZEROS, ZEROS, ZEROS[:, :2]]), r"mask 3 is an array uint8 \(8, 2\)"),
    (changed(masks=[ZEROS, ZEROS + 2, ZEROS, ZEROS]), "mask 1 has values other than 0 and 1"),
    (changed(series_uid=""), "series_uid is a str"),
    ({"slice1": {"image": np.zeros((8, 4)), "masks": [ZEROS] * 4}}, "holds 'image', 'masks'; expected"),
    ({"slice1": 3}, "holds a int"),
    ({"a\nb": slice_of()}, "printable"),
    ({7: slice_of()}, "a int as key"),
    ({}, "holds a dict, expected a dict of slices that is not empty"),
    # A small file must not fill the disk by naming one image many times.
    (dict.fromkeys((f"slice{i}" for i in range(1000)), slice_of()), "more image data than bytes"),
])
def test_a_wrong_slice_is_named_and_leaves_no_store(folder, content, message):
    save(folder / "a.pickle", content)
    with pytest.raises(ValueError, match=f"a.pickle.*{message}"):
        convert(folder)
    assert os.listdir(folder.parent) == ["LIDC"]


def test_wrong_originals_are_named(folder):
    with pytest.raises(ValueError, match="LIDC: no .pickle"):
        convert(folder)
    save(folder / "a.pickle", slices(2))
    save(folder / "b.pickle", slices(2, first=1))
    with pytest.raises(ValueError, match="b.pickle, key 'slice1': also in .*a.pickle"):
        convert(folder)
    (folder / "a.pickle").write_bytes((folder / "a.pickle").read_bytes()[:-300])
    with pytest.raises(ValueError, match="a.pickle: not a pickle of arrays"):
        convert(folder)
    assert os.listdir(folder.parent) == ["LIDC"]


class Calls:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


RECONSTRUCT = np.empty(0).__reduce__()[0]
ENCODE = b"c_codecs\nencode\n"
HUGE = struct.pack("<Q", 10**15)
NESTED_KEY = b"(t0" + b"".join(b"p%d\n0g%d\ng%d\n\x86" % (i, i, i) for i in range(60))  # x = (x, x), 60 times
REFUSED = "not a pickle of arrays"

HOSTILE = {
    "a call of os.system": (pickle.dumps({"a": Calls(os.system, "touch ran")}), "refers to .*system"),
    "an array of objects": (pickle.dumps({"a": np.array([Metadata()], object)}), "refers to|array of type"),
    "an oversized reconstruction": (
        pickle.dumps({"a": Calls(RECONSTRUCT, np.ndarray, (10**14,), b"d")}), "holds an array"),
    "an array larger than its bytes": (
        pickle.dumps({"a": np.zeros(64)}, 2).replace(b"K@\x85", b"J\xff\xff\xff\x7f\x85"), "cannot reshape"),
    "bytes longer than the file": (b"\x80\x05\x8e" + HUGE + b"abc.", "10{15} bytes announced"),
    "a bytearray longer than the file": (b"\x80\x05\x96" + HUGE + b"abc.", "10{15} bytes announced"),
    "a frame longer than the file": (b"\x80\x05\x95" + HUGE + b"}.", "10{15} bytes announced"),
    "a memo index of 4 billion": (b"\x80\x02}r\xff\xff\xff\xff.", "holds a dict"),
    "lists nested 100,000 deep": (b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".", "holds a list"),
    "a key that takes for ever to hash": (b"\x80\x02}" + NESTED_KEY + b"K\x01s.", REFUSED),
    "an encoding that takes for ever to print": (
        b"\x80\x02" + ENCODE + b"X\x01\x00\x00\x00a" + NESTED_KEY + b"\x86R.", REFUSED),
    "attributes set on a function": (
        b"\x80\x02" + ENCODE + b"N}X\x01\x00\x00\x00aK\x01s\x86b.", "sets the state"),
    "an instance": (b"(ios\nsystem\n.", REFUSED),
    "a number of a million digits": (b"I" + b"9" * 10**6 + b"\n.", "Exceeds the limit"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_in_little_time_and_memory(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    content, message = HOSTILE[name]
    (folder / "a.pickle").write_bytes(content)
    tracemalloc.start()
    begin = time.perf_counter()
    with pytest.raises(ValueError, match=f"a.pickle.*({message})"):
        convert(folder)
    assert time.perf_counter() - begin < 20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300e6
    assert os.listdir(folder) == ["a.pickle"] and os.listdir(folder.parent) == ["LIDC"]


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_the_real_pickle(folder):
    (folder / "data_lidc.pickle").symlink_to(SHARED)  # a link, so that the store lies beside it
    described = Metadata(data_path=str(folder))
    parts = [data.load(described, split) for split in ("train", "val", "test")]
    assert sum(map(len, parts)) == 119 and len({patient for part in parts for patient in part.patients}) == 40
    original = pickle.loads(SHARED.read_bytes())
    for image, masks, name in zip(*parts[2].batch(range(5)), parts[2].ids):
        assert np.abs(image[0].numpy() - original[name]["image"]).max() < 1e-5
        np.testing.assert_array_equal(masks.numpy(), original[name]["masks"])
    assert len(data.load(replace(described, split="released"), "train_prior")) == 95
