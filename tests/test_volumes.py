"""One file, one array: every format, orientation and colour mode gives the same values, or is refused."""

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from data.images import Fit
from data.volumes import image_values, labels_of, read_scan, stem_of, unit_range, with_channels, write_volume
from tests.tiny import write_dicom

GREY = np.random.RandomState(0).randint(0, 256, (6, 8)).astype(np.uint8)
MASK = (GREY > 128).astype(np.uint8)
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def nifti(path, values, affine=LPS):
    """Values (x, y, z, ...) as NIfTI."""
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    return path


def picture(path, values, **settings):
    Image.fromarray(values).save(path, **settings)
    return path


def test_all_formats_hold_the_same_pixels(tmp_path):
    np.save(tmp_path / "a.npy", GREY)
    pictures = [picture(tmp_path / name, GREY) for name in ("a.png", "a.TIF", "a.bmp")]
    volumes = [nifti(tmp_path / "a.nii.gz", GREY.T), nifti(tmp_path / "b.nii", GREY.T[..., None])]
    for path in (*pictures, *volumes, tmp_path / "a.npy", write_dicom(tmp_path / "a.dcm", GREY)):
        values = read_scan(path).values
        assert values.shape == (6, 8) and values.dtype == np.uint8, path
        np.testing.assert_array_equal(values, GREY)
        np.testing.assert_array_equal(image_values(read_scan(path), 1), GREY[..., None])
    assert stem_of(tmp_path / "a.nii.gz") == "a"


