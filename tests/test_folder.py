"""The folder of a test: a separate one, even if several tests start at the same moment."""

import json
import multiprocessing

import pytest

from metadata_manager import EvaluationConfig
from metrics import free_folder, write_text

ATTEMPTS = 60  # of several processes to meet at the same moment


def claim(place, images="images", weights="weights", **settings):
    """The name of the folder that a test gets and leaves results in."""
    folder = free_folder(place, sampling=EvaluationConfig(**settings), test_images=images,
                         weights={"weights of atfm": weights})
    write_text(folder / "results.json", {"seeds": settings.get("seeds", [])})
    return folder.name


def test_a_test_with_other_settings_goes_beside_the_first(tmp_path, capsys):
    place = tmp_path / "test"
    assert claim(place, report_images=3) == "test"  # of the same scores
    names = [claim(place, **settings) for settings in (
        {}, {"part": "1/2"}, {"seeds": (7,)}, {"steps": (1,)}, {"seeds": (7,)}, {})]
    assert names == ["test", "test", "test_2", "test_3", "test_2", "test"]
    assert f"{place}: kept, the results of another command; seeds differ\n" in capsys.readouterr().out


def test_other_images_and_other_weights_are_another_test(tmp_path, capsys):
    place = tmp_path / "test"
    names = [claim(place), claim(place, images="other"), claim(place, weights="trained on"), claim(place)]
    assert names == ["test", "test_2", "test_3", "test"]
    assert capsys.readouterr().out == (
        f"{place}: kept, the results of another command; test_images differ\n"
        f"{place}: kept, the results of another command; weights of atfm differ\n"
        f"{place}_2: kept, the results of another command; test_images, weights of atfm differ\n")


@pytest.mark.parametrize("content", ["not JSON", "[]", "{}"])
@pytest.mark.parametrize("name", ["results.json", "settings.json", "notes.txt"])
def test_what_is_unknown_or_damaged_is_kept(name, content, tmp_path):
    write_text(tmp_path / "test" / name, content)
    write_text(tmp_path / "test_2", "a file")
    assert claim(tmp_path / "test") == "test_3"
    assert (tmp_path / "test" / name).read_text() == content


def test_an_empty_folder_is_taken_and_nothing_but_settings_is_in_it(tmp_path):
    (tmp_path / "test").mkdir()
    assert free_folder(tmp_path / "test", number=1) == tmp_path / "test"
    assert [path.name for path in (tmp_path / "test").iterdir()] == ["settings.json"]
    assert json.loads((tmp_path / "test" / "settings.json").read_text()) == {"number": 1}


def test_where_the_file_system_knows_no_locks_the_folder_is_claimed_too(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError("Operation not supported")

    monkeypatch.setattr("fcntl.flock", flock)
    names = [free_folder(tmp_path / "test", number=number).name for number in (1, 2, 1)]
    assert names == ["test", "test_2", "test"]


def test_a_place_where_no_folder_can_be_is_named(tmp_path):
    write_text(tmp_path / "runs", "a file")
    with pytest.raises(OSError, match="runs/test: no results can be kept there .* another --output_path"):
        free_folder(tmp_path / "runs" / "test", number=1)


def claim_together(number, barrier, root, folders):
    for attempt in range(ATTEMPTS):
        barrier.wait()
        folders.put((attempt, number, str(free_folder(root / str(attempt) / "test", number=number // 2))))


def test_tests_that_start_at_the_same_moment_have_a_folder_for_each_settings(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, folders = context.Barrier(4), context.Queue()
    workers = [context.Process(target=claim_together, args=(number, barrier, tmp_path, folders))
               for number in range(4)]
    for worker in workers:
        worker.start()
    claimed = {(attempt, number): folder for attempt, number, folder in
               (folders.get(timeout=30) for _ in range(4 * ATTEMPTS))}
    for worker in workers:
        worker.join()
    for attempt in range(ATTEMPTS):
        first, *_, last = (claimed[attempt, number] for number in range(4))
        assert claimed[attempt, 1] == first != last == claimed[attempt, 2]
