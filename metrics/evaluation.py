"""Scores of a sampler over a dataset, as the paper's tables report them: mean and deviation over runs."""

import hashlib
import sys
from collections.abc import Callable, Container, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from metrics.maps import calibration_error, dice_of_means, s_ncc
from metrics.overlap import Overlaps
from metrics.scores import (
    distance_from,
    diversity_from,
    empty_share,
    experts_diversity_from,
    ged_from,
    hm_iou_from,
    mdm_from,
)

PER_N = {"GED": ged_from, "HM-IoU": hm_iou_from, "MDM": mdm_from, "Diversity": diversity_from}
AT_MAX_N = {"S_NCC": s_ncc, "Dice of means": dice_of_means, "ECE": calibration_error}
# Where GED_n comes from, and how often nothing is marked (`metrics.parts`): also of all n samples.
PARTS = {"Distance": distance_from, "Experts' diversity": experts_diversity_from}
OF_MASKS = {"Empty": lambda samples, _: empty_share(samples),
            "Experts empty": lambda _, masks: empty_share(masks),
            "Size": lambda _, masks: masks.sum((1, 2, 3)) / masks.shape[1]}  # pixels, mean over experts

SCORED_TOGETHER = 8  # sets of samples on a GPU, which waits for launches; on a CPU one at a time is faster

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
    """Per-image scores of one sampler, named as in the paper's tables: "GED16", "HM-IoU32", ..."""

    ids: tuple[str, ...]
    seeds: tuple[int, ...]
    scores: dict[str, np.ndarray]  # name -> float64 (seeds, images)

    def mean_std(self) -> dict[str, tuple[float, float | None]]:
        """Of each score the mean and standard deviation over seeds (runs) of its mean over images.

        The deviation is that of a sample of runs (ddof = 1), None when there is one run."""
        runs = {name: values.mean(1) for name, values in self.scores.items()}
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


def interleaved(parts: Sequence[Evaluation]) -> Evaluation:
    """One evaluation out of m with the same seeds and scores: of images 0, m, ..., of 1, m + 1, ..., etc.

    Parts without an image are left out."""
    parts = [part for part in parts if part.ids]
    count = sum(len(part.ids) for part in parts)
    ids = np.empty(count, object)
    scores = {name: np.empty((len(parts[0].seeds), count)) for name in parts[0].scores}
    for start, part in enumerate(parts):
        ids[start::len(parts)] = part.ids
        for name, values in part.scores.items():
            scores[name][:, start::len(parts)] = values
    return Evaluation(tuple(ids), parts[0].seeds, scores)


def score(samples: Tensor, masks: Tensor, prefixes: Sequence[int]) -> dict[str, Tensor]:
    """All scores of binary samples (b, n, h, w) against masks (b, k, h, w): name -> (b,).

    GED, HM-IoU, MDM and diversity of the first n samples per n of `prefixes`; the rest of all samples."""
    overlaps = Overlaps.of(samples, masks)
    per_n = {f"{name}{n}": of(overlaps.prefix(n)) for name, of in PER_N.items() for n in prefixes}
    parts = {name: of(overlaps) for name, of in PARTS.items()}
    return per_n | parts | {name: of(samples, masks) for name, of in (AT_MAX_N | OF_MASKS).items()}


