"""Several processes do together what one does alone: the same training up to rounding, the same scores."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from metrics import Evaluation, interleaved
from models import ATFM, GTR, STNet, checkpoint
from models.flow import one_expert
from models.parallel import Part, Processes, whole
from models.stages import train_gtr, train_prior
from models.testing import test_prior as run_test
from tests import tiny

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("b, count, expected", [
    (4, 2, [(0, 2, 0.5), (2, 4, 0.5)]),
    (5, 2, [(0, 2, 0.4), (2, 5, 0.6)]),
    (1, 2, [(0, 1, 0.0), (0, 1, 1.0)]),  # none left for the first process: it computes at weight 0
])
def test_parts_cover_a_batch(b, count, expected):
    parts = [Processes(rank, count).part(b) for rank in range(count)]
    assert [(part.rows.start, part.rows.stop, part.weight) for part in parts] == expected


@pytest.mark.parametrize("source, experts, dropout", [("gtr", "all", 0.0), ("normal", "one", 0.5)])
def test_losses_of_the_parts_add_up_to_those_of_the_batch(source, experts, dropout):
    torch.manual_seed(0)
    atfm = ATFM(GTR(1, (4, 8), rank=2), STNet(8, (1,)), source=source, experts=experts,
                condition_dropout=dropout)
    image, masks = torch.rand(5, 1, 8, 8), (torch.rand(5, 3, 8, 8) < 0.5).float()

    def loss_of(part):
        torch.manual_seed(1)
        return part.weight * sum(piece["loss"].item() for piece in atfm.losses(image, masks, part))

    parts = [Part(5, slice(0, 2), 2 / 5), Part(5, slice(2, 5), 3 / 5)]
    assert sum(map(loss_of, parts)) == pytest.approx(loss_of(whole(5)), rel=1e-5)


def test_the_parts_of_a_batch_see_the_experts_that_one_process_draws():
    masks = torch.arange(24.0).view(4, 6, 1, 1)
    torch.manual_seed(0)
    alone = one_expert(masks)
    together = []
    for rows in (slice(0, 1), slice(1, 4)):
        torch.manual_seed(0)
        together.append(one_expert(masks[rows], Part(4, rows)))
    assert torch.equal(torch.cat(together), alone)


def test_evaluations_of_every_third_image_interleave():
    parts = [Evaluation(("a", "d"), (0,), {"GED16": torch.tensor([[1.0, 4.0]]).numpy()}),
             Evaluation(("b",), (0,), {"GED16": torch.tensor([[2.0]]).numpy()}),
             Evaluation(("c",), (0,), {"GED16": torch.tensor([[3.0]]).numpy()})]
    found = interleaved(parts)
    assert found.ids == ("a", "b", "c", "d")
    assert found.scores["GED16"].tolist() == [[1.0, 2.0, 3.0, 4.0]]


def torchrun(script, *flags):
    """Starts a script as two processes of one thread."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / script)]
    return subprocess.Popen([*command, *flags], env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process, code=0):
    """What it printed, once it ended with `code`."""
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    return printed, errors


@pytest.fixture(scope="module")
def runs(lidc, tmp_path_factory):
    """Folder of a run by one process, folder of the same run by two, and what each test printed."""
    alone, together = (tmp_path_factory.mktemp(name) for name in ("alone", "together"))
    stages = (("train_GTR.py", train_gtr, [*tiny.GTR, "--epochs", "2", "--batchsize", "5"]),
              ("train_prior_LIDC.py", train_prior, [*tiny.PRIOR, "--num_epochs", "2", "--batch_size", "5"]),
              ("test_prior_LIDC.py", run_test, [*tiny.TEST, "--limit", "5", "--steps", "2"]))
    for script, stage, flags in stages[:2]:
        stage("LIDC", [*flags, "--data_path", str(lidc), "--output_path", str(alone)])
        finish(torchrun(script, *flags, "--data_path", str(lidc), "--output_path", str(together)))
    script, stage, flags = stages[2]
    stage("LIDC", [*flags, "--data_path", str(lidc), "--output_path", str(alone)])
    printed, _ = finish(torchrun(script, *flags, "--data_path", str(lidc), "--output_path", str(together),
                                 "--gtr", str(alone / "GTR"), "--prior", str(alone / "atfm")))
    return alone, together, printed


@pytest.mark.parametrize("stage", ["GTR", "atfm"])
def test_two_processes_train_as_one_does(stage, runs):
    alone, together = (checkpoint.load(folder / stage / "last.pt") for folder in runs[:2])
    assert together["state"]["step"] == alone["state"]["step"] == 4
    if stage == "GTR":  # the flows start from GTRs that differ by rounding, and so may stray further
        for name, weight in alone["model"].items():
            torch.testing.assert_close(together["model"][name], weight, rtol=1e-3, atol=1e-5)
    assert together["state"]["best"] == pytest.approx(alone["state"]["best"], abs=0.02)


def test_one_process_speaks_and_writes(runs):
    log = (runs[1] / "GTR" / "log.txt").read_text().splitlines()
    assert [line.split(":")[2][3:] for line in log] == ["epoch 1/2", "epoch 2/2", "epoch 2 validation"]
    assert len(list((runs[1] / "GTR").glob("events.*"))) == 1
    assert runs[2].count("| system |") == 1


def test_two_processes_score_as_one_does(runs):
    alone, together = (json.loads((folder / "test" / "results.json").read_text()) for folder in runs[:2])
    for label, system in alone["systems"].items():
        assert together["systems"][label]["ids"] == system["ids"]
        assert together["systems"][label]["scores"] == system["scores"]


def test_a_mistake_ends_all_processes_with_its_error(tmp_path):
    _, errors = finish(torchrun("train_GTR.py", "--data_path", str(tmp_path / "nothing.h5")), code=1)
    assert "error: LIDC: data_path" in errors


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the workers in /proc")
def test_a_worker_that_dies_ends_the_run(lidc, tmp_path):
    run = torchrun("train_GTR.py", *tiny.GTR, "--epochs", "100000", "--data_path", str(lidc),
                   "--output_path", str(tmp_path))
    wait_for(tmp_path / "GTR" / "log.txt")
    os.kill(workers(run)[1], signal.SIGKILL)
    _, errors = finish(run, code=1)
    assert "SIGKILL" in errors


def wait_for(path):
    deadline = time.monotonic() + 100
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.1)


def workers(run):
    """Process numbers of torchrun's workers, by rank."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and f"\nPPid:\t{run.pid}\n" in (folder / "status").read_text():
            lines = (folder / "environ").read_text().split("\0")
            variables = dict(line.split("=", 1) for line in lines if "=" in line)
            if "RANK" in variables:
                found[int(variables["RANK"])] = int(folder.name)
    return found
