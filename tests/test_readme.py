"""README keeps its word: its commands are accepted, the names and files it mentions exist."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = "".join(path.read_text() for path in (
    *sorted(ROOT.glob("*.md")), ROOT / "tests" / "benchmarks" / "README.md",
    *sorted(ROOT.glob("*_*.py"))))  # scripts' docstrings
COMMAND = re.compile(r"(?:python|torchrun --nproc_per_node=\d+) "
                     r"(?:-m ((?:fig|data|tests)(?:\.\w+)+\b(?!\.))|(\w+)\.py)((?: [^\n`&;#<]+)?)")
COMMANDS = sorted(set(COMMAND.findall(DOCUMENTS.replace("\\\n", " "))))


class Accepted(Exception):
    """The flags were parsed."""


def test_it_is_read_in_five_minutes_and_has_commands():
    assert len(README.splitlines()) <= 180
    assert {script for _, script, _ in COMMANDS} > {path.stem for path in ROOT.glob("*_*_*.py")}


@pytest.mark.parametrize("module, script, flags", COMMANDS)
def test_a_command_is_accepted(module, script, flags, monkeypatch):
    parse_args = argparse.ArgumentParser.parse_args

    def accepted(*arguments):
        parse_args(*arguments)  # exits on a wrong flag
        raise Accepted

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", accepted)
    monkeypatch.setattr("sys.argv", ["", *shlex.split(flags)])
    with pytest.raises(Accepted):
        importlib.import_module(module or script).main()


def named(pattern):
    """What README names that matches, each once."""
    return sorted(set(re.findall(pattern, README)))


@pytest.mark.parametrize("name", named(r"`((?:models|metrics|data|fig|metadata_manager)\.(?!py\b)[\w.]+)"))
def test_a_name_of_the_code_exists(name):
    assert resolve(name) is not None


def resolve(name):
    """The module, class or function of a dotted name."""
    if (ROOT / (name.replace(".", "/") + ".py")).exists() or (ROOT / name.replace(".", "/")).is_dir():
        return importlib.import_module(name)
    parent, _, last = name.rpartition(".")
    return getattr(resolve(parent), last)


@pytest.mark.parametrize("path", named(r"(?<![\w/.])((?:(?:fig|data|models|metrics|tests)/[\w/]+\.\w+)"
                                       r"|\w+\.(?:py|txt|cff)|LICENSE)\b"))
def test_a_file_that_is_named_exists(path):
    assert (ROOT / path).exists()
