"""Imports go one way: scripts -> models.stages -> data, models, metrics, fig -> metadata_manager."""

import ast
from graphlib import TopologicalSorter
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("data", "fig", "metrics", "models")
CALLED = {"models.stages", "models.testing"}  # by scripts
TOP = CALLED | {"models.own_images", "models.result_curves"}  # put data, models, metrics and fig together
COMMANDS = {"fig.draw"}  # a command in a package: may import all, nothing imports it


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path
         for path in chain(ROOT.glob("*.py"), *((ROOT / name).glob("**/*.py") for name in PACKAGES))}
SCRIPTS = {name for name in FILES if "." not in name and name not in (*PACKAGES, "metadata_manager")}


class WithoutHints(ast.NodeTransformer):
    """Drops what stands under `if TYPE_CHECKING:`, which does not run."""

    def visit_If(self, node):
        hints = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        return None if hints else self.generic_visit(node)


def imported(source):
    """Names of ours that a module imports, but for type hints: `from models import gtr` is models.gtr."""
    found = set()
    for node in ast.walk(WithoutHints().visit(ast.parse(source))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in full}
    return {name for name in found if name.split(".")[0] in (*PACKAGES, *SCRIPTS, "metadata_manager")}


IMPORTS = {name: imported(path.read_text()) for name, path in FILES.items()}


def packages(name):
    return {target.split(".")[0] for target in IMPORTS[name]}


def test_the_five_scripts_and_the_packages_are_seen():
    assert SCRIPTS == {
        "train_GTR", "train_prior_LIDC", "train_prior_ISIC", "test_prior_LIDC", "test_prior_ISIC"}
    assert {name for name in FILES if name in PACKAGES} == set(PACKAGES)
    assert IMPORTS["models.stages"] >= {"data", "fig", "metrics", "models.systems"}


def test_imports_are_found_in_every_form():
    source = """
import os
import data.lidc as d
from models import stages, ATFM
def later():
    from metrics.overlap import Overlaps
if TYPE_CHECKING:
    import fig
"""
    assert imported(source) == {"data.lidc", "models.stages", "models", "metrics.overlap"}


def test_settings_import_nothing_of_ours():
    assert IMPORTS["metadata_manager"] == set()


@pytest.mark.parametrize("package", ["data", "fig", "metrics"])
def test_a_package_imports_itself_and_settings_only(package):
    allowed = {package} if package == "metrics" else {package, "metadata_manager"}
    for name in FILES:
        if name.split(".")[0] == package and name not in COMMANDS:
            assert packages(name) <= allowed, name


def test_only_what_scripts_call_puts_the_packages_together():
    for name in FILES:
        if name.split(".")[0] == "models" and name not in TOP:
            assert packages(name) <= {"models", "metadata_manager"}, name
            assert not IMPORTS[name] & TOP, name
    assert not IMPORTS["models.stages"] & TOP


def test_scripts_import_one_function_and_nothing_imports_a_script():
    for script in SCRIPTS:
        assert len(IMPORTS[script]) == 1 and IMPORTS[script] <= CALLED, script
    for name in FILES:
        assert not IMPORTS[name] & (SCRIPTS | COMMANDS), name


def test_no_module_imports_itself_by_way_of_others():
    assert list(TopologicalSorter(IMPORTS).static_order())  # raises CycleError
