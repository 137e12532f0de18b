"""README keeps its word: its commands parse, the names and files it mentions exist."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

from metadata_manager import EvaluationConfig, FlowConfig, GTRConfig, LoopConfig, Metadata, RunConfig, parse

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
KINDS = {"train_GTR.py": (GTRConfig, LoopConfig), "train_prior": (FlowConfig, LoopConfig),
         "test_prior": (EvaluationConfig,)}


def commands():
    """Every command of README's bash blocks, split at && and ;."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    inline = re.findall(r"`((?:python|torchrun) [^`<]*\.py[^`<]*)`", README)
    lines = ["".join(blocks), *inline]
    lines = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in re.split(r"&&|;", line.split(" #")[0]) if part.strip()]


def test_it_is_read_in_five_minutes():
    assert len(README.splitlines()) <= 180


def test_there_are_commands():
    assert sum("train_GTR.py" in command for command in commands()) >= 3


@pytest.mark.parametrize("command", [c for c in commands() if re.search(r"(train|test)_\w+\.py", c)])
def test_a_script_takes_its_flags(command):
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if re.fullmatch(r"(train|test)_\w+\.py", word))
    script, flags = words[at], words[at + 1:]
    assert (ROOT / script).exists()
    kinds = next(kinds for name, kinds in KINDS.items() if script.startswith(name))
    what = "isic3_style_concat" if script.endswith("_ISIC.py") else "LIDC"
    parse(flags, what, "", RunConfig, Metadata, *kinds)  # exits on a wrong flag


class Parsed(Exception):
    """Flags were accepted."""


MODULE = re.compile(r"python -m ((?:fig|data|tests)[\w.]*)")


@pytest.mark.parametrize("command", [command for command in commands() if MODULE.match(command)])
def test_a_module_takes_its_flags(command, monkeypatch):
    parse_args = argparse.ArgumentParser.parse_args

    def accepted(*arguments):
        parse_args(*arguments)  # exits on a wrong flag
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", accepted)
    monkeypatch.setattr("sys.argv", shlex.split(command)[2:])
    with pytest.raises(Parsed):
        importlib.import_module(MODULE.match(command)[1]).main()


def named(pattern):
    """What README names that matches, each once."""
    return sorted(set(re.findall(pattern, README)))


@pytest.mark.parametrize("name", named(r"`((?:models|metrics|data|metadata_manager)\.[\w.]+)`"))
def test_a_name_of_the_code_exists(name):
    if name.endswith(".py"):
        return
    assert resolve(name) is not None


def resolve(name):
    """The module, class or function of a dotted name."""
    if (ROOT / (name.replace(".", "/") + ".py")).exists() or (ROOT / name.replace(".", "/")).is_dir():
        return importlib.import_module(name)
    parent, _, last = name.rpartition(".")
    return getattr(resolve(parent), last)


@pytest.mark.parametrize("path", named(r"(?:\(|`)((?:fig|data|models|metrics|tests)/[\w/]+\.\w+)"))
def test_a_file_that_is_named_exists(path):
    assert (ROOT / path).exists()
