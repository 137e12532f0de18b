"""A test that is stopped goes on, in one run or in parts, and ends with the scores of an unbroken one."""

import json
import random
import signal
import time

import pytest

import test_prior_LIDC
from metrics import Record, evaluate
from tests import tiny
from tests.test_evaluation import dataset, noisy
from tests.tiny import where

TEST = [*tiny.TEST, "--steps", "1"]


def scores(folder):
    systems = json.loads((folder / "test" / "results.json").read_text())["systems"]
    return {name: (system["ids"], system["scores"]) for name, system in systems.items()}


@pytest.fixture
def whole(lidc, run_copy, no_pictures):
    """The scores of a test without interruption, whose folder is then emptied."""
    test_prior_LIDC.main([*TEST, *where(lidc, run_copy)])
    scores_of_all = scores(run_copy)
    for path in (run_copy / "test").iterdir():
        path.unlink()
    return scores_of_all


@pytest.fixture
def drawn(monkeypatch):
    """How many sets of samples were drawn, and when a signal should come: drawn["stop"] sets later."""
    count = {"sets": 0, "stop": None}

    def counting(sample, *arguments, **settings):
        def counted_sample(*inputs, **options):
            count["sets"] += 1
            if count["sets"] == count["stop"]:
                signal.raise_signal(signal.SIGTERM)
            return sample(*inputs, **options)
        return evaluate(counted_sample, *arguments, **settings)

    monkeypatch.setattr("metrics.systems.evaluate", counting)
    return count


@pytest.mark.parametrize("stop", [
    8, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (1, 23))])  # first and last
def test_a_test_stopped_by_a_signal_goes_on_and_draws_nothing_twice(
        stop, lidc, run_copy, whole, drawn, capsys):
    command, drawn["stop"] = [*TEST, *where(lidc, run_copy)], stop
    with pytest.raises(SystemExit) as end:
        test_prior_LIDC.main(command)
    assert end.value.code == 143
    assert "SIGTERM: the same command goes on from what is in" in capsys.readouterr().err
    assert drawn["sets"] == stop  # the image under this seed is finished
    test_prior_LIDC.main(command)
    assert scores(run_copy) == whole
    assert drawn["sets"] == 2 * 6 * 2  # systems, images, seeds
    test_prior_LIDC.main(command)
    assert drawn["sets"] == 24 and scores(run_copy) == whole


def test_parts_make_the_table_of_the_whole(lidc, run_copy, whole, drawn, capsys):
    command = [*TEST, *where(lidc, run_copy)]
    test_prior_LIDC.main([*command, "--part", "2/3"])
    assert drawn["sets"] == 8 and not (run_copy / "test" / "results.json").exists()
    assert "part 2/3 is done; after all parts, run this without --part" in capsys.readouterr().out
    for part, missing, number in (("1/3", "1/3, 3/3", 4), ("3/3", "3/3", 2)):
        message = (f"{number} of 6 images have not been tested with act-gtr, such as .*; run the same "
                   f"command with --part {missing} first")
        with pytest.raises(ValueError, match=message):
            test_prior_LIDC.main(command)
        test_prior_LIDC.main([*command, "--part", part])
    test_prior_LIDC.main(command)
    assert drawn["sets"] == 24 and scores(run_copy) == whole


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_part_that_is_none_is_refused(part, lidc, run_copy):
    with pytest.raises(ValueError, match=f"--part {part}: expected i/m, such as 1/4"):
        test_prior_LIDC.main([*TEST, *where(lidc, run_copy), f"--part={part}"])


@pytest.mark.parametrize("flag, values", [
    ("seeds", ["3", "1", "3"]), ("samples", ["2", "2"]), ("steps", ["1", "1"]),
    ("methods", ["atfm", "atfm"])])
def test_a_value_that_is_given_twice_is_refused_by_its_flag(flag, values, lidc, tmp_path):
    message = f"--{flag} {' '.join(values)}: a value comes twice, which would give the same again"
    with pytest.raises(ValueError, match=message):
        test_prior_LIDC.main([*TEST, *where(lidc, tmp_path), f"--{flag}", *values])


SCORED = ("atfm", "weights", "images")


def test_a_line_cut_short_counts_for_nothing_and_other_weights_for_others(tmp_path):
    images = dataset()
    with Record(tmp_path) as record:
        whole = evaluate(noisy, images, samples=(2,), record=record.of(*SCORED))
    lines = record.path.read_bytes()
    record.path.write_bytes(lines[:-20])
    with Record(tmp_path) as record:
        assert len(record.of(*SCORED)) == len(images) - 1
        assert len(record.of("atfm", "other weights", "images")) == len(record.of(*SCORED, "cuda")) == 0
        again = evaluate(noisy, images, samples=(2,), record=record.of(*SCORED))
    assert again.as_dict() == whole.as_dict()
    assert [json.loads(line)["id"] for line in record.path.read_text().splitlines()] == images.ids
    with Record(tmp_path, process=1) as other:  # another process reads what this one wrote
        read = other.of(*SCORED)
        assert all(read.has(name, 0) for name in images.ids) and min(read.seconds(images.ids)) > 0


@pytest.mark.parametrize("damage", [
    b"not JSON", b"\xff\xfe", b"[]", b"{}", b'{"of": 1, "scores": 2}', b"",
    b'{"of": "a", "id": "b", "seed": 0, "seconds": 1, "scores": {"GED2": []}}'])
def test_damaged_lines_are_named_and_their_images_tested_again(damage, tmp_path, capsys):
    images = dataset()
    with Record(tmp_path) as record:
        whole = evaluate(noisy, images, samples=(2,), record=record.of(*SCORED))
    lines = record.path.read_bytes().splitlines()
    record.path.write_bytes(b"\n".join([lines[0], damage, *lines[2:], b""]))
    with Record(tmp_path) as record:
        assert capsys.readouterr().out == (
            f"{record.path}: 1 of 5 lines are damaged, the first is line 2; left out, their images are "
            "tested again\n")
        assert [name for name in images.ids if not record.of(*SCORED).has(name, 0)] == [images.ids[1]]
        assert evaluate(noisy, images, samples=(2,), record=record.of(*SCORED)).as_dict() == whole.as_dict()


def test_scores_that_an_earlier_version_did_not_record_are_tested_again(tmp_path):
    images = dataset(1)
    with Record(tmp_path) as record:
        evaluate(noisy, images, samples=(2,), record=record.of(*SCORED))
        whole = evaluate(noisy, images, samples=(2, 4), record=record.of(*SCORED))
    assert whole.as_dict() == evaluate(noisy, images, samples=(2, 4)).as_dict()


def test_two_tests_do_not_write_to_one_file(tmp_path):
    with Record(tmp_path) as first:
        with pytest.raises(ValueError, match="scores.1of1.0.jsonl: another test writes here; wait for it"):
            Record(tmp_path)
        with Record(tmp_path, 1, 2) as part:
            assert part.path != first.path
    with Record(tmp_path):
        pass


@pytest.mark.slow
def test_a_test_killed_at_random_moments_ends_as_the_uninterrupted_one(lidc, run_copy, whole, processes):
    command, moments = [*TEST, *where(lidc, run_copy)], random.Random(0)
    for _ in range(tiny.KILLS):
        process = processes.Process(target=test_prior_LIDC.main, args=(command,))
        process.start()
        time.sleep(moments.uniform(0, 2))
        process.kill()
        process.join()
    test_prior_LIDC.main(command)
    assert scores(run_copy) == whole
