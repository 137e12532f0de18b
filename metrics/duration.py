"""How long a test will take, said before the time is spent."""

from collections.abc import Collection, Sequence
from statistics import median_low
from typing import Any

from metadata_manager import EvaluationConfig
from metrics.program import counted, time_text, with_advice
from metrics.record import SystemRecord

TIMED_IMAGES = 2  # of each system; the first one also pays for what a device prepares once


def workload(systems: Sequence[Any], images: int, config: EvaluationConfig) -> str:
    """What a test is about to do, a line per system, each as `models.systems.System`."""
    sets = f"{counted(images, 'image')} x {counted(len(config.seeds), 'seed')}"
    samples = counted(max(config.samples), "sample")
    return "\n".join(f"{system.label}: {sets} x {samples} x {system.nfe} NFE, {system.precision}"
                     for system in systems)


def duration_text(records: Sequence[SystemRecord], images: Collection[str], config: EvaluationConfig,
                  processes: int = 1) -> str:
    """A line on how long the rest of a test takes and, if over a day, what shortens it; "" if all is done.

    records: a system each, with an image or two tested. images: the names of those that a process tests."""
    seconds = 0.0
    for record in records:
        # Sets of samples that an earlier run recorded are not drawn again.
        missing = sum(not record.has(image, seed) for image in images for seed in config.seeds)
        # The lower median: of two images the second, as the first one prepared the device.
        seconds += missing * median_low(record.seconds()) if missing else 0.0
    if not seconds:
        return ""
    text = (f"about {time_text(seconds)} for {counted(len(images), 'image')} x "
            f"{counted(len(config.seeds), 'seed')} x {counted(len(records), 'system')} on this machine")
    text += f", in each of {processes} processes" if processes > 1 else ""
    return with_advice(text, seconds, "--seeds 0 (one run of sampling), --limit 200 (images), --samples 16, "
                       "fewer --steps, several GPUs (torchrun --nproc_per_node 4), or --part 1/4 to 4/4 on "
                       "four machines")
