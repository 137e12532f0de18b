"""The embedded demo sets: what they hold, that they can be built again, that the experts disagree."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from data import demo
from data.cache import open_cache

DATA = Path(demo.__file__).parent
CONTOURS = Path(__file__).parents[2] / "shared" / "data" / "lidc_contours.npz"
STEP = {"LIDC_demo": 255 / 47, "isic3_demo": 255 / 23}  # grey levels between two quantised values


def read(what: str) -> dict[str, np.ndarray]:
    """All datasets of an embedded file, masks unpacked to (N, k, 64, 64) bool."""
    with h5py.File(DATA / f"{what}.h5") as file:
        content = {name: file[name][...] for name in file}
    packed = content.pop("masks_packed")
    content["masks"] = np.unpackbits(packed, axis=-1).reshape(len(packed), -1, 64, 64).astype(bool)
    return content


def iou(a: np.ndarray, c: np.ndarray) -> float:
    return 1.0 if not (a | c).any() else (a & c).sum() / (a | c).sum()


def assert_same_pixels(built: np.ndarray, stored: np.ndarray, what: str) -> None:
    """Equal but for a rounding that another SciPy may decide otherwise: one level, 1 pixel in 1000."""
    difference = np.abs(built.astype(int) - stored)
    assert difference.max() <= np.ceil(STEP[what]) and (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("what, rows, k, channels, limit",
                         [("LIDC_demo", 720, 4, 1, 2e6), ("isic3_demo", 300, 3, 3, 1e6)])
def test_is_a_small_cache_file(what, rows, k, channels, limit):
    cache = open_cache(DATA / f"{what}.h5")
    assert (cache.shape, cache.annotators) == ((rows, 64, 64, channels), k)
    assert (DATA / f"{what}.h5").stat().st_size < limit


def test_attribution_travels_with_the_masks():
    with h5py.File(DATA / "LIDC_demo.h5") as file:
        for word in ("LIDC-IDRI", "Cancer Imaging Archive", "CC BY 3.0", "MIT"):
            assert word in file.attrs["source"]


def test_lidc_images_are_rendered_again_from_their_masks():
    content = read("LIDC_demo")
    for row in (0, 100, 719):
        built = demo.render_ct(content["masks"][row], np.random.RandomState((demo.SEED, row)))
        assert_same_pixels(built, content["images"][row], "LIDC_demo")


def test_isic_rows_are_rendered_again():
    built, stored = demo.isic_content(10), read("isic3_demo")
    assert_same_pixels(built["images"], stored["images"][:10], "isic3_demo")
    assert (built["masks"] != stored["masks"][:10]).mean() < 1e-4
    assert (built["style"] == stored["style"][:10]).all()


def test_lidc_slices_are_marked_whole_and_of_many_patients():
    content = read("LIDC_demo")
    marked = content["masks"].any(1)
    assert marked.any((1, 2)).all()
    assert not (marked[:, [0, -1]].any() or marked[:, :, [0, -1]].any())
    assert len(np.unique(content["patient"])) >= 100
    assert np.unique(content["nodule"], return_counts=True)[1].max() == 2
    assert len(np.unique(np.stack([content["nodule"], content["slice"]]), axis=1).T) == 720


def test_lidc_readers_disagree_and_the_image_shows_the_nodule_only_in_part():
    content = read("LIDC_demo")
    overlaps, contrasts = [], []
    for image, masks in zip(content["images"], content["masks"]):
        read_by = [m for m in masks if m.any()]
        overlaps += [iou(a, c) for i, a in enumerate(read_by) for c in read_by[:i]]
        contrasts.append((image[masks.any(0)].mean() - image[~masks.any(0)].mean()) / 255)
    assert 0.6 < np.mean(overlaps) < 0.7  # .65 in all of LIDC-IDRI
    assert 0.3 < (~content["masks"].any((2, 3))).mean() < 0.45
    assert np.mean(contrasts) > 0.15 and np.mean(np.array(contrasts) < 0.1) > 0.1


def test_isic_styles_differ_more_than_annotators_of_one_style():
    content = read("isic3_demo")
    between: dict[tuple[int, int], list[float]] = {}
    for masks, style in zip(content["masks"], content["style"]):
        for i, j in ((0, 1), (0, 2), (1, 2)):
            between.setdefault(tuple(sorted((style[i], style[j]))), []).append(iou(masks[i], masks[j]))
    mean = {pair: np.mean(values) for pair, values in between.items()}
    assert len(mean) == 6
    assert min(mean[s, s] for s in range(3)) > 0.8
    assert mean[0, 1] == pytest.approx(0.75, abs=0.04)
    assert mean[0, 2] == pytest.approx(0.62, abs=0.04)
    assert mean[1, 2] == pytest.approx(0.76, abs=0.04)


def test_slices_that_touch_the_crop_are_left_out():
    masks = np.zeros((4, 1, 128, 128), bool)
    masks[0, 0, 64, 64] = True
    masks[1, 0, 32, 64] = True  # on the border of the crop's first row
    masks[2, 0, 64, 64] = masks[2, 0, 5, 5] = True  # partly outside
    assert demo.fits_crop(masks).tolist() == [True, False, False, False]


def test_rows_are_spread_over_a_nodule():
    nodule = np.array([1] * 8 + [2] * 3 + [3])
    usable = np.ones(12, bool)
    usable[11] = False
    rows = demo.choose_rows(np.zeros(12, int), nodule, usable, np.random.RandomState(0))
    assert rows.tolist() == [2, 6, 8, 10]


@pytest.mark.parametrize("flags", [["LIDC_demo"], ["LIDC_demo", "--contours", "nowhere.npz"]])
def test_building_lidc_without_its_contours_says_so(flags, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["demo.py", *flags])
    with pytest.raises(SystemExit):
        demo.main()
    assert "--contours" in capsys.readouterr().err.splitlines()[-1]


def test_contours_of_another_layout_are_refused(tmp_path):
    np.savez(tmp_path / "other.npz", mm05=np.zeros(1))
    with pytest.raises(ValueError, match="other.npz.*no array columns, meta"):
        demo.lidc_content(tmp_path / "other.npz")


def test_a_written_set_is_read_back(tmp_path):
    content = demo.isic_content(3)
    demo.write(tmp_path / "set.h5", content, "rendered")
    images, packed = open_cache(tmp_path / "set.h5").read(np.arange(3))
    assert (images == content["images"]).all()
    assert (np.unpackbits(packed, axis=-1).reshape(3, 3, 64, 64) == content["masks"]).all()
    assert [path.name for path in tmp_path.iterdir()] == ["set.h5"]


@pytest.mark.skipif(not CONTOURS.is_file(), reason="no ../shared/data/lidc_contours.npz")
def test_lidc_masks_are_those_of_the_contours():
    content = read("LIDC_demo")
    with np.load(CONTOURS) as file:
        meta, packed = file["meta"], file["mm05"]
    assert set(content["patient"]) <= set(meta[:, 1].astype(int))
    for row in range(0, 720, 40):
        of_nodule = np.flatnonzero(meta[:, 2] == content["nodule"][row])
        source = of_nodule[content["slice"][row]]
        masks = np.unpackbits(packed[source]).reshape(4, 128, 128)[:, 32:96, 32:96]
        assert (content["masks"][row] == masks).all()
        assert meta[source, 1] == content["patient"][row]
