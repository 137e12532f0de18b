"""Curves of a test: which rows of results.json become which points and lines, and what is drawn at all."""

import json

import numpy as np
import pytest

from models import result_curves

SCORES = {"GED2": 0.5, "GED4": 0.4, "HM-IoU2": 0.6, "HM-IoU4": 0.7}


def row(method="atfm", evaluations=25, *, alpha=None, solver="euler", steps=25, better=0.0):
    """A system of two seeds and four images whose scores are SCORES +- 0.1, minus `better`."""
    spread = np.array([[-0.1, 0.1, -0.1, 0.1]] * 2)
    scores = {name: (value - better + spread).tolist() for name, value in SCORES.items()}
    return {"method": method, "evaluations": evaluations, "alpha": alpha, "solver": solver, "steps": steps,
            "scores": scores}


def report(*rows, steps=(), solver=(), what="LIDC_demo", reader="lidc"):
    return {"systems": {str(i): row for i, row in enumerate(rows)}, "groups": ["a", "a", "b", "b"],
            "sampling": {"samples": [2, 4], "steps": list(steps), "solver": list(solver)},
            "metadata": {"what": what, "reader": reader}}


GTR = row("act-gtr", 0, solver=None, steps=None)
STEPS = report(GTR, row(evaluations=25, better=0.2), row(evaluations=1, steps=1), steps=[25, 1])
ALPHAS = report(row(alpha=1e-3), row(alpha=0.0, better=0.1))


def lines(ax):
    """Name -> (x, y) of each line with intervals on a panel."""
    return {drawn.get_label(): tuple(data.tolist() for data in drawn[0].get_data())
            for drawn in ax.containers}


def test_a_tradeoff_has_the_largest_n_and_points_in_order_of_cost():
    ged, hm_iou = result_curves.tradeoff(STEPS).axes
    assert ged.get_ylabel() == "GED4 (lower is better)\n95 % interval over patients"
    assert hm_iou.get_ylabel() == "HM-IoU4 (higher is better)\n95 % interval over patients"
    assert lines(ged)["act-gtr"] == ([0], pytest.approx([0.4]))
    assert lines(ged)["atfm"] == ([1, 25], pytest.approx([0.4, 0.2]))
    assert lines(hm_iou)["atfm"] == ([1, 25], pytest.approx([0.7, 0.5]))


@pytest.mark.parametrize("samples, n", [([16, 32, 100], 32), ([16], 16), ([100, 8], 100)])
def test_hm_iou_is_shown_at_32_or_else_at_the_largest_n(samples, n):
    assert result_curves.matching_n(samples) == n


def test_intervals_resample_groups_whose_means_differ():
    both = row(evaluations=25)
    both["scores"]["GED4"] = [[0.0, 0.0, 1.0, 1.0]] * 2  # the two groups' means: a resample's is 0, 1/2 or 1
    ged = result_curves.tradeoff(report(both, row(evaluations=1, steps=1))).axes[0]
    _, _, (bars,) = ged.containers[0]
    equal, apart = (segment[:, 1].tolist() for segment in bars.get_segments())
    assert equal == pytest.approx([0.4, 0.4])  # both groups hold a 0.3 and a 0.5
    assert apart == pytest.approx([0, 1])


def test_solvers_get_a_line_each_only_for_the_method_that_has_several():
    found = report(row(evaluations=2, solver="heun"), row(evaluations=1), row("sfm", 1),
                   solver=["heun", "euler"])
    assert set(lines(result_curves.tradeoff(found).axes[0])) == {"atfm, heun", "atfm, euler", "sfm"}


def test_alphas_and_steps_get_a_line_each_of_the_other_curve():
    found = report(row(evaluations=1, steps=1, alpha=0.0), row(evaluations=25, alpha=0.0),
                   row(evaluations=1, steps=1, alpha=5e-4), row(evaluations=25, alpha=5e-4), steps=[1, 25])
    assert lines(result_curves.tradeoff(found).axes[0]) == {
        name: ([1, 25], pytest.approx([0.4, 0.4])) for name in ("atfm, alpha 0", "atfm, alpha 0.0005")}
    assert set(lines(result_curves.sweep(found).axes[0])) == {"atfm, steps 1", "atfm, steps 25"}


def test_a_sweep_leaves_out_rows_without_alpha_and_marks_the_papers():
    ged = result_curves.sweep(report(GTR, row(alpha=1e-3), row(alpha=0.0, better=0.1))).axes[0]
    assert lines(ged) == {"atfm": ([0, 1], pytest.approx([0.3, 0.4]))}
    assert [text.get_text() for text in ged.get_xticklabels()] == ["0", "0.001"]
    marked = [line.get_xdata()[0] for line in ged.lines if line.get_label() == "paper's default"]
    assert marked == [1]  # LIDC's alpha is 1e-3
    lesions = report(row(alpha=1e-3), row(alpha=0.0), what="isic3_demo", reader="isic3")
    ged = result_curves.sweep(lesions).axes[0]  # the default there, 1e-4, was not tested
    assert "paper's default" not in [line.get_label() for line in ged.lines]
    assert "over images" in ged.get_ylabel()


def test_curves_that_need_more_rows_say_which_flags_give_them():
    with pytest.raises(ValueError, match="test with several --steps or --solver"):
        result_curves.tradeoff(report(GTR, row()))
    with pytest.raises(ValueError, match="train and test with several --alphas"):
        result_curves.sweep(report(row(alpha=1e-3), row()))


@pytest.mark.parametrize("found, names", [
    (STEPS, ["tradeoff.png"]), (ALPHAS, ["sweep.png"]),
    (report(row(evaluations=1, alpha=0.0), row(alpha=1e-3), steps=[1, 25]), ["tradeoff.png", "sweep.png"]),
    (report(GTR, row(), row("cfm", 100)), []),  # methods of different cost, but nothing was varied
    (report(row(solver="euler"), row(solver="ab2"), solver=["euler", "ab2"]), []),  # the same cost
], ids=["steps", "alphas", "both", "methods", "equal cost"])
def test_a_test_leaves_the_curves_that_its_rows_give_rise_to(tmp_path, found, names):
    assert result_curves.save_curves(found, tmp_path) == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_a_report_is_read_as_written(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(STEPS))
    assert result_curves.read_report(tmp_path / "results.json") == STEPS


@pytest.mark.parametrize("text", [
    "no JSON", "[]", '{"systems": {}}',
    '{"systems": {"atfm": {"method": "atfm"}}, "sampling": {}, "groups": []}',
    '{"systems": {}, "sampling": {}, "groups": []}',
    '{"systems": {"atfm": 3}, "sampling": {}, "groups": []}'])
def test_another_file_is_named(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}: not the results.json of a test .*; run the test again"):
        result_curves.read_report(path)


def test_a_missing_report_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="results.json: no such file; run test_prior_LIDC.py"):
        result_curves.read_report(tmp_path / "results.json")
