"""How long a test will take is said before the time is spent."""

from types import SimpleNamespace

import pytest

from metadata_manager import EvaluationConfig
from metrics import SystemRecord, workload
from metrics.duration import duration_text, remaining_seconds

IMAGES = [f"image {i}" for i in range(604)]
FIVE = EvaluationConfig()  # seeds


def timed(*seconds):
    """A record of the first images under seed 0, which took so long each."""
    record = SystemRecord()
    for image, of_image in zip(IMAGES, seconds):
        record.add(image, 0, {}, of_image)
    return record


def test_a_test_says_first_what_it_will_do():
    labels = ("act-gtr", "atfm (best)")
    systems = [SimpleNamespace(label=label, nfe=25, precision="float32") for label in labels]
    config = EvaluationConfig(samples=(16, 100), seeds=(0, 1))
    assert workload(systems, 7, config).splitlines() == [
        f"{label}: 7 images x 2 seeds x 100 samples x 25 NFE, float32" for label in labels]
    assert workload(systems[:1], 1, EvaluationConfig(samples=(1,), seeds=(3,))).startswith(
        "act-gtr: 1 image x 1 seed x 1 sample x ")


def test_what_remains_is_by_the_time_of_the_first_images():
    records = [timed(9.0, 0.1), timed(20.0, 3.7)]  # the first of each also prepared the device
    sets = 604 * 5 - 2
    assert remaining_seconds(records, IMAGES, FIVE.seeds) == pytest.approx(sets * (0.1 + 3.7))
    assert duration_text(records, IMAGES, FIVE) == (
        "about 3.2 h for 604 images x 5 seeds x 2 systems on this machine")
    assert duration_text([timed(1.0)], IMAGES[:1], EvaluationConfig(seeds=(0, 1)), 4) == (
        "about 1 s for 1 image x 2 seeds x 1 system on this machine, in each of 4 processes")


def test_nothing_is_said_where_nothing_remains():
    assert duration_text([timed(1.0, 1.0)], IMAGES[:2], EvaluationConfig(seeds=(0,))) == ""


def test_more_than_a_day_comes_with_the_flags_that_help():
    text = duration_text([timed(113.0)], IMAGES, EvaluationConfig(seeds=(0, 1)))
    assert text.startswith("about 38 h for 604 images x 2 seeds x 1 system on this machine. More than a day;")
    for flag in ("--seeds 0", "--limit", "--samples 16", "--steps", "--nproc_per_node", "--part 1/4"):
        assert flag in text
    assert len(text) < 400
    assert "More than a day" not in duration_text([timed(70.0)], IMAGES, EvaluationConfig(seeds=(0, 1)))


@pytest.mark.parametrize("seconds, words", [(1, "1 s"), (89, "89 s"), (600, "10 min"), (3600 * 9.5, "9.5 h"),
                                            (3600 * 11000, "11,000 h")])
def test_durations_read_well(seconds, words):
    text = duration_text([timed(seconds)], IMAGES[:2], EvaluationConfig(seeds=(0,)))
    assert text.startswith(f"about {words} ")
