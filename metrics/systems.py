"""A whole test: every system on every test image, by several processes, in parts, from where it stopped."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from metadata_manager import EvaluationConfig
from metrics.duration import TIMED_IMAGES, duration_text
from metrics.evaluation import Evaluation, Images, SampleFunction, evaluate, image_names, interleaved
from metrics.record import Record


class System(Protocol):
    """What a test needs of a system and what its tables say of it, see `models.systems.System`."""

    label: str
    method: str
    sample: SampleFunction
    weights: str | None
    nfe: int
    parameters: int
    checkpoints: tuple[str, ...]
    alpha: float | None
    solver: str | None
    steps: int | None
    precision: str
    preset: str
    training: dict[str, dict[str, Any]]


class TestImages(Images, Protocol):
    """A dataset whose fingerprint changes with any of its pixels, with the patient of each image."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def patients(self) -> np.ndarray: ...


class Processes(Protocol):
    """This process among those of a run, see `models.processes.Processes`."""

    device: torch.device
    rank: int
    count: int

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in their order."""


@dataclass(frozen=True)
class Row:
    """A system with its scores on the test images, and the seconds of these; samples: per image and seed."""

    system: System
    evaluation: Evaluation
    seconds: float
    samples: int


def identity_of(dataset: TestImages) -> str:
    """16 hex digits that change with any pixel, name or patient of the images, not with the path."""
    names = zip(image_names(dataset), map(str, dataset.patients))
    content = json.dumps([dataset.fingerprint, *names])
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def evaluate_systems(systems: Sequence[System], dataset: TestImages, config: EvaluationConfig, folder: Path,
                     processes: Processes, after_each: Callable[[], None] = lambda: None
                     ) -> list[Row]:
    """The scores (App. 7) of each system on every test image, or on those of --part.

    Each process tests every m-th image. Scores are appended to files in `folder` as they come: what is there
    of the same weights and images is not tested again. The first images of each system come first: by their
    time a line says how long the test takes. after_each: as in
    `evaluate`. Raises ValueError where the test was run in parts and some are missing, and as `evaluate` and
    `Record`."""
    part, parts = config.part_of_images
    indices = range(part + parts * processes.rank, len(dataset), parts * processes.count)
    names, first, rows = image_names(dataset), processes.rank == 0, []
    with Record(folder, part + 1, parts, processes.rank) as record:
        records = {system.label: record.of(system.label, system.weights, dataset.fingerprint,
                                           processes.device.type, system.precision) for system in systems}

        def scores_of(system: System, seeds: Sequence[int], some: Sequence[int], title: str | None = None
                      ) -> Evaluation:
            return evaluate(system.sample, dataset, config.samples, seeds, processes.device, some, title,
                            record=records[system.label], after_each=after_each)

        if parts == 1:
            record.refuse_missing_parts(records, names, config.seeds)
        for system, index in product(systems, indices[:TIMED_IMAGES]):
            scores_of(system, config.seeds[:1], [index])
        duration = duration_text(list(records.values()), [names[index] for index in indices], config,
                                 processes.count)
        if first and duration:
            print(duration, flush=True)
        for system in systems:
            evaluation = scores_of(system, config.seeds, indices, system.label if first else None)
            seconds = sum(processes.gather(sum(records[system.label].seconds(evaluation.ids))))
            rows.append(Row(system, interleaved(processes.gather(evaluation)), seconds, max(config.samples)))
    return rows
