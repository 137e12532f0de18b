"""What a reader needs to trust or repeat a test: the commit, and how each system was trained."""

import shutil
import subprocess

import pytest

from metrics import commit, training_section

GIT = shutil.which("git")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of one file of this project, which stands for it."""
    if GIT is None:
        pytest.skip("needs git")
    (tmp_path / "metadata_manager.py").write_text("PATHS = {}\n")
    for command in (["init", "-q"], ["add", "metadata_manager.py"],
                    ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "a"]):
        subprocess.run([GIT, *command], cwd=tmp_path, check=True)
    monkeypatch.setattr("metrics.provenance.ROOT", tmp_path)
    return tmp_path


def test_the_commit_is_git_s_and_says_whether_files_were_changed(repository, monkeypatch):
    head = subprocess.run([GIT, "rev-parse", "HEAD"], cwd=repository, capture_output=True,
                          text=True).stdout.strip()
    assert commit() == head and len(head) >= 40
    (repository / "runs").mkdir()
    (repository / "runs" / "results.json").write_text("{}")  # not of the project
    assert commit() == head
    (repository / "metadata_manager.py").write_text("PATHS = {1: 2}\n")
    assert commit() == f"{head}-dirty"
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as in a hook
    assert commit() == f"{head}-dirty"


def test_outside_a_repository_or_without_git_there_is_no_commit(repository, tmp_path, monkeypatch):
    copy = tmp_path / "copied"  # into another project's repository
    copy.mkdir()
    shutil.copy(repository / "metadata_manager.py", copy)
    monkeypatch.setattr("metrics.provenance.ROOT", copy)
    assert commit() is None
    monkeypatch.setattr("metrics.provenance.ROOT", repository)
    monkeypatch.setenv("PATH", str(copy))
    assert commit() is None


def test_the_whole_training_of_each_system_stands_in_one_table_per_stage():
    gtr = {"epochs": 15, "num_filters": (16, 32)}
    training = {"act-gtr": {"GTR": gtr}, "atfm": {"GTR": gtr, "flow": {"lr": 1e-4, "clip": 0.0}},
                "atfm (best)": {"GTR": {**gtr, "ema": 0.99}, "flow": {"lr": 1e-3, "clip": 0.0}}}
    systems = {label: {"training": stages} for label, stages in training.items()}
    assert training_section({"systems": systems, "commit": "abc-dirty"}) == """
## Training

Tested at commit abc-dirty.

| GTR | act-gtr; atfm | atfm (best) |
|---|---|---|
| epochs | 15 | 15 |
| num_filters | 16 32 | 16 32 |
| ema | - | 0.99 |

| flow | atfm | atfm (best) |
|---|---|---|
| lr | 0.0001 | 0.001 |
| clip | 0.0 | 0.0 |
"""
    assert "commit unknown (not in a git repository)." in training_section({"systems": {}, "commit": None})
