"""What a test prints and writes: intervals, tables beside the paper's rows, results.json, whole files."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from metadata_manager import METHODS, EvaluationConfig
from metrics import (
    Evaluation,
    Row,
    bootstrap_interval,
    cost_table,
    differences_table,
    free_folder,
    results,
    scores_table,
    two_level_interval,
    workload,
    write_text,
)
from metrics.files import whole_file
from metrics.report import PAPER, columns

PATIENTS = np.repeat(["p", "q", "r"], 2)


def row(method, ged, label=None):
    """A system whose GED2 is `ged` (seeds, images), and all its other scores half of it."""
    scores = {name: np.array(ged) * (1 if name == "GED2" else 0.5) for name in (*columns((2,)), "Empty")}
    evaluation = Evaluation(tuple("abcdef"), tuple(range(len(ged))), scores)
    system = SimpleNamespace(label=label or method, method=method, nfe=25, parameters=3000,
                             checkpoints=("gtr.pt",), alpha=None, solver="euler",
                             steps=25, precision="float32")
    return Row(system, evaluation, seconds=1.5, samples=2)


ACT_GTR, ATFM = row("act-gtr", [[0.5] * 6, [0.3] * 6]), row("atfm", [[0.25] * 6, [0.25] * 6])


def test_interval_has_the_width_of_the_normal_one():
    values = np.random.default_rng(0).normal(0.1, 1, 400)
    found = bootstrap_interval(values, np.arange(400), draws=4000)
    half = 1.96 * values.std() / 20
    assert found[0] == values.mean()
    assert found[1:] == pytest.approx((found[0] - half, found[0] + half), abs=0.006)
    assert found == bootstrap_interval(values, np.arange(400), draws=4000)
    assert found != bootstrap_interval(values, np.arange(400), draws=4000, seed=1)


def test_interval_resamples_whole_patients():
    values = np.repeat(np.random.default_rng(0).normal(0, 1, 100), 4)  # four equal slices of each patient
    _, low, high = bootstrap_interval(values, np.arange(400), draws=2000)
    _, group_low, group_high = bootstrap_interval(values, np.repeat(np.arange(100), 4), draws=2000)
    assert (group_high - group_low) / (high - low) == pytest.approx(2, rel=0.1)  # the root of 4 slices each
    # A patient weighs as many images as it has: 50 patients of three 0s, 50 of one 1.
    mean, low, high = bootstrap_interval(np.repeat([0.0, 1.0], [150, 50]),
                                         [*np.repeat(np.arange(50), 3), *range(50, 100)])
    assert low < mean == 0.25 < high < 0.4


@pytest.mark.parametrize("values, patients, expected", [
    ([0.25] * 6, PATIENTS, (0.25, 0.25, 0.25)),
    ([[1.0, 2.0], [3.0, 6.0]], list("pp"), (3, 3, 3)),  # seeds are averaged; one patient: no width
])
def test_interval_of_a_few_images(values, patients, expected):
    assert bootstrap_interval(np.array(values), patients, draws=200) == pytest.approx(expected)


@pytest.mark.parametrize("values, patients, message", [
    ([1.0, 2.0], ["p"] * 3, "2 images with 3 patients"), ([], [], "0 images"),
    ([0.0, np.nan], ["p", "q"], "scores of image 1 are not finite"),
])
def test_other_patients_and_bad_scores_are_refused(values, patients, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(np.array(values), patients)


def test_the_paper_s_tables_have_columns_of_ours_in_which_atfm_is_best():
    for table in (PAPER["LIDC"], PAPER["isic3_style_concat"]):
        for column, (best, _) in table["atfm"].items():
            means = [row[column][0] for row in table.values() if column in row]
            assert best == (min(means) if "GED" in column else max(means))  # none of CFM's columns is ATFM's
            assert column in columns((16, 32, 100))
    assert PAPER["LIDC"]["prob-unet"]["GED16"] == (0.31, 0.01)
    assert PAPER["LIDC"]["phiseg"]["GED32"] == (0.247, None) and "GED16" not in PAPER["LIDC"]["cimd"]
    assert {*METHODS, "act-gtr"} - {*PAPER["LIDC"], *PAPER["isic3_style_concat"]} == {"cfm-mmis"}


def test_cfm_s_numbers_are_those_of_its_own_paper_at_m_15():
    assert PAPER["LIDC"]["cfm"] == {"Dice of means": (0.595, None)}
    assert PAPER["MMIS"]["cfm-own"] == {"GED15": (0.231, None), "Dice of means": (0.785, None)}
    assert PAPER["MMIS"]["prob-unet"] == {"GED15": (0.227, None)}
    assert {column for row in PAPER["MMIS"].values() for column in row} <= {*columns((15,))}


def test_scores_table_has_the_papers_row_below_each_methods_rows():
    rows = [ACT_GTR, row("atfm", [[0.25] * 6], "atfm, 5 steps"), ATFM, row("cfm", [[0.25] * 6])]
    lines = scores_table("LIDC", rows, (2,)).splitlines()
    assert lines[0] == ("| system | NFE | GED2 | HM-IoU2 | MDM2 | Diversity2 | S_NCC | Dice of means "
                        "| ECE |")
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| act-gtr, ours", "| act-gtr, paper", "| atfm, 5 steps, ours", "| atfm, ours", "| atfm, paper",
        "| cfm, ours", "| cfm, arXiv 2507.22418"]
    assert lines[2].startswith("| act-gtr, ours | 25 | 0.400 +- 0.141 | 0.200 +- 0.071 |")
    assert lines[4].startswith("| atfm, 5 steps, ours | 25 | 0.250 | 0.125 |")  # one seed: no deviation
    assert "paper" not in scores_table("LIDC_demo", rows, (2,))


def test_a_system_that_cannot_be_trained_here_stands_below_those_that_are_compared():
    assert scores_table("LIDC", [row("ssn", [[0.25] * 6]), ATFM], (16,)).splitlines()[-1].startswith(
        "| p2sam, paper (not trained here) |  | 0.208 |")


def test_a_test_says_first_what_it_will_do():
    config = EvaluationConfig(samples=(16, 100), seeds=(0, 1))
    assert workload([ACT_GTR.system, ATFM.system], 7, config).splitlines() == [
        f"{name}: 7 images x 2 seeds x 100 samples x 25 NFE, float32" for name in ("act-gtr", "atfm")]


def test_costs_are_of_100_samples_beside_the_papers():
    lines = cost_table("LIDC", [ACT_GTR, ATFM]).splitlines()  # 2 seeds x 6 images x 2 samples took 1.5 s
    assert lines[3:] == ["| act-gtr | 25 | 3,000 | 6.25 | - |", "| atfm | 25 | 3,000 | 6.25 | 113 |"]


def test_scores_are_shown_at_the_papers_n_where_it_was_drawn():
    assert columns((16, 32, 100))[:4] == ["GED16", "GED32", "GED100", "HM-IoU32"]
    assert columns((4, 8))[:3] == ["GED4", "GED8", "HM-IoU8"]


def test_differences_are_from_atfm_with_intervals_over_patients():
    rows = [ACT_GTR, ATFM, row("sfm", [[0.0] * 4 + [0.5] * 2])]
    assert differences_table(rows, PATIENTS, (2,)).splitlines()[1:] == [
        "| minus atfm | GED2 | HM-IoU2 | MDM2 |", "|---|---|---|---|",
        "| act-gtr | +0.150 [+0.150, +0.150] | +0.075 [+0.075, +0.075] | +0.075 [+0.075, +0.075] |",
        "| sfm | -0.083 [-0.250, +0.250] | -0.042 [-0.125, +0.125] | -0.042 [-0.125, +0.125] |"]
    assert "+0.150 (one patient: no interval)" in differences_table([ACT_GTR, ATFM], ["p"] * 6, (2,))
    assert differences_table([ATFM], PATIENTS, (2,)) == ""


def test_results_survive_json(tmp_path):
    found = results([ACT_GTR, ATFM], PATIENTS, "fingerprint", {"torch": "2"}, torch.device("cpu"),
                    evaluation=EvaluationConfig(samples=(2,)))
    write_text(tmp_path / "new" / "results.json", found)
    read = json.loads((tmp_path / "new" / "results.json").read_text())
    assert read["test_images"] == "fingerprint" and read["groups"] == list("ppqqrr")
    assert read["evaluation"]["samples"] == [2] and {"command", "hardware", "versions"} < set(read)
    system = read["systems"]["act-gtr"]
    assert (system["solver"], system["seconds"], system["ids"]) == ("euler", 1.5, list("abcdef"))
    assert system["scores"]["GED2"] == [[0.5] * 6, [0.3] * 6]


def test_a_file_is_whole_or_what_it_was(tmp_path):
    path = tmp_path / "table.md"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    with pytest.raises(OSError, match=r"table.md: cannot be written \(disk full\); what was there before"):
        with whole_file(path) as file:
            file.write(b"half")
            raise OSError("disk full")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_two_level_interval_resamples_runs_and_patients():
    random = np.random.default_rng(0)
    of_runs, of_images = random.normal(0, 1, 40), random.normal(0, 1, 100)
    values = 0.3 + of_runs[:, None] + of_images
    mean, low, high = two_level_interval(values, np.arange(100), draws=4000)
    half = 1.96 * np.hypot(of_runs.std() / 40**0.5, of_images.std() / 10)
    assert mean == values.mean() and (low, high) == pytest.approx((mean - half, mean + half), abs=0.03)
    # One run: over patients alone, as the plain interval. One patient: over runs alone.
    assert two_level_interval(values[:1], np.arange(100)) == pytest.approx(
        bootstrap_interval(values[0], np.arange(100)), abs=0.02)
    mean, low, high = two_level_interval(values, ["p"] * 100, draws=4000)
    assert high - low == pytest.approx(2 * 1.96 * of_runs.std() / 40**0.5, rel=0.05)


def test_two_level_interval_weighs_patients_by_their_images():
    values = np.repeat([[0.0, 1.0]], 2, 0).repeat([3, 1], 1)
    mean, low, high = two_level_interval(values, list("pppq"))
    assert (mean, low, high) == (0.25, 0, 1)


def test_a_test_with_other_settings_goes_beside_the_first(tmp_path, capsys):
    def test(place=tmp_path / "test", **settings):
        config = EvaluationConfig(**settings)
        folder = free_folder(place, sampling=config)
        found = results([ATFM], PATIENTS, "", {}, torch.device("cpu"), sampling=config)
        write_text(folder / "results.json", found)
        return folder.name

    assert test(report_images=3) == "test"  # of the same scores
    assert [test(), test(), test(seeds=(7,)), test(steps=(1,)), test(seeds=(7,)), test()] == [
        "test", "test", "test_2", "test_3", "test_2", "test"]
    assert "test: kept, the results of another test" in capsys.readouterr().out
    for number, other in enumerate(("not JSON", "[]", "{}")):
        write_text(tmp_path / f"{number}" / "results.json", other)
        assert test(tmp_path / f"{number}") == f"{number}_2"
        assert (tmp_path / f"{number}" / "results.json").read_text() == other
