"""Scores of a sampler over a dataset, as the paper's tables report them: mean and spread over runs."""

import hashlib
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from metrics.catalogue import score, score_names
from metrics.record import SystemRecord

# (image (b, c, h, w), n, generator=...) -> probabilities (b, n, h, w)
SampleFunction = Callable[..., Tensor]


class Images(Protocol):
    """A dataset of images with expert masks; the id of an image names it in errors and seeds its samples."""

    @property
    def ids(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """image (c, h, w) float, masks (k, h, w) of 0/1"""


@dataclass(frozen=True)
class Evaluation:
    """Per-image scores of one sampler, named as in the paper's tables: "GED16", "HM-IoU32", ...

    ids: the names of the images, see `image_names`."""

    ids: tuple[str, ...]
    seeds: tuple[int, ...]
    scores: dict[str, np.ndarray]  # name -> float64 (seeds, images)

    def mean_std(self) -> dict[str, tuple[float, float | None]]:
        """Of each score the mean and standard deviation over seeds (runs) of its mean over images.

        The standard deviation is that of a sample of runs (ddof = 1), None when there is one run."""
        runs = {name: values.mean(1) for name, values in self.scores.items()}
        # A single run has no spread: 0 would claim a precision that nobody measured.
        return {name: (float(run.mean()), float(run.std(ddof=1)) if len(run) > 1 else None)
                for name, run in runs.items()}

    def means(self, n: int, *names: str) -> dict[str, float]:
        """Mean over images and seeds of the scores of n samples, by name."""
        return {name: float(self.scores[f"{name}{n}"].mean()) for name in names}

    def as_dict(self) -> dict[str, Any]:
        """Lists, strings and numbers only, for JSON."""
        scores = {name: values.tolist() for name, values in self.scores.items()}
        return {"ids": list(self.ids), "seeds": list(self.seeds), "scores": scores,
                "mean_std": self.mean_std()}


def interleaved(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Merges m evaluations with the same seeds and scores, of which number i has images i, i + m, ...

    Those without an image are left out."""
    # Where there are more processes than images, the last ones have none.
    evaluations = [evaluation for evaluation in evaluations if evaluation.ids]
    number, seeds = sum(len(evaluation.ids) for evaluation in evaluations), evaluations[0].seeds
    # As objects, since NumPy would cut strings to a fixed length.
    ids = np.empty(number, object)
    scores = {name: np.empty((len(seeds), number)) for name in evaluations[0].scores}
    for first, evaluation in enumerate(evaluations):
        # Process i tested images i, i + m, ...: their scores go back to these places.
        ids[first::len(evaluations)] = evaluation.ids
        for name, values in evaluation.scores.items():
            scores[name][:, first::len(evaluations)] = values
    return Evaluation(tuple(ids), seeds, scores)


@torch.no_grad()
def evaluate(
    sample: SampleFunction,
    dataset: Images,
    samples: Sequence[int] = (16, 32, 100),
    seeds: Sequence[int] = (0,),
    device: torch.device | str = "cpu",
    indices: Sequence[int] | None = None,
    title: str | None = None,
    record: SystemRecord | None = None,
    after_each: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Score `sample` on the images of `dataset`: its samples thresholded at >= 0.5 against all experts.

    sample(image (1, c, h, w), n, generator=...) -> (1, n, h, w) probabilities, all of it on `device`.
    Per image and seed max(samples) are drawn once, and the first n of them are scored for each n of
    `samples`. The generator depends only on seed and image name, so that images may be divided among
    processes at will; CPU and CUDA draw different numbers.
    indices: of the images to score (default: all). title: of the progress that is shown, None for none.
    record: of this sampler's scores; what it holds is not drawn again, what is scored is added to it.
    after_each() is called when an image is in the record.
    Raises ValueError for an empty or inconsistent dataset, a seed that is given twice, masks other than 0/1,
    and samples that are not finite or not of the right shape, naming the image."""
    _check(dataset, samples, seeds)
    names, columns = image_names(dataset), score_names(samples)
    indices = range(len(dataset)) if indices is None else indices
    record = SystemRecord() if record is None else record
    for index in progress(indices, title):
        # After a restart only what the record lacks is drawn.
        missing = [seed for seed in seeds if not record.has(names[index], seed, columns)]
        if not missing:
            continue
        image, masks = (pixels.to(device)[None] for pixels in dataset[index])
        # Checked here, since `.bool()` below would take 255 or 0.3 for a 1.
        if not ((masks == 0) | (masks == 1)).all():
            raise ValueError(f"masks of image {names[index]}: expected 0 and 1; check its file")
        # Recorded a seed at a time: a signal between two loses none.
        for seed in missing:
            started = time.perf_counter()
            # The largest n is drawn once, and its first samples serve every smaller n.
            scores = score(draw(sample, image, max(samples), seed, names[index]), masks.bool(), samples)
            values = torch.cat([value.double() for value in scores.values()]).tolist()  # one wait for a GPU
            record.add(names[index], seed, dict(zip(scores, values)), time.perf_counter() - started)
            after_each()
    # All scores come from the record, which also has those of earlier runs.
    ids = tuple(names[index] for index in indices)
    return Evaluation(ids, tuple(seeds), {
        column: np.array([[record.scores(name, seed)[column] for name in ids] for seed in seeds])
        for column in (columns if ids else ())})


def _check(dataset: Images, samples: Sequence[int], seeds: Sequence[int]) -> None:
    if not (samples and seeds) or min(samples) < 1:
        raise ValueError(f"samples {tuple(samples)}, seeds {tuple(seeds)}: expected counts >= 1, and a seed")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {' '.join(map(str, seeds))}: the same seed twice is the same run twice; "
                         "expected different ones")
    if not 0 < len(dataset) == len(dataset.ids):
        raise ValueError(f"dataset of {len(dataset)} images with {len(dataset.ids)} ids: "
                         "expected at least one image, and an id for each")


def progress(items: Iterable[Any], title: str | None) -> Iterable[Any]:
    """A bar on a terminal, elsewhere a line once a minute: images done, and the time left."""
    if title is None:
        return items
    # A bar redraws its line many times a second, which would fill a log file.
    if sys.stderr.isatty():
        return tqdm(items, title, leave=False)
    return tqdm(items, title, leave=False, mininterval=60, maxinterval=60, delay=10,
                bar_format="{desc}: {n_fmt} of {total_fmt} images, {remaining} left\n")


def image_names(dataset: Images) -> list[str]:
    """A name for each image, by which its scores are kept: its id, or "id (2)" of another with the same id.

    An image that is listed several times, as the authors' split of ISIC3 does, has one name. Ids that differ
    in Unicode form (NFC, NFD) only are the same."""
    # File systems differ in the form of an accented letter: scores of one machine have to count on another.
    ids = [unicodedata.normalize("NFC", name) for name in dataset.ids]
    repeated = {name for name, times in Counter(ids).items() if times > 1}
    taken, names = set(ids), []
    versions: dict[str, dict[bytes, str]] = defaultdict(dict)  # of an id: digest of an image -> its name
    for index, name in enumerate(ids):
        # Pixels are compared only where an id is repeated: reading all would take long.
        if name in repeated:
            digest = hashlib.blake2b(b"".join(pixels.cpu().contiguous().numpy().tobytes()
                                              for pixels in dataset[index])).digest()
            if versions[name] and digest not in versions[name]:
                versions[name][digest] = next(other for number in count(len(versions[name]) + 1)
                                              if (other := f"{name} ({number})") not in taken)
                taken.add(versions[name][digest])
            name = versions[name].setdefault(digest, name)
        names.append(name)
    return names


def draw(sample: SampleFunction, image: Tensor, n: int, seed: int, name: str) -> Tensor:
    """n binary samples (1, n, h, w) of one image (1, c, h, w), checked.

    Raises ValueError, naming the image, for samples of another shape or that are not finite."""
    # A generator for each image: its samples do not depend on the images before it.
    drawn = sample(image, n, generator=torch.Generator(image.device).manual_seed(image_seed(seed, name)))
    expected = (1, n, *image.shape[2:])
    if drawn.shape != expected:
        raise ValueError(f"samples of image {name}: shape {tuple(drawn.shape)}, "
                         f"expected (b, n, h, w) = {expected}")
    if not drawn.isfinite().all():
        bad = int((~drawn.isfinite()).sum())
        raise ValueError(f"samples of image {name}, seed {seed}: {bad} of {drawn.numel()} probabilities are "
                         "not finite; the model has diverged or its input is bad")
    # A probability of exactly 0.5 counts as foreground.
    return drawn >= 0.5


def image_seed(seed: int, name: str) -> int:
    """The seed of an image's samples: 64 bits of SHA-256, the same in every process, unlike Python's hash."""
    name = unicodedata.normalize("NFC", name)
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little")
