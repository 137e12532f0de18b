"""Files of one image or one mask, 2-D or a volume: PNG, JPEG, TIFF, BMP, NumPy, NIfTI, DICOM.

Values are (h, w) or (z, h, w), with c channels in front or behind where an image has them. NIfTI is turned,
as its header says, to what DICOM has: columns to the patient's left, rows to the back, slices upwards.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
from nibabel import orientations

from data.images import GREY_16, decoded, pixels_of
from data.store import CHANNELS, nfc
from metrics.files import whole_file

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
SUFFIXES = (*PICTURES, ".npy", ".nii", ".nii.gz", ".dcm")
LPS = orientations.axcodes2ornt(("L", "P", "S"))
AXES = {"z": 0, "y": 1, "x": 2}  # of a volume (z, h, w)
UNCLEAR = 0.01  # at most, of the pixels of a JPEG mask, may be neither dark nor bright
ROUNDING = 1e-3  # what arithmetic leaves of a label: 0.99999


@dataclass(frozen=True)
class Scan:
    """What a file holds."""

    path: Path
    values: np.ndarray
    affine: np.ndarray | None = None  # of a NIfTI file, once turned
    step: float = 0.0  # of values that a NIfTI header scales from integers: the least between two of them


def suffix_of(path: Path) -> str:
    """One of SUFFIXES, or "" for a file that is none of these."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")


def stem_of(path: Path) -> str:
    """The name without its suffix, of which .nii.gz is one, in one Unicode form."""
    return nfc(path.name[:len(path.name) - len(suffix_of(path))] or path.name)


