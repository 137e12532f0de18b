"""What a script needs of its process: errors, device, seeds, lock; and two processes that train as one."""

import fcntl
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import test_prior_LIDC
import train_GTR
from data import Loader, load
from metadata_manager import LoopConfig, Metadata, OptimizerConfig, RunConfig
from metrics.program import one_line_errors
from models import Validation, checkpoint, train_loop
from models.processes import (
    FLOW_MEMORY,
    NonFiniteLoss,
    Processes,
    device_of,
    join,
    lock,
    seed_step,
)
from tests import tiny

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("error, message", [
    (ValueError("--crop 0"), "error: --crop 0"),
    (FileNotFoundError("best.pt: none"), "error: best.pt: none"),
    (NonFiniteLoss("step 3"), "error: step 3"),
    (torch.cuda.OutOfMemoryError("tried 2 GiB\nmore"),
     f"error: out of GPU memory. What helps: {FLOW_MEMORY}. (tried 2 GiB)"),
    *((RuntimeError(text), f"error: out of GPU memory. What helps: {FLOW_MEMORY}. ({text.splitlines()[0]})")
      for text in ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
                   "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
                   "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
                   "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")),
])
def test_a_user_s_mistake_and_a_gpu_without_memory_end_in_one_line(error, message):
    with pytest.raises(SystemExit) as end, one_line_errors(FLOW_MEMORY):
        raise error
    assert end.value.code == message  # which Python prints, with exit code 1


@pytest.mark.slow
def test_compile_without_a_compiler_ends_in_one_line(monkeypatch):
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/not/there/g++",))
    compiled = torch.compile(lambda x: x.sin() + x.exp())
    with pytest.raises(SystemExit) as end, one_line_errors():
        compiled(torch.rand(3))
    assert "error: --compile True: torch.compile needs a C++ compiler" in end.value.code
    assert "/not/there/g++" in end.value.code and "\n" not in end.value.code and len(end.value.code) < 400


@pytest.mark.parametrize("text", [
    "TritonMissing: Cannot find a working triton installation. Either the package is not installed or too "
    "old.",
    "RuntimeError: Failed to find C compiler. Please specify via CC environment variable.\nmore",
    "Found a card which is too old to be supported by the triton GPU compiler"])
def test_compile_without_triton_ends_in_one_line(text):
    with (pytest.raises(SystemExit, match="^error: --compile True: .*leave --compile out") as end,
          one_line_errors()):
        raise RuntimeError(f"backend='inductor' raised:\n{text}")
    assert text.splitlines()[0] in end.value.code and "\n" not in end.value.code


def test_our_own_mistakes_keep_their_traceback():
    for error in (KeyError, RuntimeError):
        with pytest.raises(error), one_line_errors():
            raise error


@pytest.mark.parametrize("allocate", [
    lambda: torch.empty(2**50), lambda: np.empty(2**50), lambda: [0] * 2**50])
def test_a_cpu_without_memory_ends_in_one_line(allocate):
    with pytest.raises(SystemExit, match="^error: out of memory. What helps: --mc_samples. \\(.+\\)$"):
        with one_line_errors("--mc_samples"):
            allocate()


