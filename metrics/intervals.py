"""Intervals of mean scores by the bootstrap, which resamples whole patients, and training runs."""

import unicodedata
from collections.abc import Sequence

import numpy as np

from metrics.program import counted

# With fewer the percentiles of a bootstrap are those of a handful of patients: no interval is given.
FEWEST_PATIENTS = 10


def bootstrap_interval(values: np.ndarray, patients: Sequence | np.ndarray, resamples: int = 10_000,
                       seed: int = 0) -> tuple[float, float, float]:
    """Mean of per-image values and its 95 % percentile interval; of a - b for two systems on the same images.

    values: (images,), or (seeds, images), averaged over seeds first. patients (images,): whole patients are
    resampled, as slices of one patient are not independent. With a single patient the interval is the mean.
    Raises ValueError for another number of patients, and for values that are not finite."""
    return two_level_interval(np.atleast_2d(values).mean(0, keepdims=True), patients, resamples, seed)


def two_level_interval(values: np.ndarray, patients: Sequence | np.ndarray, resamples: int = 10_000,
                       seed: int = 0) -> tuple[float, float, float]:
    """Mean and 95 % percentile interval over training runs and patients, both resampled.

    values: (runs, images). With a single run only patients are resampled. Errors as `bootstrap_interval`."""
    if values.shape[1] != len(patients) or not values.size:
        raise ValueError(f"{values.shape[1]} images with {len(patients)} patients: expected one for each "
                         "image")
    if not np.isfinite(values).all():
        raise ValueError(f"scores of image {int(np.argmin(np.isfinite(values).all(0)))} are not finite")
    patient = numbered(patients)
    # A resample's mean needs only each patient's sum: this costs patients, not images.
    totals = np.stack([np.bincount(patient, run) for run in values])  # (runs, patients)
    sizes, random = np.bincount(patient), np.random.default_rng(seed)
    # How often each resample has each patient, and each run.
    of_patients, of_runs = (random.multinomial(count, np.full(count, 1 / count), resamples)
                            for count in totals.T.shape)
    # A patient weighs as many images as it has, so that a resample's mean is one over images.
    means = ((of_patients @ totals.T) * of_runs).sum(1) / len(totals) / (of_patients @ sizes)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(np.mean(values)), float(low), float(high)


def numbered(patients: Sequence | np.ndarray) -> np.ndarray:
    """A number from 0 for each image's patient, (images,); Unicode forms of a name are equal."""
    names = np.asarray(patients)
    # A file may hold patients as numbers or as text; numbers have no Unicode form.
    if names.dtype.kind not in "iu":
        names = np.array([unicodedata.normalize("NFC", str(name)) for name in names])
    return np.unique(names, return_inverse=True)[1]


def few_patients(patients: Sequence | np.ndarray) -> str:
    """A line that says why there are no intervals and no parts by size; "" for FEWEST_PATIENTS or more."""
    number = count_patients(patients)
    return "" if number >= FEWEST_PATIENTS else (
        f"No intervals and no parts by size: {counted(number, 'test patient')}, and such numbers need "
        f"{FEWEST_PATIENTS}.")


def count_patients(patients: Sequence | np.ndarray) -> int:
    """How many different patients these are."""
    return len(set(numbered(patients).tolist()))