def read_scan(path: Path, mask: bool = False) -> Scan:
    """An image file, or a mask's. Raises FileNotFoundError, or ValueError naming what cannot be read."""
    suffix = suffix_of(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not suffix:
        raise ValueError(f"{path}: not one of {', '.join(SUFFIXES)}; convert it")
    if suffix in PICTURES:
        return Scan(path, _mask_of_picture(path) if mask else pixels_of(decoded(path)))
    try:
        if suffix == ".npy":
            # A pickle inside an .npy file could run code.
            scan = Scan(path, np.load(path, allow_pickle=False))
        else:
            scan = _dicom(path) if suffix == ".dcm" else _nifti(path)
    except MemoryError:
        raise
    except Exception as error:  # nibabel and pydicom raise nearly anything on damaged files
        reason = " ".join(str(error).split())
        raise ValueError(reason if reason.startswith(f"{path}: ") else f"{path}: cannot be read ({reason})"
                         ) from error
    values = scan.values
    if values.dtype.kind not in "buif" or values.size == 0 or not 2 <= values.ndim <= 4:
        raise ValueError(f"{path}: {values.dtype} {values.shape}, expected numbers (h, w) or (z, h, w), or "
                         "an image's with channels")
    bad = values.size - np.count_nonzero(np.isfinite(values)) if values.dtype.kind == "f" else 0
    if bad:
        raise ValueError(f"{path}: {bad} values are NaN or infinite; replace them")
    return scan


def _mask_of_picture(path: Path) -> np.ndarray:
    """A mask's labels (h, w): its grey values.

    A palette of greys is applied, for it may show its number 0 in white. Of a palette in colours the numbers
    are the labels, if 0 is black and no other that occurs is. Raises ValueError for all other colours."""
    image = decoded(path)
    if image.mode in (*GREY_16, "1"):
        return np.asarray(image)
    colours = np.asarray(image.convert("RGBA"))
    grey = not np.ptp(colours[..., :3].astype(int), axis=-1).any()
    if image.mode == "P" and not grey:
        labels = np.asarray(image)
        if (image.getpalette() or [])[:3] != [0, 0, 0] or (colours[labels > 0, :3] == 0).all(-1).any():
            raise ValueError(f"{path}: a palette of colours in which black is not number 0 alone, so that "
                             "its numbers need not be labels; save the mask in grey, 0 for what is unmarked")
        return labels
    if not grey or np.ptp(colours[..., 3]) and image.mode != "P":
        raise ValueError(f"{path}: a mask in colours or with transparency; expected grey or a palette")
    return colours[..., 0]


def _dicom(path: Path) -> Scan:
    header = pydicom.dcmread(path)
    if header.get("PhotometricInterpretation") == "PALETTE COLOR":
        raise ValueError(f"{path}: colours by a palette (PALETTE COLOR), whose numbers are no intensities; "
                         "convert it to PNG in RGB or grey")
    values = header.pixel_array
    slope, intercept = float(header.get("RescaleSlope", 1)), float(header.get("RescaleIntercept", 0))
    # Unless they are scaled, integers stay integers: 8 bits are then divided by 255.
    if (slope, intercept) != (1, 0):
        values = values * slope + intercept
    if header.get("PhotometricInterpretation") == "MONOCHROME1":  # low values are bright
        values = values.max() - values + values.min()
    return Scan(path, values)


def _nifti(path: Path) -> Scan:
    file: Any = nibabel.load(path)  # of several types, without a common one that has values
    values = np.asanyarray(file.dataobj)
    if not 2 <= values.ndim <= 4 or values.ndim == 4 and values.shape[3] > CHANNELS:
        raise ValueError(f"{path}: {values.ndim}-D, {values.shape}, expected (x, y), (x, y, z), or "
                         f"(x, y, z, c), c up to {CHANNELS}; take a time point of a series")
    # A 2-D file has an affine as well, and is turned like a volume of one slice.
    values = values[..., None] if values.ndim == 2 else values
    if values.ndim == 4 and values.shape[3] == 1:
        values = values[..., 0]
    # Files come in any orientation; masks and image of a case may differ in theirs.
    turn = orientations.ornt_transform(nibabel.io_orientation(file.affine), LPS)
    affine = file.affine @ orientations.inv_ornt_aff(turn, values.shape[:3])
    values = orientations.apply_orientation(values, turn).swapaxes(0, 2)  # (z, h, w), (z, h, w, c)
    scaled = file.get_data_dtype().kind in "iu" and values.dtype.kind == "f"  # by the header's slope
    step = abs(float(file.dataobj.slope)) if scaled else 0.0
    return Scan(path, values[0] if len(values) == 1 else values, affine, step)


def labels_of(scan: Scan) -> np.ndarray:
    """The labels of a mask's file, integers.

    A JPEG's are 0 and 1: what compression left is rounded. So is what is within ROUNDING of an integer; where
    a header scales integers, also what is as near to one as the file could hold it, and a line says so.
    Raises ValueError for other values, and for a JPEG with more than UNCLEAR of its pixels in between."""
    values = scan.values
    if suffix_of(scan.path) in (".jpg", ".jpeg"):
        # Compression blurs only borders: a picture with many middle values is not a mask.
        unclear = float(((values > 63) & (values < 192)).mean())
        if unclear > UNCLEAR:
            raise ValueError(f"{scan.path}: {unclear:.1%} of its pixels are neither dark nor bright; "
                             "expected a mask of 0 and 255, check --masks")
        return (values >= 128).astype(np.uint8)
    if values.dtype.kind != "f":
        return values.astype(np.uint8) if values.dtype.kind == "b" else values
    labels = np.empty(values.shape, np.int64)
    furthest, off = 0.0, 0.0  # the value that is furthest from an integer, and how far
    for plane, rounded in zip(values, labels):  # one at a time, since a volume may fill much of the memory
        rounded[...] = np.rint(plane)
        difference = np.abs(plane - rounded)
        if difference.max() > off:
            furthest, off = float(plane.flat[difference.argmax()]), float(difference.max())
    # Half a step is what rounding to the file's integers costs; above 1/4 a value has no nearest label.
    if off > max(ROUNDING, min(0.501 * scan.step, 0.25)):
        raise ValueError(f"{scan.path}: a mask with values such as {furthest:.4g}, expected whole numbers, "
                         "such as 0 and 1")
    if off > ROUNDING:
        print(f"{scan.path}: labels such as {furthest:.4g}, as its header scales integers, are rounded",
              flush=True)
    return labels


def check_same_place(scans: Sequence[Scan]) -> None:
    """Raises ValueError if the NIfTI files among them have their voxels in different places."""
    turned = [(scan.path, scan.affine) for scan in scans if scan.affine is not None]
    for path, affine in turned[1:]:
        first, expected = turned[0]
        # Within a hundredth of a voxel, since programs round affines.
        if not np.allclose(affine, expected, rtol=0, atol=1e-2 * np.abs(expected[:3, :3]).max()):
            raise ValueError(f"{path}: its affine, once turned alike, is {affine[:3].tolist()}, expected "
                             f"that of {first}, {expected[:3].tolist()}; resample it onto that one, or "
                             "if it has the same voxels, copy that header")


def with_channels(scan: Scan, shape: Sequence[int]) -> np.ndarray:
    """An image's values as (*shape, c), c behind, where `shape` is that of its masks.

    Raises ValueError if the image has another size."""
    values, shape = scan.values, tuple(shape)
    if values.shape == shape:
        return values[..., None]
    # NumPy files often have channels in front, pictures and NIfTI behind.
    if values.ndim == len(shape) + 1 and min(values.shape[0], values.shape[-1]) <= CHANNELS:
        if values.shape[:-1] == shape:
            return values
        if values.shape[1:] == shape:
            return np.moveaxis(values, 0, -1)
    raise ValueError(f"{scan.path}: an image of {values.shape} with masks of {shape}; expected the same size")


def image_values(scan: Scan, channels: int) -> np.ndarray:
    """The values of an image without masks, with channels behind: (h, w, c) or (z, h, w, c).

    A file of three dimensions that is no picture is a volume, unless the model was trained on several
    `channels` and its last dimension, of .npy also the first, is as long. Raises ValueError for four
    dimensions of which none is."""
    values = scan.values
    if suffix_of(scan.path) in PICTURES:
        return np.atleast_3d(values)
    if values.ndim > 2 and channels > 1 and values.shape[-1] == channels:
        return values
    if values.ndim > 2 and channels > 1 and values.shape[0] == channels and suffix_of(scan.path) == ".npy":
        return np.moveaxis(values, 0, -1)
    if values.ndim == 4:
        raise ValueError(f"{scan.path}: {values.shape}, expected {channels} channels as in training")
    return values[..., None]


def limits_of(values: np.ndarray, window: Sequence[float] = ()) -> tuple[float, float]:
    """The intensities that become 0 and 1, of all channels and slices together: a window, if there is one.

    8 bits are divided by 255 and what lies in [0, 1] already is kept; all else goes from its minimum to its
    maximum. Raises ValueError unless a window ascends."""
    if window:
        low, high = window
        if not (np.isfinite([low, high]).all() and low < high):
            raise ValueError(f"--window {low:g} {high:g}: expected two numbers of which the second is larger")
        return low, high
    if values.dtype == np.uint8:
        return 0.0, 255.0
    low, high = float(values.min()), float(values.max())
    return (0.0, 1.0) if values.dtype.kind in "bf" and 0 <= low and high <= 1 else (low, high)


def unit_range(values: np.ndarray, window: Sequence[float] = ()) -> np.ndarray:
    """Intensities as float64 in [0, 1], by their `limits_of`; what lies beyond a window is cut off."""
    return rescaled(values, *limits_of(values, window))


def rescaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Intensities as float64, from 0 at `low` to 1 at `high`, beyond which they are cut off."""
    # An image of a single value becomes 0, not NaN.
    return np.clip((values.astype(np.float64) - low) / ((high - low) or 1.0), 0, 1)


def axis_of(shape: Sequence[int], axis: str) -> int:
    """The number of a volume's axis to cut across, 0 to 2; "fewest": the one with the fewest slices."""
    # Scans are coarsest across their slices, and so have the fewest pixels there.
    return int(np.argmin(shape[:3])) if axis == "fewest" else AXES[axis]


def write_volume(path: Path, maps: np.ndarray, like: Path) -> None:
    """A volume (z, h, w) as .nii.gz, with the orientation, affine and units of the NIfTI file `like`.

    With another file, or from one, the header turns nothing: read again, the values are these."""
    values = maps.swapaxes(0, 2)  # (x, y, z)
    # nibabel's axes are right, front, up (RAS); this affine is that of left, back, up (LPS).
    affine, header = np.diag([-1.0, -1.0, 1.0, 1.0]), None
    if suffix_of(like) in (".nii", ".nii.gz"):
        source: Any = nibabel.load(like)
        affine, header = source.affine, source.header.copy()
        turn = orientations.ornt_transform(LPS, nibabel.io_orientation(affine))
        values = orientations.apply_orientation(values, turn)
        # The image's type and scale would change what is written.
        header.set_data_dtype(values.dtype)
        header.set_slope_inter(1, 0)
        header["cal_min"] = header["cal_max"] = 0  # no display range: a viewer's would be that of intensities
    image = nibabel.Nifti1Image(values, affine, header)
    with whole_file(path) as file:
        file.write(zlib.compress(image.to_bytes(), wbits=31))  # gzip without a time stamp