def test_output_that_only_takes_ascii_gets_escapes(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    with one_line_errors():
        print("l\u00e9sion.png")
    out.flush()
    assert out.buffer.getvalue() == b"l\\xe9sion.png\n"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/GTR: cannot be written .*; use another --output_path"):
        with lock(tmp_path / "file" / "GTR", Processes(torch.device("cpu"))):
            pass


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_for_convolutions_only(tf32):
    torch.backends.cuda.matmul.allow_tf32 = True
    with join(RunConfig(device="cpu", tf32=tf32)):
        assert torch.backends.cudnn.allow_tf32 == tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_an_unavailable_device_is_named(monkeypatch):
    with pytest.raises(ValueError, match="--device cuda:99: not available.*auto or cpu"):
        device_of("cuda:99")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto") == device_of("cpu") == torch.device("cpu")


def test_every_step_of_every_seed_in_every_process_draws_other_numbers():
    def draw(seed, step, rank):
        seed_step(seed, step, rank)
        return float(torch.rand((), dtype=torch.float64))

    places = [(seed, step, rank) for seed in (-1, 0, 1, 2**32) for step in range(-1, 5) for rank in range(3)]
    assert len({draw(*place) for place in places}) == len(places)
    assert draw(1, 3, 0) == draw(1, 3, 0)


def test_a_folder_that_cannot_be_locked_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def unsupported(*arguments):
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with lock(tmp_path / "new", Processes(torch.device("cpu"))):
        assert "new cannot be locked (no locks available)" in capsys.readouterr().out


@pytest.mark.parametrize("bucket, expected", [(0, 4), (16, 3), (1000, 1)])  # bytes: 12, 4, 48, 4
def test_a_sum_over_processes_is_exchanged_in_buckets(bucket, expected, monkeypatch):
    exchanges = []
    monkeypatch.setattr("models.processes.BUCKET", bucket)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda flat: exchanges.append(flat.mul_(2)))
    tensors = [torch.rand(shape) for shape in ((3,), (), (3, 4), ())]
    before = [tensor.clone() for tensor in tensors]
    Processes(torch.device("cpu"), count=2).sum(tensors)
    assert all(torch.equal(now, 2 * then) for now, then in zip(tensors, before))
    assert len(exchanges) == expected
    Processes(torch.device("cpu")).sum(tensors)  # of one: nothing to do
    assert len(exchanges) == expected


# Two processes. Each computes every second image of a batch, or of a single image every second annotator.

def deterministic(folder, lidc, own_weights=False):
    """Trains a convolution without noise by the processes of this run, all from the same weights or not."""
    train = load(Metadata(data_path=str(lidc), crop=8, limit=5), "train")
    with join(RunConfig(device="cpu")) as processes:
        torch.manual_seed(own_weights * processes.rank)
        net = nn.Conv2d(1, 1, 3, padding=1)
        train_loop(net, lambda done, image, masks: [{"loss": (net(image) - masks).square().mean()}],
                   torch.optim.SGD(net.parameters(), 0.1),
                   Loader(train, 4, 0, rank=processes.rank, ranks=processes.count),
                   lambda _: Validation({"GED": 0.0}, np.zeros((2, 2, 3), np.uint8)), folder=Path(folder),
                   about={"stage": "GTR", "config": {}}, epochs=2, config=LoopConfig(), seed=0,
                   optimization=OptimizerConfig(lr=0.1), processes=processes)


def interrupted(step, argv):
    """train_GTR, whose second process receives a signal in a step."""

    class Interrupting(Loader):
        def __call__(self, now):
            if now == step and self.rank == 1:
                signal.raise_signal(signal.SIGTERM)
            return super().__call__(now)

    train_GTR.Loader = Interrupting
    train_GTR.main(argv)


def as_rank(rank, port, function, arguments):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    function(*arguments)


