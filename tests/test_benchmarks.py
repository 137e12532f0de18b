"""The benchmarks run at tiny size, refuse a wrong baseline, and count and fit as they say."""

import functools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from metadata_manager import BASELINES, FLOWS
from models.flags import experiment
from models.st_net import Attention
from tests.benchmarks import (
    benchmark_memory,
    benchmark_processes,
    benchmark_sampling,
    benchmark_scoring,
    benchmark_training,
    gpu,
    leak,
    measure,
    plan,
    protocol,
    straightforward,
    study,
)

CPU = torch.device("cpu")
TINY = ["--size", "16", "--dim", "4", "--repeats", "1"]
SAMPLING = ["--n", "2", "--steps", "2", "--repeats", "1"]
FLAGS = {
    benchmark_memory: ["--what", "LIDC_demo"],
    benchmark_training: [*TINY, "--batch_size", "2", "--amp"],
    benchmark_sampling: [*TINY, *SAMPLING],
    benchmark_scoring: ["--counts", "2", "4", "--repeats", "1"],
    benchmark_processes: [*TINY, "--batch_size", "2", "--device", "cpu"],
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Leaves out what costs much at any size."""
    options = (False, False), (True, False), (False, True)
    ways = [benchmark_memory.Way(True, 1, recompute, amp) for recompute, amp in options]
    monkeypatch.setattr(benchmark_memory, "WAYS", (benchmark_memory.WAYS[0], *ways))
    monkeypatch.setattr(benchmark_training, "COMPARED", 2)
    monkeypatch.setattr(benchmark_sampling, "GROWING", {"n": 1, "steps": 1, "size": 8, "dim": 4})


def rows(module, capsys, flags=None) -> list[dict]:
    module.main(flags or FLAGS[module])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_memory_of_each_measure(capsys):
    plain, one_by_one, recomputed, bfloat16 = rows(benchmark_memory, capsys)
    assert plain["times less"] == 1 and plain["torch"] == str(torch.__version__)
    # 4 annotators: one per pass saves three quarters, but for the image, x_0 and masks that all share.
    assert one_by_one["times less"] == pytest.approx(4, rel=0.02)
    assert recomputed["saved GiB"] < one_by_one["saved GiB"] / 2
    assert bfloat16["saved GiB"] < one_by_one["saved GiB"]


@pytest.mark.slow
def test_training_of_both_stages(capsys):
    table = rows(benchmark_training, capsys)
    assert [row["stage"] for row in table] == ["GTR"] * 2 + ["flow"] * 3
    assert table[0]["times faster"] == table[2]["times faster"] == 1


def test_sampling_from_trained_checkpoints(lidc, run, monkeypatch, capsys):
    monkeypatch.setenv("ATFM_LIDC_PATH", str(lidc))
    checkpoints = ["--what", "LIDC", "--size", "8", "--gtr", str(run / "GTR"), "--prior", str(run / "atfm")]
    table = rows(benchmark_sampling, capsys, [*checkpoints, *SAMPLING])
    assert [row["masks agree"] for row in table[:3]] == ["100.00%"] * 3
    assert [row["grows"] for row in table if "grows" in row] == ["n", "steps", "size", "dim"]


def test_scoring_and_several_processes(capsys):
    assert [row["n"] for row in rows(benchmark_scoring, capsys)] == [2, 4] * 3
    assert [row["way"] for row in rows(benchmark_processes, capsys)] == list(benchmark_processes.WAYS)


@pytest.mark.parametrize("module, name", [
    (benchmark_training, "gtr_loss"), pytest.param(benchmark_training, "flow_loss", marks=pytest.mark.slow),
    pytest.param(benchmark_sampling, "sample", marks=pytest.mark.slow)])
def test_refuses_results_that_differ(monkeypatch, module, name):
    right = getattr(straightforward, name)
    monkeypatch.setattr(straightforward, name, lambda *inputs: 1.1 * right(*inputs))
    with pytest.raises(SystemExit, match="losses|agree"):
        module.main(FLAGS[module])


def test_saved_bytes_counts_each_storage_once_and_leaves_out_weights():
    layer, x = nn.Linear(4, 8, bias=False), torch.rand(2, 4, requires_grad=True)

    # Saved: x (2 x 4 floats), the layer's weight, and exp's result (2 x 8), which the product saves again.
    def forward():
        y = layer(x).exp()
        return y * y.flatten().view(2, 8)
    assert benchmark_memory.saved_bytes(forward, layer.parameters()) == 4 * (2 * 4 + 2 * 8)


def test_attention_keeps_no_product_of_all_pixels():
    """On ISIC3, 1024 channels of 64 x 64 pixels: a fused kernel, without which these are 284 MiB."""
    with benchmark_memory.without_data("cpu"):
        attention, x = Attention(1024), torch.empty(1, 1024, 64, 64, requires_grad=True)
        saved = benchmark_memory.saved_bytes(lambda: attention(x), [*attention.parameters(), x])
    assert saved < 27 * 2**20


def test_exponent():
    assert measure.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def test_medians_take_turns():
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in "ab"}
    assert set(measure.medians(ways, 2, CPU)) == {"a", "b"}
    assert calls == ["a", "b"] * 3  # the first turn warms up


@pytest.mark.slow
@pytest.mark.parametrize("what", ["LIDC", "isic3_style_concat"])
def test_a_step_of_cfm_at_full_size_fits_a_gpu_of_24_gb(what):
    """What autograd keeps of a pass, weights, gradients and Adam's moments; counted without data."""
    settings = experiment(what, method="cfm")
    with benchmark_memory.without_data("cpu"):
        atfm, batch = plan.flow_of(settings, amp=False), plan.batch(settings, settings.flow.batch_size)
        saved = benchmark_memory.saved_bytes(lambda: next(atfm.losses(*batch)), atfm.parameters())
        weights = sum(weight.numel() * 4 for weight in atfm.net.parameters())
    assert saved + 4 * weights < 22 * 2**30


def test_a_plan_counts_products_bytes_and_operations_but_no_views():
    with plan.Count() as count:
        x = torch.nn.functional.conv2d(torch.rand(2, 3, 8, 8), torch.rand(4, 3, 1, 1))
        (x.view(2, -1) + 1).bfloat16()
    *random, conv, add, cast = count.work.operations
    assert conv == (2 * 2 * 4 * 3 * 64, 4 * (2 * 3 * 64 + 4 * 3 + 2 * 4 * 64), False)
    assert add == (0, 4 * 2 * (2 * 4 * 64), False) and cast == (0, (4 + 2) * (2 * 4 * 64), True)
    assert [flop for flop, _, _ in random] == [0, 0]


def test_a_plan_s_roofline():
    card = plan.GPU(tf32=100, bfloat16=1000, bandwidth=10)
    work = plan.Work([(100, 1, False), (1000, 1, True), (100, 40, True)])
    assert work.seconds(card, plan.Assumed(0.5, 0.8, launch=0)) == pytest.approx(2 + 2 + 5)
    assert work.seconds(card, plan.Assumed(0.5, 0.8, launch=7)) == 21  # the host is slower


@pytest.mark.parametrize("what, preset, method, passes, nfe", [
    ("LIDC", "paper", "atfm", 4, 25), ("LIDC", "best", "atfm", 1, 2), ("LIDC", "paper", "cfm", 32, 400),
    ("isic3_style_concat", "released", "atfm", 3, 50)])
def test_a_plan_is_of_the_default_settings(what, preset, method, passes, nfe, monkeypatch):
    """Every piece of work counted as one operation of a second."""
    for name in ("gtr_step", "flow_pass", "evaluation", "update"):
        monkeypatch.setattr(plan, name, lambda *_: plan.Work([(0.0, 1.0, False)]))
    settings = experiment(what, preset, method)
    second, assumed = plan.GPU(1, 1, 1), plan.Assumed(1, 1, 0)
    gtr, flow, test = (3600 * stage.hours(second, assumed) for stage in plan.stages(settings, 100, 7))
    assert gtr == pytest.approx(2 * settings.gtr.epochs * math.ceil(100 / settings.gtr.batchsize))
    assert test == pytest.approx(7 * 5 * 100 * nfe / plan.AT_ONCE)
    steps = settings.flow.num_epochs * math.ceil(100 / settings.flow.batch_size)
    loop, per_step = settings.loop, 2 if method == "cfm" else 1  # NFE, guidance doubles it
    validations = math.ceil(settings.flow.num_epochs / loop.validate_every)
    in_validation = validations * loop.val_images * loop.val_samples * loop.val_steps * per_step
    assert flow == pytest.approx(steps * (passes + 1) + in_validation / plan.AT_ONCE)


@pytest.mark.slow
def test_the_plan_s_table_is_marked_estimated_beside_what_the_authors_measured(capsys):
    plan.main(["--what", "LIDC_demo"])
    table = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["stage"] for row in table[:3]] == ["GTR", "flow", "test, 4 NFE"]
    assert {name for name in table[0] if ", h" in name} == {f"{name}, h (estimated)" for name in plan.GPUS}
    last = table[-1]
    assert last["authors, s (measured, precision unknown)"] == 113
    assert 0 < last["bfloat16, s (estimated)"] < last["TF32, s (estimated)"] < 113