@pytest.mark.parametrize("axcodes", ["LPS", "RAS", "PIR", "SLA"])
def test_an_oriented_header_is_heeded_and_written_back(tmp_path, axcodes):
    volume = np.random.RandomState(1).rand(3, 4, 5).astype(np.float32)  # (z, y, x), as of DICOM
    turned = nibabel.Nifti1Image(volume.swapaxes(0, 2), np.diag([-1.0, -2.0, 3.0, 1.0])).as_reoriented(
        nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt(tuple("LPS")),
                                            nibabel.orientations.axcodes2ornt(tuple(axcodes))))
    turned.header["cal_max"], turned.header["cal_min"] = 400, -200
    nibabel.save(turned, tmp_path / "a.nii.gz")
    scan = read_scan(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(scan.values, volume)
    np.testing.assert_allclose(scan.affine, np.diag([-1.0, -2.0, 3.0, 1.0]), atol=1e-6)
    write_volume(tmp_path / "out.nii.gz", np.uint8(volume > 0.5), tmp_path / "a.nii.gz")
    written = nibabel.load(tmp_path / "out.nii.gz")
    assert nibabel.aff2axcodes(written.affine) == tuple(axcodes) and written.get_data_dtype() == np.uint8
    np.testing.assert_allclose(written.affine, turned.affine, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(turned.dataobj) > 0.5)
    assert (written.header["cal_min"], written.header["cal_max"]) == (0, 0)  # the image's display range
    np.save(tmp_path / "a.npy", volume)  # a volume of another format is written as it lies
    write_volume(tmp_path / "out.nii.gz", volume, tmp_path / "a.npy")
    np.testing.assert_array_equal(read_scan(tmp_path / "out.nii.gz").values, volume)


def test_colours_palettes_and_transparency(tmp_path):
    rgb = np.dstack([GREY, 255 - GREY, GREY // 2])
    for name, values in (("rgb", rgb), ("rgba", np.dstack([rgb, GREY]))):
        np.testing.assert_array_equal(read_scan(picture(tmp_path / f"{name}.png", values)).values, rgb)
    coloured = with_palette(tmp_path / "p.png", [0, 0, 0, 200, 100, 50])
    np.testing.assert_array_equal(read_scan(coloured).values[MASK == 1][0], [200, 100, 50])
    assert (labels_of(read_scan(coloured, mask=True)) == MASK).all()  # the palette's numbers
    opaque = np.dstack([255 * MASK] * 3 + [np.full_like(MASK, 255)])
    assert (labels_of(read_scan(picture(tmp_path / "m.png", opaque), mask=True)) == 255 * MASK).all()
    for name, values in (("rgb", rgb), ("alpha", np.dstack([255 * MASK] * 3 + [255 * MASK]))):
        with pytest.raises(ValueError, match=f"{name}.png.*a mask in colours or with transparency"):
            read_scan(picture(tmp_path / f"{name}.png", values), mask=True)


def with_palette(path, colours):
    """MASK, whose numbers are shown in these colours, (r, g, b) one after the other."""
    image = Image.fromarray(MASK, "P")
    image.putpalette(colours)
    image.save(path)
    return path


@pytest.mark.parametrize("colours, shown", [
    ([0, 0, 0, 255, 255, 255], (0, 255)), ([255, 255, 255, 0, 0, 0], (255, 0)),
])
def test_a_palette_of_greys_is_applied_to_a_mask(tmp_path, colours, shown):
    labels = labels_of(read_scan(with_palette(tmp_path / "p.png", colours), mask=True))
    np.testing.assert_array_equal(labels, np.where(MASK == 1, shown[1], shown[0]))


@pytest.mark.parametrize("colours", [[200, 100, 50, 0, 0, 0], [10, 20, 30, 200, 100, 50]])
def test_a_palette_whose_number_0_is_not_black_is_refused_of_a_mask(tmp_path, colours):
    with pytest.raises(ValueError, match="p.png: a palette of colours in which black is not number 0 alone"):
        read_scan(with_palette(tmp_path / "p.png", colours), mask=True)


def scaled(path, stored, slope):
    """A volume of integers that its header multiplies by `slope`."""
    image = nibabel.Nifti1Image(np.asarray(stored, np.int16).reshape(-1, 1, 1), LPS)
    image.header.set_slope_inter(slope, 0)
    nibabel.save(image, path)
    raw = nibabel.load(path).dataobj
    assert raw.slope == pytest.approx(slope) and np.array_equal(raw.get_unscaled().ravel(), stored)
    return path


def test_labels_that_a_header_scales_are_rounded_and_it_is_said_when_they_were_further_off(tmp_path, capsys):
    near = read_scan(scaled(tmp_path / "near.nii", [0, 3, 6], 0.33333), mask=True)  # 0.99999 and 1.99998
    assert labels_of(near).ravel().tolist() == [0, 1, 2] and capsys.readouterr().out == ""
    further = read_scan(scaled(tmp_path / "further.nii", [0, 7, 13], 0.15), mask=True)  # 1.05 and 1.95
    assert labels_of(further).ravel().tolist() == [0, 1, 2]
    assert "further.nii: labels such as 1.05, as its header scales integers, are rounded" in (
        capsys.readouterr().out)
    with pytest.raises(ValueError, match="map.nii: a mask with values such as 0.5"):  # of probabilities
        labels_of(read_scan(scaled(tmp_path / "map.nii", [0, 128, 255], 1 / 256), mask=True))
    np.save(tmp_path / "a.npy", np.array([[0.0, 0.99]]))
    with pytest.raises(ValueError, match="a.npy: a mask with values such as 0.99"):
        labels_of(read_scan(tmp_path / "a.npy", mask=True))


def test_a_jpeg_mask_is_rounded_and_an_image_is_no_mask(tmp_path):
    disc = np.uint8(255 * (np.hypot(*(np.indices((64, 64)) - 32)) < 20))
    labels = labels_of(read_scan(picture(tmp_path / "m.jpg", disc, quality=75), mask=True))
    assert (labels == disc // 255).mean() > 0.999
    with pytest.raises(ValueError, match="i.jpg: .* neither dark nor bright"):
        labels_of(read_scan(picture(tmp_path / "i.jpg", np.full((8, 8), 128, np.uint8)), mask=True))


def test_dicom_values_are_rescaled_and_monochrome1_is_inverted(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", GREY, RescaleSlope=2, RescaleIntercept=-1024)
    np.testing.assert_array_equal(read_scan(path).values, 2.0 * GREY - 1024)
    path = write_dicom(tmp_path / "b.dcm", GREY, PhotometricInterpretation="MONOCHROME1")
    values = read_scan(path).values.astype(int)
    np.testing.assert_array_equal(values, int(GREY.max()) + int(GREY.min()) - GREY.astype(int))
    path = write_dicom(tmp_path / "c.dcm", GREY, PhotometricInterpretation="PALETTE COLOR")
    with pytest.raises(ValueError, match="c.dcm: colours by a palette .PALETTE COLOR.*convert it"):
        read_scan(path)


@pytest.mark.parametrize("name, content, message", [
    ("a.npy", np.full((4, 4), np.nan), "16 values are NaN"),
    ("a.npy", np.array(["text"]), r"<U4 \(1,\), expected numbers"),
    ("a.npy", np.array([{}]), "cannot be read"),  # a pickle
    ("a.nii", np.zeros((4, 4, 4, 20)), "4-D, .* take a time point"),
    ("a.nii", "text", "cannot be read"), ("a.dcm", "text", "cannot be read"),
    ("a.png", "text", "not an image"), ("a.txt", "text", "not one of .png"),
])
def test_a_bad_file_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, str):
        path.write_text(content)
    elif name == "a.npy":
        np.save(path, content)
    else:
        nifti(path, content)
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        read_scan(path)


def test_four_dimensions_of_nifti_are_channels_that_fit_the_masks(tmp_path):
    values = np.random.RandomState(0).rand(5, 4, 3, 2)  # (x, y, z, c)
    scan = read_scan(nifti(tmp_path / "a.nii.gz", values))
    assert with_channels(scan, (3, 4, 5)).shape == (3, 4, 5, 2) == image_values(scan, 2).shape
    np.testing.assert_array_equal(with_channels(scan, (3, 4, 5))[0, 1, 2], values[2, 1, 0])
    np.save(tmp_path / "b.npy", np.moveaxis(values, -1, 0))
    assert with_channels(read_scan(tmp_path / "b.npy"), (5, 4, 3)).shape == (5, 4, 3, 2)
    with pytest.raises(ValueError, match=r"a.nii.gz: an image of \(3, 4, 5, 2\) with masks of \(3, 4\)"):
        with_channels(scan, (3, 4))
    with pytest.raises(ValueError, match="expected 3 channels as in training"):
        image_values(scan, 3)


@pytest.mark.parametrize("values, window, expected", [
    (np.array([0, 51, 255], np.uint8), (), [0, 0.2, 1]), (np.array([0.2, 0.4]), (), [0.2, 0.4]),
    (np.array([-100, 0, 300], np.int16), (), [0, 0.25, 1]), (np.array([7.0, 7.0]), (), [0, 0]),
    (np.array([-100, 0, 300], np.int16), (0, 600), [0, 0, 0.5]), (np.array([0, 300], np.uint16), (), [0, 1]),
])
def test_intensities(values, window, expected):
    np.testing.assert_allclose(unit_range(values, window), expected)


@pytest.mark.parametrize("window", [(300, 100), (0, float("nan"))])
def test_a_window_that_does_not_ascend_is_refused(window):
    with pytest.raises(ValueError, match="--window .*expected two numbers of which the second is larger"):
        unit_range(np.array([0, 300], np.int16), window)


@pytest.mark.parametrize("height, width, side, grow, inner", [
    (20, 27, 32, False, (20, 27)), (20, 27, 54, True, (40, 54)), (60, 30, 16, False, (16, 8)),
    (1, 100, 8, False, (1, 8)),
])
def test_an_image_lies_in_the_middle_of_a_square_in_its_proportions(height, width, side, grow, inner):
    fit, (top, left) = Fit(height, width, side, grow), ((side - length) // 2 for length in inner)
    expected = torch.zeros(2, side, side)
    expected[:, top:top + inner[0], left:left + inner[1]] = 1
    torch.testing.assert_close(fit.put(torch.ones(2, height, width)), expected)
    assert torch.equal(fit.put_masks(torch.ones(2, height, width, dtype=torch.bool)), expected.bool())
