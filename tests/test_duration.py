"""How long a test will take is said before the time is spent."""

from types import SimpleNamespace

import pytest

from metadata_manager import EvaluationConfig
from metrics import SystemRecord, workload
from metrics.duration import duration_text

IMAGES = [f"image {i}" for i in range(604)]


def timed(*seconds):
    """A record of the first images under seed 0, which took so long each."""
    record = SystemRecord()
    for image, of_image in zip(IMAGES, seconds):
        record.add(image, 0, {}, of_image)
    return record


def test_a_test_says_first_what_it_will_do():
    systems = [SimpleNamespace(label=label, nfe=25, precision="float32")
               for label in ("act-gtr", "atfm (best)")]
    assert workload(systems, 7, EvaluationConfig(samples=(16, 100), seeds=(0, 1))).splitlines() == [
        "act-gtr: 7 images x 2 seeds x 100 samples x 25 NFE, float32",
        "atfm (best): 7 images x 2 seeds x 100 samples x 25 NFE, float32"]
    assert workload(systems[:1], 1, EvaluationConfig(samples=(1,), seeds=(3,))).startswith(
        "act-gtr: 1 image x 1 seed x 1 sample x ")


@pytest.mark.parametrize("records, images, seeds, processes, text", [
    # The first image of each also prepared the device. 604 x 5 - 2 sets take 3.8 s.
    ([timed(9.0, 0.1), timed(20.0, 3.7)], 604, 5, 1,
     "about 3.2 h for 604 images x 5 seeds x 2 systems on this machine"),
    ([timed(1.0)], 1, 2, 4,
     "about 1 s for 1 image x 2 seeds x 1 system on this machine, in each of 4 processes"),
    ([timed(70.0)], 604, 2, 1, "about 23 h for 604 images x 2 seeds x 1 system on this machine"),
    ([timed(1.0, 1.0)], 2, 1, 1, ""),  # nothing remains
])
def test_what_remains_is_by_the_time_of_the_first_images(records, images, seeds, processes, text):
    config = EvaluationConfig(seeds=tuple(range(seeds)))
    assert duration_text(records, IMAGES[:images], config, processes) == text


def test_more_than_a_day_comes_with_the_flags_that_help():
    text = duration_text([timed(113.0)], IMAGES, EvaluationConfig(seeds=(0, 1)))
    assert text.startswith("about 38 h for 604 images x 2 seeds x 1 system on this machine. More than a day;")
    for flag in ("--seeds 0", "--limit", "--samples 16", "--steps", "--nproc_per_node", "--part 1/4"):
        assert flag in text
    assert len(text) < 400
