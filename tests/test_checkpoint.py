"""Checkpoints: the old file or the whole new one, and refusals that name the file."""

import multiprocessing
import os
import pickle
import random
import resource
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
    checkpoint.save(tmp_path / "new" / "last.pt", content())
    return tmp_path / "new" / "last.pt"


def test_what_is_saved_is_loaded(path):
    assert tiny.equal(checkpoint.load(path, "GTR"), {"format": 1, **content()})
    assert names(path.parent) == ["last.pt"]


# Written whole or not at all.

def half(content, file):
    file.write(b"PK half of it")
    raise RuntimeError("unexpected pos 64 vs 0")  # how torch reports a failed write


def refused(path):
    with pytest.raises(OSError, match=r"last\.pt: cannot be written .*there before is intact.*again"):
        checkpoint.save(path, content(2.0))


def refused_on_a_full_disk(path):
    """A limit on the size of files stands in for the full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
    refused(path)


@pytest.mark.parametrize("full", [True, False])
def test_a_full_disk_or_a_failed_write_leaves_the_old_file(full, path, monkeypatch):
    if full:
        process = multiprocessing.get_context("fork").Process(target=refused_on_a_full_disk, args=(path,))
        process.start()
        process.join(60)
        assert process.exitcode == 0
    else:
        monkeypatch.setattr(torch, "save", half)
        refused(path)
    assert torch.equal(checkpoint.load(path)["model"]["weight"], torch.ones(2))
    assert names(path.parent) == ["last.pt"]


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


@pytest.mark.slow
def test_a_process_killed_while_it_saves_leaves_a_whole_file(path, processes):
    moments = random.Random(0)
    for _ in range(tiny.KILLS):
        process = processes.Process(target=save_again_and_again, args=(path,))
        process.start()
        process.join(moments.uniform(0, 0.5))
        process.kill()
        process.join()
        weight = checkpoint.load(path)["model"]["weight"]
        assert torch.equal(weight, weight[0].expand_as(weight))
    checkpoint.save(path, content())
    assert names(path.parent) == ["last.pt"]


# Refused by name.

@pytest.mark.parametrize("changes, stage, message", [
    ({}, "atfm", "a checkpoint of stage GTR, expected atfm; check --gtr"),
    ({"format": 0}, "GTR", r"checkpoint format 0, written by .*9\.0.*reads format 1"),
    ({"format": 99}, "GTR", r"checkpoint format 99, written by .*9\.0.*reads format 1"),
])
def test_another_stage_or_format_is_refused(changes, stage, message, path):
    torch.save({**content(), "format": 1, "versions": {"torch": "9.0"}, **changes}, path)
    with pytest.raises(ValueError, match=rf"last\.pt: {message}"):
        checkpoint.load(path, stage)


class RunsCode:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def flip_a_bit_of_a_weight(path):
    whole = bytearray(path.read_bytes())
    whole[whole.index(torch.ones(2).numpy().tobytes())] ^= 1
    path.write_bytes(whole)
    assert torch.load(path)["model"]["weight"][0] != 1  # torch itself does not notice


def unpack_to_more_than_its_size(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10**8))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("damage, reason", [
    *[(lambda path, kept=kept: path.write_bytes(path.read_bytes()[:kept]), "") for kept in (0, 1, 100, -1)],
    (lambda path: path.write_bytes(b"not a checkpoint"), ""),
    (lambda path: path.write_bytes(b"PK\x03\x04"), ""),
    (lambda path: path.write_bytes(pickle.dumps([1, 2])), ""),
    (flip_a_bit_of_a_weight, "data/0 in it does not match its checksum"),
    (unpack_to_more_than_its_size, "its parts claim more bytes than it has"),
    (lambda path: torch.save({**content(), "format": 1, "more": RunsCode(path.parent / "ran")}, path), ""),
    (lambda path: path.write_bytes(pickle.dumps(RunsCode(path.parent / "ran"))), ""),
])
def test_a_file_that_is_damaged_or_runs_code_is_refused(damage, reason, path):
    damage(path)
    with pytest.raises(ValueError, match=rf"last\.pt: not a readable checkpoint \(.*{reason}.*\); take"):
        checkpoint.load(path)
    assert names(path.parent) == ["last.pt"]  # no code ran


@pytest.mark.parametrize("written", [
    {"weight": torch.ones(2)}, torch.ones(2), [1, 2], {"format": 1},
    {**content(), "format": torch.ones(2)}, {**content(), "format": 1, "model": 3},
])
def test_tensors_that_are_no_checkpoint_are_refused(written, path):
    torch.save(written, path)
    with pytest.raises(ValueError, match=r"last\.pt: a file of tensors, but not .*--released_checkpoint"):
        checkpoint.load(path, "GTR")


@pytest.mark.parametrize("model", [
    nn.Linear(3, 3), nn.Linear(2, 2, bias=False), nn.Sequential(nn.Linear(2, 2)),
])
def test_weights_that_do_not_fit_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"best\.pt: its weights do not fit the model"):
        checkpoint.fill(model, {"model": nn.Linear(2, 2).state_dict()}, tmp_path / "best.pt")


def test_the_authors_weights_are_tensors_by_name_perhaps_below_state_dict(path):
    for weights in ({"w": torch.ones(2)}, {"state_dict": {"w": torch.ones(2)}}):
        torch.save(weights, path)
        assert tiny.equal(checkpoint.state_dict(path), {"w": torch.ones(2)})
    torch.save({"w": 3}, path)
    with pytest.raises(ValueError, match=r"last\.pt: expected a dict of tensors"):
        checkpoint.state_dict(path)


def test_a_fingerprint_changes_with_any_weight():
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    before = checkpoint.fingerprint(model)
    assert checkpoint.fingerprint(model) == before and len(before) == 16
    with torch.no_grad():
        model.bias[1] += 1e-6
    assert checkpoint.fingerprint(model) != before
    assert checkpoint.fingerprint(None) is None