@torch.no_grad()
def evaluate(
    sample: SampleFunction,
    dataset: Images,
    samples: Sequence[int] = (16, 32, 100),
    seeds: Sequence[int] = (0,),
    device: torch.device | str = "cpu",
    indices: Sequence[int] | None = None,
    title: str | None = None,
    together: int | None = None,
    memory: MutableMapping[tuple[str, int], dict[str, float]] | None = None,
    after_each: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Score `sample` on the images of `dataset`: its samples thresholded at >= 0.5 against all experts.

    sample(image (1, c, h, w), n, generator=...) -> (1, n, h, w) probabilities, all of it on `device`.
    Per image and seed max(samples) are drawn once, and the first n of them are scored for each n of
    `samples`. The generator depends on seed and image id alone, so that images may be split over processes
    at will; CPU and CUDA draw different numbers.
    indices: of the images to score (default: all). title: of the progress that is shown, None for none.
    together: how many sets of samples are scored at once, which changes nothing beyond the rounding of
    float64 (default: 8 on a GPU, 1 on a CPU).
    memory: scores by image id and seed; what it holds is not drawn again, what is found is put there.
    after_each() is called when an image, or those that are scored together, is in memory.
    Raises ValueError for an empty or inconsistent dataset, masks other than 0/1, and samples that are not
    finite or not of the right shape, naming the image."""
    if not (samples and seeds) or min(samples) < 1:
        raise ValueError(f"samples {tuple(samples)}, seeds {tuple(seeds)}: expected counts >= 1, and a seed")
    if not 0 < len(dataset) == len(dataset.ids):
        raise ValueError(f"dataset of {len(dataset)} images with {len(dataset.ids)} ids: "
                         "expected at least one image, and an id for each")
    indices = range(len(dataset)) if indices is None else indices
    together = together or (SCORED_TOGETHER if torch.device(device).type == "cuda" else 1)
    memory = {} if memory is None else memory
    sets = _sets(sample, dataset, max(samples), seeds, device, progress(indices, title), memory)
    while block := sorted(islice(sets, together), key=_experts):
        for _, alike in groupby(block, key=_experts):
            keys, drawn, masks = zip(*alike)
            found = score(torch.cat(drawn), torch.cat(masks), samples)
            values = torch.stack([value.double() for value in found.values()], dim=1).tolist()
            for key, of_set in zip(keys, values):
                memory[key] = dict(zip(found, of_set))
        after_each()
    ids = tuple(dataset.ids[index] for index in indices)
    names = list(memory[ids[0], seeds[0]]) if ids else []
    scores = {name: np.array([[memory[one, seed][name] for one in ids] for seed in seeds]) for name in names}
    return Evaluation(ids, tuple(seeds), scores)


def progress(indices: Iterable[int], title: str | None) -> Iterable[int]:
    """A bar on a terminal, elsewhere a line once a minute: images done, and the time left."""
    if title is None:
        return indices
    if sys.stderr.isatty():
        return tqdm(indices, title, leave=False)
    return tqdm(indices, title, leave=False, mininterval=60, maxinterval=60, delay=10,
                bar_format="{desc}: {n_fmt} of {total_fmt} images, {remaining} left\n")


def _sets(sample: SampleFunction, dataset: Images, n: int, seeds: Sequence[int], device: torch.device | str,
          indices: Iterable[int], known: Container[tuple[str, int]]
          ) -> Iterator[tuple[tuple[str, int], Tensor, Tensor]]:
    """Of all that is not known: image id and seed, samples (1, n, h, w) and masks (1, k, h, w), both bool."""
    for index in indices:
        name = dataset.ids[index]
        missing = [seed for seed in seeds if (name, seed) not in known]
        if not missing:
            continue
        image, masks = (one.to(device)[None] for one in dataset[index])
        if not ((masks == 0) | (masks == 1)).all():
            raise ValueError(f"masks of image {name}: expected 0 and 1, found others; check its file")
        for seed in missing:
            yield (name, seed), draw(sample, image, n, seed, name), masks.bool()


def _experts(one: tuple[tuple[str, int], Tensor, Tensor]) -> int:
    """How many masks a set of samples is scored against: only sets of equal k go together."""
    return one[2].shape[1]


def draw(sample: SampleFunction, image: Tensor, n: int, seed: int, name: str) -> Tensor:
    """n binary samples (1, n, h, w) of one image, checked."""
    drawn = sample(image, n, generator=torch.Generator(image.device).manual_seed(image_seed(seed, name)))
    expected = (1, n, *image.shape[2:])
    if drawn.shape != expected:
        raise ValueError(f"samples of image {name}: shape {tuple(drawn.shape)}, "
                         f"expected (b, n, h, w) = {expected}")
    if not drawn.isfinite().all():
        bad = int((~drawn.isfinite()).sum())
        raise ValueError(f"samples of image {name}, seed {seed}: {bad} of {drawn.numel()} probabilities are "
                         "not finite; the model has diverged or its input is bad")
    return drawn >= 0.5


def image_seed(seed: int, name: str) -> int:
    """The seed of an image's samples: 64 bits of SHA-256, the same in every process, unlike Python's hash."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little")
