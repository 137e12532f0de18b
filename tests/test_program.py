"""The way into every command: paths, terminals, and one line for what a user can put right."""

import argparse
import getpass

import pytest

from metrics import program


def test_a_tilde_is_the_home_folder_and_none_without_a_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(program.path("~/x.h5")) == f"{tmp_path}/x.h5" and str(program.path("a~/~")) == "a~/~"

    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.expanduser", no_home)
    with pytest.raises(argparse.ArgumentTypeError, match="~/x.h5: Could not .*; write the folder"):
        program.path("~/x.h5")


def test_a_message_is_one_line_that_keeps_its_beginning_and_its_end():
    message = "error: --size 7:\n" + "word " * 200 + "choose 8"
    short = program.shortened(message)
    assert len(short) <= 390 and short.startswith("error: --size 7: word") and short.endswith("word choose 8")
    assert " ... " in short and program.shortened("error: a\n b") == "error: a b"
    with pytest.raises(SystemExit, match="^error: --size 7: .* choose 8$") as end, program.one_line_errors():
        raise ValueError(message.removeprefix("error: "))
    assert len(str(end.value)) <= 390


def test_a_long_reason_of_missing_memory_is_cut():
    with pytest.raises(SystemExit) as end, program.one_line_errors("--size"):
        raise MemoryError("Unable to allocate\n" + "x" * 1000)
    assert len(str(end.value)) < 200 and "\n" not in str(end.value)


def test_a_user_without_an_entry_in_passwd_has_a_name(monkeypatch):
    def unknown(_):
        raise KeyError("uid not found")

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    program.name_user()
    assert getpass.getuser().startswith("user")
    monkeypatch.delenv("LOGNAME")
