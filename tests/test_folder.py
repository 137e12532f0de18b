"""The folder of a test: its own, also when several tests start at the same moment."""

import json
import multiprocessing

import pytest

from metadata_manager import EvaluationConfig
from metrics import free_folder, write_text


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
    assert f"{place}: kept, the results of another test; seeds differ\n" in capsys.readouterr().out


def test_other_images_and_other_weights_are_another_test(tmp_path, capsys):
    place = tmp_path / "test"
    names = [claim(place), claim(place, images="other"), claim(place, weights="trained on"), claim(place)]
    assert names == ["test", "test_2", "test_3", "test"]
    assert capsys.readouterr().out == (
        f"{place}: kept, the results of another test; test_images differ\n"
        f"{place}: kept, the results of another test; weights of atfm differ\n"
        f"{place}_2: kept, the results of another test; test_images, weights of atfm differ\n")


@pytest.mark.parametrize("content", ["not JSON", "[]", "{}"])
@pytest.mark.parametrize("name", ["results.json", "settings.json"])
def test_what_is_unknown_or_damaged_is_kept(name, content, tmp_path):
    write_text(tmp_path / "test" / name, content)
    assert claim(tmp_path / "test") == "test_2"
    assert (tmp_path / "test" / name).read_text() == content


def test_a_test_of_an_earlier_version_goes_on_unless_it_is_done(tmp_path):
    place, older, newer = tmp_path / "test", {"steps": 2}, {"steps": 2, "weights": "a"}
    assert [free_folder(place, **settings).name for settings in (older, newer)] == ["test", "test"]
    assert [free_folder(place, **{**newer, "weights": "b"}).name, free_folder(place, **newer).name] == [
        "test_2", "test"]
    done = free_folder(tmp_path / "done", **older)
    write_text(done / "results.json", {})
    assert free_folder(tmp_path / "done", **newer).name == "done_2"


def test_an_empty_folder_is_taken_and_nothing_but_settings_is_in_it(tmp_path):
    (tmp_path / "test").mkdir()
    assert free_folder(tmp_path / "test", number=1) == tmp_path / "test"
    assert [path.name for path in (tmp_path / "test").iterdir()] == ["settings.json"]


def test_where_the_file_system_knows_no_links_the_folder_is_claimed_too(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr("os.link", link)
    names = [free_folder(tmp_path / "test", number=number).name for number in (1, 2, 1)]
    assert names == ["test", "test_2", "test"]
    assert json.loads((tmp_path / "test_2" / "settings.json").read_text()) == {"number": 2}


def claim_together(number, barrier, root, folders):
    for attempt in range(5):
        barrier.wait()
        folders.put((attempt, str(free_folder(root / str(attempt) / "test", number=number))))


def test_tests_that_start_at_the_same_moment_have_a_folder_each(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, folders = context.Barrier(3), context.Queue()
    workers = [context.Process(target=claim_together, args=(number, barrier, tmp_path, folders))
               for number in range(3)]
    for worker in workers:
        worker.start()
    claimed = {folders.get(timeout=30) for _ in range(15)}
    for worker in workers:
        worker.join()
    assert len(claimed) == 15