@pytest.fixture
def two(processes):
    """Calls a function in two processes at once; returns their exit codes."""

    def call(function, *arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pair = [processes.Process(target=as_rank, args=(rank, port, function, arguments)) for rank in (0, 1)]
        for process in pair:
            process.start()
        for process in pair:
            process.join(300)
            process.kill()
        return [process.exitcode for process in pair]

    return call


@pytest.mark.slow
def test_two_processes_train_as_one_does_up_to_rounding(lidc, two, tmp_path):
    deterministic(tmp_path / "one", lidc)
    assert two(deterministic, tmp_path / "two", lidc) == [0, 0]
    single, both = (checkpoint.load(tmp_path / name / "last.pt") for name in ("one", "two"))
    assert both["state"]["step"] == single["state"]["step"] == 4  # of 4 images, and of one that is divided
    for name, weight in single["model"].items():
        torch.testing.assert_close(both["model"][name], weight, rtol=1e-5, atol=1e-7)
    logs = [(tmp_path / name / "log.txt").read_text() for name in ("one", "two")]
    assert re.findall(r" loss \S+", logs[0]) == re.findall(r" loss \S+", logs[1])


def differing(folder, lidc):
    try:
        deterministic(folder, lidc, own_weights=True)
    except ValueError as error:
        (folder.parent / f"error.{os.environ['RANK']}").write_text(str(error))
        raise


@pytest.mark.slow
def test_two_processes_of_different_weights_end_with_an_error(lidc, two, tmp_path):
    assert two(differing, tmp_path / "two", lidc) == [1, 1]
    for rank in (0, 1):
        said = (tmp_path / f"error.{rank}").read_text()
        assert said.startswith("where the run stands (step, weights) differs between processes: (0, '")
    assert not list((tmp_path / "two").glob("*.pt"))


@pytest.mark.slow
def test_two_processes_repeat_and_go_on_with_their_run_bit_for_bit(lidc, two, tmp_path):
    def argv(folder):
        return [*tiny.GTR, *tiny.where(lidc, tmp_path / folder), "--batchsize", "2", "--epochs", "2"]

    assert two(train_GTR.main, argv("whole")) == two(train_GTR.main, argv("again")) == [0, 0]
    assert two(interrupted, 4, argv("parts")) == [143, 143]
    assert checkpoint.load(tmp_path / "parts" / "GTR" / "last.pt")["state"]["step"] == 5
    assert two(train_GTR.main, argv("parts")) == [0, 0]
    for folder in ("again", "parts"):
        tiny.assert_same_runs(tmp_path / folder / "GTR", tmp_path / "whole" / "GTR")
    log = (tmp_path / "again" / "GTR" / "log.txt").read_text().splitlines()  # one process writes
    assert [line.split(":")[2][3:] for line in log] == ["epoch 1/2", "epoch 2/2", "epoch 2 validation"]
    assert len(list((tmp_path / "again" / "GTR").glob("events.*"))) == 1


# torchrun.

def torchrun(script, *flags):
    """Starts a script as two processes of one thread."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / script)]
    return subprocess.Popen([*command, *flags], env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process, code=0):
    """What it printed, once it ended with `code`."""
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    return printed, errors


@pytest.mark.slow
def test_two_processes_score_as_one_does(lidc, run, tmp_path, no_pictures):
    def argv(folder):
        return [*tiny.TEST, *tiny.where(lidc, tmp_path / folder), "--limit", "5", "--steps", "2",
                "--gtr", str(run), "--prior", str(run)]

    test_prior_LIDC.main(argv("one"))
    printed, _ = finish(torchrun("test_prior_LIDC.py", *argv("two")))
    assert printed.count("| system |") == 1
    single, both = (json.loads((tmp_path / name / "test" / "results.json").read_text())["systems"]
                    for name in ("one", "two"))
    assert [(both[name]["ids"], both[name]["scores"]) for name in both] == [
        (single[name]["ids"], single[name]["scores"]) for name in single]


@pytest.mark.slow
def test_a_mistake_ends_all_processes_with_its_error(tmp_path):
    _, errors = finish(torchrun("train_GTR.py", "--data_path", str(tmp_path / "nothing.h5")), code=1)
    assert "error: LIDC: data_path" in errors


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the workers in /proc")
def test_a_worker_that_dies_ends_the_run(lidc, tmp_path):
    run = torchrun("train_GTR.py", *tiny.GTR, *tiny.where(lidc, tmp_path), "--epochs", "100000")
    deadline = time.monotonic() + 300
    while not (tmp_path / "GTR" / "log.txt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(second_worker(run), signal.SIGKILL)
    assert "SIGKILL" in finish(run, code=1)[1]


def second_worker(run):
    """Process number of torchrun's worker of rank 1."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and f"\nPPid:\t{run.pid}\n" in (folder / "status").read_text():
            if "RANK=1" in (folder / "environ").read_text().split("\0"):
                return int(folder.name)