@pytest.mark.slow
def test_the_check_of_a_gpu_runs_on_a_cpu_at_tiny_size(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # minutes less
    tiny = ["--device", "cpu", "--what", "LIDC_demo", "--samples", "2", "--repeats", "1"]
    gpu.main(tiny)
    table = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    right, timed = ([row for row in table if name in row] for name in ("right", "way"))
    assert {row["system"] for row in right if row["right"]} == {"gtr", *FLOWS, *BASELINES}
    assert len(timed) == 1 + 2 * len(gpu.WAYS) and all(row["s"] > 0 for row in timed)
    monkeypatch.setattr(gpu, "correctness", lambda device: [{"system": "atfm", "loss": 1.0, "right": False}])
    with pytest.raises(SystemExit, match="cpu: atfm differ from the CPU by more than"):
        gpu.main([*tiny, "--minutes", "0"])
    table = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert {row["s"] for row in table if "way" in row} == {"not run: no time left"}


@pytest.mark.parametrize("name, known", [
    ("NVIDIA GeForce RTX 3090", "RTX 3090"), ("NVIDIA A100-SXM4-80GB", "A100 80 GB"),
    ("NVIDIA H100 80GB HBM3", "H100 SXM"), ("NVIDIA H200", "H200"), ("Tesla T4", None)])
def test_each_card_of_the_plan_is_known_by_its_name(name, known, monkeypatch):
    work = plan.Work([(1e15, 1e9, True)])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    expected = known and 2 * work.seconds(plan.GPUS[known], plan.Assumed())
    assert gpu.estimate(work, 2, torch.device("cuda")) == expected


def test_training_lists_differ_only_in_whose_slices_they_hold():
    patient = np.repeat(np.arange(50), 6)
    ways, held_out = leak.training_lists(patient)
    clean, by_slice, leaked = (set(rows.tolist()) for rows in ways.values())
    tested = set(held_out["test"].tolist())
    assert len(clean) == len(by_slice) == len(leaked) == len(ways["by slice"])
    assert not clean & tested and not by_slice & tested and tested <= leaked
    patients = {way: set(patient[rows].tolist()) for way, rows in ways.items()}
    of_test = set(patient[held_out["test"]].tolist())
    assert not patients["by patient"] & of_test and of_test <= patients["by slice"]
    assert not set(patient[held_out["val"]].tolist()) & (of_test | patients["by slice"])


@pytest.mark.slow
def test_what_a_leaking_split_buys(lidc, tmp_path, no_pictures, capsys):
    flags = ["--data_path", str(lidc), "--output_path", str(tmp_path), "--crop", "8", "--epochs", "1"]
    table = rows(leak, capsys, [*flags, "--seeds", "0", "1"])
    assert [(row["training list"], row["runs"]) for row in table] == [
        ("by patient", 2), ("by slice", 2), ("test slices too", 2)]
    assert [row["GED16 minus by patient"] is None for row in table] == [True, False, False]


def test_other_ways_of_scoring(lidc, run, capsys):
    a, empty = torch.ones(2, 2, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.bool)
    samples, masks = torch.stack([a, empty, empty, empty])[None], torch.stack([a, empty])[None]
    by_hand = [2 * 0.5 - 3 / 8 - 1 / 2, 2 * 0.5 - 1 / 2 - 1, 2 * 0.75 - 3 / 8, 3 / 4, 1, 1 / 4]
    assert [score(samples, masks) for _, score in protocol.WAYS.values()] == pytest.approx(by_hand)
    table = rows(protocol, capsys, ["--gtr", str(run / "GTR"), "--data_path", str(lidc), "--samples", "4"])
    assert [row["score"] for row in table] == ["GED"] * 3 + ["HM-IoU"] * 3


def test_the_tables_of_the_results_are_those_of_the_files(tmp_path):
    page = study.ROOT / "docs" / "results.md"
    copy = tmp_path / "results.md"
    copy.write_text(page.read_text().replace("| Act. GTR (best) |", "| changed |"))
    study.write_tables(copy)
    assert copy.read_text() == page.read_text()
