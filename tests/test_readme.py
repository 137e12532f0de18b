"""README and docs keep their word: their commands are accepted, the names, files and links in them exist."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

from models.sources import SOURCES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
         ROOT / "tests" / "benchmarks" / "README.md"]
TEXTS = "".join(path.read_text() for path in PAGES)
DOCUMENTS = TEXTS + "".join(path.read_text() for path in sorted(ROOT.glob("*_*.py")))  # scripts' docstrings
COMMAND = re.compile(r"(?:python|torchrun --nproc_per_node=\d+) "
                     r"(?:-m ((?:fig|data|tests)(?:\.\w+)+\b(?!\.)|metrics\b)|(\w+)\.py)((?: [^\n`&;#<]+)?)")
COMMANDS = sorted(set(COMMAND.findall(re.sub(r"\\\n *", "", DOCUMENTS))))
USERS_FILE = "mine.h5"  # in commands, a file that data.prepare made


class Accepted(Exception):
    """The flags were parsed."""


def test_readme_is_read_in_minutes_and_has_commands():
    assert len(README.split()) <= 1200
    assert {script for _, script, _ in COMMANDS} > {path.stem for path in ROOT.glob("*_*_*.py")}


@pytest.mark.parametrize("module, script, flags", COMMANDS)
def test_a_command_is_accepted(module, script, flags, monkeypatch):
    parse_args = argparse.ArgumentParser.parse_args

    def accepted(*arguments):
        parse_args(*arguments)  # exits on a wrong flag
        raise Accepted

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", accepted)
    monkeypatch.setitem(SOURCES, "soft", SOURCES["gtr"])  # which README's example adds
    monkeypatch.setattr("sys.argv", ["", *[str(ROOT / "data" / "LIDC_demo.h5") if word == USERS_FILE else word
                                           for word in shlex.split(flags)]])
    with pytest.raises(Accepted):
        importlib.import_module({"metrics": "metrics.__main__"}.get(module, module) or script).main()


def test_run_sh_has_the_commands_that_are_named():
    wanted = set(re.findall(r"bash run\.sh (\w+)", TEXTS))
    assert wanted <= set(re.findall(r"^    (\w+)\)", (ROOT / "run.sh").read_text(), re.M))


def named(pattern):
    """What the pages name that matches, each once."""
    return sorted(set(re.findall(pattern, TEXTS)))


@pytest.mark.parametrize("name", named(
    r"`((?:models|metrics|data|fig|metadata_manager)\.(?!(?:py|h5)\b)[\w.]+)"))
def test_a_name_of_the_code_exists(name):
    assert resolve(name) is not None


def resolve(name):
    """The module, class or function of a dotted name."""
    if (ROOT / (name.replace(".", "/") + ".py")).exists() or (ROOT / name.replace(".", "/")).is_dir():
        return importlib.import_module(name)
    parent, _, last = name.rpartition(".")
    return getattr(resolve(parent), last)


@pytest.mark.parametrize("path", named(r"(?<![\w/.])((?:(?:fig|data|models|metrics|tests|docs)/[\w/]+\.\w+)"
                                       r"|\w+\.(?:py|txt|cff|sh)|LICENSE)\b"))
def test_a_file_that_is_named_exists(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("page, link", [
    pytest.param(page, link, id=f"{page.relative_to(ROOT)}: {link}")
    for page in PAGES for link in sorted(set(re.findall(r"\]\((?!\w+:)([^)#\s]+)", page.read_text())))])
def test_a_link_leads_to_a_file(page, link):
    assert (page.parent / link).exists()
