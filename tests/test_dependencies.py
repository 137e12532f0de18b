"""Imports go one way: scripts -> data, models, metrics, fig -> metadata_manager."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("data", "fig", "metrics", "models")
# Commands in a package: may import all, nothing imports them.
COMMANDS = {"fig.draw", "data.prepare", "data.export", "metrics.__main__"}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path
         for path in chain(ROOT.glob("*.py"), *((ROOT / name).glob("**/*.py") for name in PACKAGES))}
SCRIPTS = {name for name in FILES if "." not in name and name not in (*PACKAGES, "metadata_manager")}


def imported(source):
    """Names of ours that a module imports: `from models import gtr` is models.gtr."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in FILES else node.module for name in full}
    return {name for name in names if name.split(".")[0] in (*PACKAGES, *SCRIPTS, "metadata_manager")}


IMPORTS = {name: imported(path.read_text()) for name, path in FILES.items()}


def test_the_five_scripts_and_the_packages_are_seen():
    assert SCRIPTS == {
        "train_GTR", "train_prior_LIDC", "train_prior_ISIC", "test_prior_LIDC", "test_prior_ISIC"}
    assert {name for name in FILES if name in PACKAGES} == set(PACKAGES)
    assert IMPORTS["train_prior_LIDC"] >= {"data", "fig", "metrics", "models", "metadata_manager"}


@pytest.mark.parametrize("package, allowed", [
    ("metadata_manager", set()),
    ("metrics", {"metrics"}),
    ("data", {"data", "metrics.files", "metrics.program"}),
    ("models", {"models", "metrics.files", "metrics.program"}),
    ("fig", {"fig", "metrics", "data.images", "data.readers", "data.volumes"}),
])
def test_a_package_imports_itself_the_settings_and_what_is_below_it(package, allowed):
    for name in FILES:
        if name.split(".")[0] == package and name not in COMMANDS:
            for target in IMPORTS[name] - {"metadata_manager"}:
                assert target in allowed or target.split(".")[0] in allowed, f"{name} imports {target}"


def test_nothing_imports_a_script_or_a_command():
    for name in FILES:
        assert not IMPORTS[name] & (SCRIPTS | COMMANDS), name


def test_no_module_imports_itself_by_way_of_others():
    assert list(TopologicalSorter(IMPORTS).static_order())  # raises CycleError


@pytest.mark.parametrize("module", [
    "data.prepare_lidc", "data.prepare", "data.demo", "data.export", "fig.draw"])
def test_a_module_started_by_its_path_says_how_to_start_it(module, tmp_path):
    path = ROOT / f"{module.replace('.', '/')}.py"
    process = subprocess.run([sys.executable, path, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr == f"error: start it from the project's folder, as `python -m {module} ...`\n"


def test_help_does_not_wait_for_what_only_some_commands_need():
    """Each of these takes a second or two to import."""
    code = "import sys, data, fig, metrics, models; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
    assert not {"matplotlib", "torch._dynamo", "torch._inductor", "torchvision"} & set(loaded)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "TkAgg"])
def test_the_backend_of_a_notebook_stops_no_picture(backend, tmp_path):
    draw = f"fig.save(fig.case_sheet([(torch.ones(1, 9, 9), torch.ones(1, 9, 9))]), r'{tmp_path}/a.png')"
    environment = {**os.environ, "MPLBACKEND": backend}
    code = f"import fig, torch; {draw}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    assert (tmp_path / "a.png").exists()
