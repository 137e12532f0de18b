"""Checkpoints: the old file or the whole new one, and refusals that name the file."""

import errno
import multiprocessing
import os
import pickle
import random
import zipfile
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import nn

from models import checkpoint
from tests import tiny


def content(value=1.0):
    return {"stage": "GTR", "config": {"rank": 10, "num_filters": (4, 8)},
            "model": {"weight": torch.full((2,), value)}}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def path(tmp_path):
    checkpoint.save(tmp_path / "last.pt", content())
    return tmp_path / "last.pt"


def test_what_is_saved_is_loaded(path):
    found = checkpoint.load(path, "GTR")
    assert torch.equal(found.pop("model")["weight"], torch.ones(2))
    assert found == {"format": 1, "stage": "GTR", "config": {"rank": 10, "num_filters": (4, 8)}}
    assert names(path.parent) == ["last.pt"]


def assert_old_file_stays(path):
    message = r"last\.pt: could not write the checkpoint.*previous one is intact.*again"
    with pytest.raises(OSError, match=message):
        checkpoint.save(path, content(2.0))
    assert torch.equal(checkpoint.load(path)["model"]["weight"], torch.ones(2))
    assert names(path.parent) == ["last.pt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, a disk that is always full")
def test_a_full_disk_leaves_the_old_file(path):
    (path.parent / "last.pt.writing").symlink_to("/dev/full")
    assert_old_file_stays(path)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_on_the_way_to_the_disk_leaves_the_old_file(step, path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, step, fail)
    assert_old_file_stays(path)


def test_a_write_that_fails_halfway_leaves_the_old_file(path, monkeypatch):
    def half(content, file):
        file.write(b"PK half of it")
        raise RuntimeError("unexpected pos 64 vs 0")  # how torch reports a failed write

    monkeypatch.setattr(torch, "save", half)
    assert_old_file_stays(path)


def test_the_new_file_is_on_the_disk_before_it_takes_the_name(path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: calls.append("fsync") or fsync(number))
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("replace") or replace(*names))
    checkpoint.save(path, content(2.0))
    assert calls == ["fsync", "replace"]


def save_again_and_again(path):
    for number in count():
        checkpoint.save(path, {**content(), "model": {"weight": torch.full((10**6,), float(number))}})


def test_a_process_killed_while_it_saves_leaves_a_whole_file(path):
    moments = random.Random(0)
    for _ in range(tiny.KILLS):
        process = multiprocessing.get_context("fork").Process(target=save_again_and_again, args=(path,))
        process.start()
        process.join(moments.uniform(0, 0.3))
        process.kill()
        process.join()
        weight = checkpoint.load(path)["model"]["weight"]
        assert torch.equal(weight, weight[0].expand_as(weight))
    checkpoint.save(path, content())
    assert names(path.parent) == ["last.pt"]


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"best\.pt: no such checkpoint; train that stage first"):
        checkpoint.load(tmp_path / "best.pt")


def test_another_stage_is_refused(path):
    message = r"last\.pt: a checkpoint of stage GTR, expected atfm; check --gtr, --prior"
    with pytest.raises(ValueError, match=message):
        checkpoint.load(path, "atfm")


@pytest.mark.parametrize("number", [0, 99])
def test_another_format_is_refused_by_the_versions_that_wrote_it(number, path):
    torch.save({**content(), "format": number, "versions": {"torch": "9.0"}}, path)
    message = rf"last\.pt: checkpoint format {number}, written by .*9\.0.*reads format 1"
    with pytest.raises(ValueError, match=message):
        checkpoint.load(path)


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_a_truncated_file_is_refused(kept, path):
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"last\.pt: not a readable checkpoint"):
        checkpoint.load(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("found", [b"not a checkpoint", b"PK\x03\x04", pickle.dumps([1, 2])])
def test_something_else_is_refused(found, path):
    path.write_bytes(found)
    with pytest.raises(ValueError, match=r"last\.pt: "):
        checkpoint.load(path)


def test_a_flipped_bit_in_a_weight_is_refused(path):
    whole = bytearray(path.read_bytes())
    whole[whole.index(torch.ones(2).numpy().tobytes())] ^= 1
    path.write_bytes(whole)
    assert torch.load(path)["model"]["weight"][0] != 1  # torch itself does not notice
    with pytest.raises(ValueError, match=r"last\.pt: not a readable .*data/0 in it does not match its check"):
        checkpoint.load(path)


def test_a_file_that_unpacks_to_more_than_its_size_is_refused(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10**8))
    with pytest.raises(ValueError, match=r"last\.pt: .*claim more bytes than it has"):
        checkpoint.load(path)


@pytest.mark.parametrize("found", [
    {"weight": torch.ones(2)}, torch.ones(2), [1, 2], {"format": 1},
    {**content(), "format": torch.ones(2)}, {**content(), "format": 1, "model": 3},
])
def test_tensors_that_are_no_checkpoint_are_refused(found, path):
    torch.save(found, path)
    message = r"last\.pt: a file of tensors, but not a checkpoint of this project"
    with pytest.raises(ValueError, match=message):
        checkpoint.load(path, "GTR")


class RunsCode:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda what, path: path.write_bytes(pickle.dumps(what))])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(write, path):
    write({**content(), "format": 1, "more": RunsCode(path.parent / "ran")}, path)
    with pytest.raises(ValueError, match=r"last\.pt: not a readable checkpoint"):
        checkpoint.load(path)
    assert names(path.parent) == ["last.pt"]


@pytest.mark.parametrize("model", [
    nn.Linear(3, 3), nn.Linear(2, 2, bias=False), nn.Sequential(nn.Linear(2, 2)),
])
def test_weights_that_do_not_fit_are_refused(model, tmp_path):
    saved = {"model": nn.Linear(2, 2).state_dict()}
    with pytest.raises(ValueError, match=r"best\.pt: its weights do not fit the model"):
        checkpoint.fill(model, saved, tmp_path / "best.pt")


def test_a_folder_means_its_best_checkpoint(tmp_path):
    assert checkpoint.find(tmp_path) == tmp_path / "best.pt"
    assert checkpoint.find(str(tmp_path / "epoch_0050.pt")) == tmp_path / "epoch_0050.pt"
