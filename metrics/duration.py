"""How long a test will take, said before the time is spent."""

from collections.abc import Collection, Sequence
from statistics import median_low
from typing import Protocol

from metadata_manager import EvaluationConfig
from metrics.program import DAY, time_text
from metrics.record import SystemRecord

TIMED_IMAGES = 2  # of each system; the first one also pays for what a device prepares once


class TestedSystem(Protocol):
    """What is said of a system before it is tested, see `models.systems.System`."""

    label: str
    nfe: int
    precision: str


def workload(systems: Sequence[TestedSystem], images: int, config: EvaluationConfig) -> str:
    """What a test is about to do, a line per system."""
    sets = f"{counted(images, 'image')} x {counted(len(config.seeds), 'seed')}"
    samples = counted(max(config.samples), "sample")
    return "\n".join(f"{system.label}: {sets} x {samples} x {system.nfe} NFE, {system.precision}"
                     for system in systems)


def remaining_seconds(records: Sequence[SystemRecord], images: Collection[str], seeds: Sequence[int]
                      ) -> float:
    """Seconds until these images are tested under these seeds with each system, by what each took so far.

    A set of samples is taken to need the (lower) median of those recorded; a system without any counts for
    nothing, so test an image or two with each before."""
    total = 0.0
    for record in records:
        missing = sum(not record.has(image, seed) for image in images for seed in seeds)
        recorded = record.seconds()
        total += missing * median_low(recorded) if recorded else 0.0
    return total


def duration_text(records: Sequence[SystemRecord], images: Collection[str], config: EvaluationConfig,
                  processes: int = 1) -> str:
    """A line on how long the test takes that remains, and over a day on what helps; "" if nothing remains.

    records: of each system. images: names of those that each of the processes tests."""
    seconds = remaining_seconds(records, images, config.seeds)
    if not seconds:
        return ""
    text = (f"about {time_text(seconds)} for {counted(len(images), 'image')} x "
            f"{counted(len(config.seeds), 'seed')} x {counted(len(records), 'system')} on this machine")
    text += f", in each of {processes} processes" if processes > 1 else ""
    if seconds <= DAY:
        return text
    return (f"{text}. More than a day; what makes it affordable: --seeds 0 (one run of sampling), --limit "
            "200 (images), --samples 16, fewer --steps, several GPUs (torchrun --nproc_per_node 4), or "
            "--part 1/4 to 4/4 on four machines")


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 seed, 2 seeds."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
