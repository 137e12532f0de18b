"""The benchmarks run at tiny size, refuse a wrong baseline, and count and fit as they say."""

import json

import pytest
import torch
from torch import nn

from models import ATFM, GTR, STNet
from tests.benchmarks import (
    benchmark_memory,
    benchmark_sampling,
    benchmark_scoring,
    benchmark_training,
    diagnose,
    measure,
    straightforward,
)

CPU = ["--device", "cpu", "--size", "16"]
TINY = {
    benchmark_memory: [*CPU, "--dim", "8"],
    benchmark_training: [*CPU, "--dim", "4", "--batch_size", "2", "--repeats", "1", "--amp"],
    benchmark_sampling: [*CPU, "--dim", "4", "--n", "2", "--steps", "2", "--repeats", "1"],
    benchmark_scoring: ["--counts", "2", "4", "--repeats", "1"],
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Leaves out what costs much at any size; the scaling table is tested apart."""
    measures = (benchmark_memory.Way(True, 1, recompute, amp) for recompute, amp in
                ((False, False), (True, False), (False, True)))
    monkeypatch.setattr(benchmark_memory, "WAYS", (benchmark_memory.WAYS[0], *measures))
    monkeypatch.setattr(benchmark_training, "CHECKED_STEPS", 1)
    monkeypatch.setattr(benchmark_sampling, "matmul_peak", lambda *_: 1e12)
    monkeypatch.setattr(benchmark_sampling, "scaling", lambda *_: [{"grows": "n"}])


def rows(module, capsys) -> list[dict]:
    module.main(TINY[module])
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("|---") for line in printed)
    return [json.loads(line) for line in printed if line.startswith("{")]


def test_memory_of_each_measure(capsys):
    found = rows(benchmark_memory, capsys)
    assert found[0]["times less"] == 1 and found[0]["torch"] == str(torch.__version__)
    saved = {(row["way"], row["annotators per pass"], row["recompute"], row["bfloat16"]): row["saved GiB"]
             for row in found}
    # 3 annotators: one per pass saves a third, but for the image, x_0 and masks that all share
    one_by_one = saved["ours", "1", "no", "no"]
    assert saved["straightforward", "1", "no", "no"] / one_by_one == pytest.approx(3, rel=0.02)
    assert saved["ours", "1", "yes", "no"] < one_by_one / 2
    assert saved["ours", "1", "no", "yes"] < one_by_one


def test_training_of_both_stages(capsys):
    found = rows(benchmark_training, capsys)
    assert [row["stage"] for row in found] == ["GTR"] * 2 + ["flow"] * 5
    assert found[0]["times faster"] == found[2]["times faster"] == 1


def test_sampling(capsys):
    found = rows(benchmark_sampling, capsys)
    assert [row["masks agree"] for row in found[:3]] == ["100.00%"] * 3


def test_scoring(capsys):
    assert [row["n"] for row in rows(benchmark_scoring, capsys)] == [2, 4] * 3


def test_a_row_of_the_scaling_table():
    row = benchmark_sampling.growth("n", "", [1, 2], [lambda: None, lambda: None], 1, torch.device("cpu"))
    assert row["sizes"] == "1 2" and len(row["ms"].split()) == 2
    call = benchmark_sampling.sampling(torch.rand(1, 1, 8, 8), n=2, steps=1, size=16, dim=4)
    assert call().shape == (1, 2, 16, 16)
    assert len(benchmark_sampling.scoring(3, torch.device("cpu"))().ids) == 3


@pytest.mark.parametrize("module, name", [(benchmark_memory, "flow_loss"), (benchmark_training, "flow_loss"),
                                          (benchmark_training, "gtr_loss"), (benchmark_sampling, "sample")])
def test_refuses_results_that_differ(monkeypatch, module, name):
    right = getattr(straightforward, name)
    monkeypatch.setattr(straightforward, name, lambda *inputs: 1.1 * right(*inputs))
    with pytest.raises(SystemExit, match="off|losses|agree"):
        module.main(TINY[module])


def test_saved_bytes_counts_each_storage_once_and_leaves_out_weights():
    layer, x = nn.Linear(4, 8, bias=False), torch.rand(2, 4, requires_grad=True)

    # Saved: x (2 x 4 floats), the layer's weight, and exp's result (2 x 8), which the product saves again.
    def forward():
        y = layer(x).exp()
        return y * y.flatten().view(2, 8)
    assert benchmark_memory.saved_bytes(forward, layer.parameters()) == 4 * (2 * 4 + 2 * 8)


def test_exponent():
    assert measure.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def test_medians_take_turns():
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in "ab"}
    assert set(measure.medians(ways, 2, torch.device("cpu"))) == {"a", "b"}
    assert calls == ["a", "b"] * 3  # the first turn warms up


class MeanVelocity(nn.Module):
    """v = share * (mean mask - x_t): at t = 0 and share 1 the best that a flow can do."""

    def __init__(self, masks, share):
        super().__init__()
        self.mean, self.share = masks.mean(1, keepdim=True), share

    def forward(self, x_t, t, image):
        return self.share * (self.mean.repeat_interleave(len(x_t) // len(self.mean), dim=0) - x_t)


def test_diagnosis_of_a_flow_that_learned_nothing_and_of_the_best_at_the_start():
    torch.manual_seed(0)
    image, masks = torch.rand(3, 1, 8, 8), (torch.rand(3, 4, 8, 8) < 0.5).float()
    nothing, best = (diagnose.errors(ATFM(None, MeanVelocity(masks, share), source="normal"), image, masks)
                     for share in (0.0, 1.0))
    assert all(nothing[f"t = {t:g}"] == pytest.approx(nothing["v = 0"]) for t in diagnose.TIMES)
    assert best["t = 0"] == pytest.approx(best["least at t = 0"])
    assert best["t = 0"] < nothing["t = 0"]


class Still(STNet):
    """v = 0."""

    def forward(self, x_t, t, image):
        return torch.zeros_like(x_t)


def test_diagnosis_of_samples_that_stay_where_they_start():
    torch.manual_seed(0)
    gtr, masks = GTR(1, (4,), 2), torch.ones(2, 3, 8, 8)
    masks[:, 0] = 0
    found = diagnose.of_samples(ATFM(gtr, Still(4)), torch.rand(2, 1, 8, 8), masks)
    assert found["IoU with own x_0"] == 1 > found["with others"]
    assert found["diversity of x_0"] == found["diversity of x_1"]
    assert found["undecided in x_0"] == found["undecided in x_1"]
    assert found["diversity of experts"] == pytest.approx(4 / 9)  # one empty mask, two full ones
