"""A whole test: every system on every test image, by several processes, in parts, from where it stopped."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from metadata_manager import EvaluationConfig
from metrics.duration import TIMED_IMAGES, duration_text
from metrics.evaluation import Evaluation, Images, evaluate, image_names, interleaved
from metrics.record import Record


class TestImages(Images, Protocol):
    """A dataset whose fingerprint changes with any of its pixels, with the patient of each image."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def patients(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Row:
    """A system, see `models.systems.System`, with its scores on the test images.

    seconds: that these took. samples: per image and seed."""

    system: Any
    evaluation: Evaluation
    seconds: float
    samples: int


def identity_of(dataset: TestImages) -> str:
    """16 hex digits that change with any pixel, name or patient of the images, not with the path."""
    # The path is left out: the same images may lie elsewhere tomorrow.
    names = zip(image_names(dataset), map(str, dataset.patients))
    content = json.dumps([dataset.fingerprint, *names])
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def evaluate_systems(systems: Sequence[Any], dataset: TestImages, config: EvaluationConfig, folder: Path,
                     processes: Any, after_each: Callable[[], None] = lambda: None) -> list[Row]:
    """The scores (App. 7) of each system on every test image, or on those of --part.

    systems, processes: as `models.systems.System` and `models.processes.Processes`. Each process tests every
    m-th image. Scores are appended to files in `folder` as they come: what is recorded of the same weights
    and images is not tested again. after_each: as in `evaluate`. Raises ValueError where the test was run in
    parts and some are missing, and as `evaluate` and `Record`."""
    part, parts = config.part_of_images
    # A part has the same images whatever the number of processes, among which it is divided.
    indices = range(part + parts * processes.rank, len(dataset), parts * processes.count)
    names, rows = image_names(dataset), []
    with Record(folder, part + 1, parts, processes.rank) as record:
        # Device and precision are part of the identity, as they change the samples.
        records = {system.label: record.of(system.label, system.weights, dataset.fingerprint,
                                           processes.device.type, system.precision) for system in systems}
        # A test that was begun in parts must be complete before a table of all images is made.
        if parts == 1:
            record.refuse_missing_parts(records, names, config.seeds)

        def scores_of(system: Any, seeds: Sequence[int], some: Sequence[int], title: str | None = None
                      ) -> Evaluation:
            return evaluate(system.sample, dataset, config.samples, seeds, processes.device, some, title,
                            record=records[system.label], after_each=after_each)

        # The first images of each system come first: by their time a line says how long the test takes.
        for system in systems:
            scores_of(system, config.seeds[:1], indices[:TIMED_IMAGES])
        duration = duration_text(list(records.values()), [names[index] for index in indices], config,
                                 processes.count)
        first = processes.rank == 0
        if first and duration:
            print(duration, flush=True)
        # A system at a time, so that a test that is stopped has whole rows.
        for system in systems:
            evaluation = scores_of(system, config.seeds, indices, system.label if first else None)
            # Each process has to call `gather`, even one without images.
            seconds = sum(processes.gather(sum(records[system.label].seconds(evaluation.ids))))
            rows.append(Row(system, interleaved(processes.gather(evaluation)), seconds, max(config.samples)))
    return rows
