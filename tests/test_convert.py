"""An original is converted once, and again when it changes; whatever happens, no half store remains."""

import fcntl
import multiprocessing
import os
import random
import time

import numpy as np
import pytest

from data.convert import _places, converted, files_in
from data.store import open_store
from data.writer import Writer
from tests import tiny


def convert(files, writer):
    """One image per file, its brightness the file's content."""
    for file in files:
        image = np.full((4, 4), int(file.read_text()), np.uint8)
        writer.append(image, np.zeros((3, 4, 4)), patient=file.name, id=file.name)


@pytest.fixture
def original(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "data" / "original"
    folder.mkdir(parents=True)
    for i in range(3):
        (folder / f"{i}.txt").write_text(str(i))
    return folder


def brightness(original, reader=convert, files=None):
    """The content of an original's store; reader None: nothing may be converted."""
    store = converted(original, files or sorted(original.iterdir()), reader)
    return store.read(np.arange(len(store)))[0][:, 0, 0, 0].tolist()


def place_of(original):
    return original.with_name("original.atfm.h5")


def test_an_original_is_converted_once_and_again_when_it_changes(original, capsys):
    files = sorted(original.iterdir())
    assert brightness(original) == [0, 1, 2]
    assert f"converting once, into {place_of(original)}" in capsys.readouterr().out
    assert brightness(original, None) == [0, 1, 2] and capsys.readouterr().out == ""
    files[1].write_text("77")
    os.utime(files[1], ns=(time.time_ns(), time.time_ns() + 1))
    assert brightness(original) == [0, 77, 2]
    assert "its files changed" in capsys.readouterr().out
    assert brightness(original, convert, files[:2]) == [0, 77]
    assert sorted(os.listdir(original.parent)) == ["original", "original.atfm.h5"]


def test_where_a_folder_is_read_only_the_store_lies_in_the_home(original, tmp_path, monkeypatch, capsys):
    closed = [original.parent]

    class ReadOnly(Writer):
        def __init__(self, path, *rest, **flags):
            if path.parent in closed:
                raise PermissionError(f"{path}: read-only")
            super().__init__(path, *rest, **flags)

    monkeypatch.setattr("data.convert.Writer", ReadOnly)
    assert brightness(original) == [0, 1, 2]
    assert f"into {tmp_path / 'home' / 'atfm' / 'original-'}" in capsys.readouterr().out
    assert brightness(original, None) == [0, 1, 2]
    closed.append(tmp_path / "home" / "atfm")
    with pytest.raises(OSError, match="set XDG_CACHE_HOME"):
        brightness(original, convert, sorted(original.iterdir())[:1])


def test_a_damaged_store_is_made_again_and_a_failed_conversion_leaves_nothing(original, capsys):
    brightness(original)
    place_of(original).write_bytes(place_of(original).read_bytes()[:2000])
    assert brightness(original) == [0, 1, 2]
    assert "unusable" in capsys.readouterr().out
    place_of(original).unlink()
    (original / "3.txt").write_text("not a number")
    with pytest.raises(ValueError):
        brightness(original)
    assert os.listdir(original.parent) == ["original"]


def test_a_store_is_read_while_its_writer_still_holds_its_lock(original):
    brightness(original)
    with open(place_of(original), "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert brightness(original, None) == [0, 1, 2]


def test_what_systems_leave_in_folders_is_passed_over(tmp_path):
    for name in ("b.PNG", "a.png", "c.txt", "._a.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).touch()
    assert [path.name for path in files_in(tmp_path, ".png")] == ["a.png", "b.PNG"]
    assert [path.name for path in files_in(tmp_path)] == ["a.png", "b.PNG", "c.txt"]


def test_linked_folders_are_searched_once(tmp_path):
    (tmp_path / "elsewhere" / "inner").mkdir(parents=True)
    for name in ("a.DCM", "inner/b.dcm"):
        (tmp_path / "elsewhere" / name).touch()
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "inner" / "back").symlink_to(tmp_path / "scans")
    assert [path.name for path in files_in(tmp_path / "scans", ".dcm", deep=True)] == ["a.DCM", "b.dcm"]
    assert files_in(tmp_path / "scans", ".dcm") == []


def test_a_user_without_a_home_has_a_place_too(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does without HOME and passwd
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert _places(tmp_path)[1].parent == tmp_path / "atfm"


def in_child(function, *arguments):
    """A started process: what it crashes or hangs is its own."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def convert_slowly(files, writer):
    for i in range(1000):  # 8 MB
        writer.append(np.full((64, 64), i, np.uint16), np.zeros((3, 64, 64)), patient=i)


@pytest.mark.slow
def test_a_conversion_killed_at_random_moments_leaves_no_half_store(original):
    begin = time.perf_counter()
    brightness(original, convert_slowly)
    seconds, moments = time.perf_counter() - begin, random.Random(0)
    for _ in range(tiny.KILLS):
        place_of(original).unlink(missing_ok=True)
        process = in_child(brightness, original, convert_slowly)
        process.join(moments.uniform(0, seconds))
        process.kill()
        process.join()
        if place_of(original).exists():
            pixels = open_store(place_of(original)).read(np.arange(1000))[0]
            assert pixels[:, 0, 0, 0].tolist() == list(range(1000))
    assert brightness(original, convert_slowly) == list(range(1000))
    assert sorted(os.listdir(original.parent)) == ["original", "original.atfm.h5"]


def convert_together(original, barrier):
    def convert_and_wait(files, writer):
        convert(files, writer)
        barrier.wait(30)  # passes when both have found no store and written their rows

    assert brightness(original, convert_and_wait) == [0, 1, 2]


@pytest.mark.slow
def test_processes_that_convert_at_once_do_not_meet(original):
    barrier = multiprocessing.get_context("fork").Barrier(2)
    both = [in_child(convert_together, original, barrier) for _ in range(2)]
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert sorted(os.listdir(original.parent)) == ["original", "original.atfm.h5"]
    assert brightness(original, None) == [0, 1, 2]
