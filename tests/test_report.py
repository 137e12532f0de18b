"""What a test prints and writes: intervals, tables beside the papers' rows, results.json, whole files."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from metadata_manager import METHODS, EvaluationConfig, Metadata
from metrics import (
    Evaluation,
    Row,
    bootstrap_interval,
    columns,
    cost_table,
    count_patients,
    differences_table,
    report_tables,
    results,
    scores_table,
    two_level_interval,
    write_text,
)
from metrics.catalogue import score_names
from metrics.files import whole_file
from metrics.paper import NOTES, PAPER, not_trained_here
from metrics.report import FLOOR

PATIENTS = np.repeat([f"patient {i}" for i in range(12)], 2)  # two images each


def row(method, ged, label=None, **scores):
    """A system whose GED2 is `ged` per seed, on each image, and its other scores half of it; 4 experts."""
    ged = np.repeat(np.array(ged, float)[:, None], 24, axis=1)
    of_images = {name: ged * (1 if name == "GED2" else 0.5) for name in score_names((2,))}
    of_images |= {"Experts": np.full_like(ged, 4)} | scores
    system = SimpleNamespace(label=label or method, method=method, nfe=25, parameters=3000,
                             checkpoints=("gtr.pt",), alpha=None, solver="euler", steps=25,
                             precision="float32", preset="paper", training={"GTR": {"lr": 1e-4}})
    names = tuple(f"image {i}" for i in range(24))
    return Row(system, Evaluation(names, tuple(range(len(ged))), of_images), seconds=1.5, samples=2)


ACT_GTR, ATFM = row("act-gtr", [0.5, 0.3]), row("atfm", [0.25, 0.25])


def names_of(table):
    """The first cells of a table's lines, and the notes below it."""
    return [line.split(" | ")[0].lstrip("| ") for line in table.splitlines()[2:] if line]


def test_interval_has_the_width_of_the_normal_one():
    values = np.random.default_rng(0).normal(0.1, 1, 400)
    mean, low, high = bootstrap_interval(values, np.arange(400), resamples=4000)
    half = 1.96 * values.std() / 20
    assert mean == values.mean() and (low, high) == pytest.approx((mean - half, mean + half), abs=0.006)
    assert (mean, low, high) == bootstrap_interval(values, np.arange(400), resamples=4000)
    assert (mean, low, high) != bootstrap_interval(values, np.arange(400), resamples=4000, seed=1)


def test_interval_resamples_whole_patients():
    values = np.repeat(np.random.default_rng(0).normal(0, 1, 100), 4)  # four equal slices of each patient
    _, low, high = bootstrap_interval(values, np.arange(400), resamples=2000)
    _, group_low, group_high = bootstrap_interval(values, np.repeat(np.arange(100), 4), resamples=2000)
    assert (group_high - group_low) / (high - low) == pytest.approx(2, rel=0.1)  # the root of 4 slices each
    # A patient weighs as many images as it has: 50 patients of three 0s, 50 of one 1.
    mean, low, high = bootstrap_interval(np.repeat([0.0, 1.0], [150, 50]),
                                         [*np.repeat(np.arange(50), 3), *range(50, 100)])
    assert low < mean == 0.25 < high < 0.4


@pytest.mark.parametrize("values, patients, expected", [
    ([0.25] * 24, PATIENTS, (0.25, 0.25, 0.25)),
    ([[1.0, 2.0], [3.0, 6.0]], list("pp"), (3, 3, 3)),  # seeds are averaged; one patient: no width
])
def test_interval_of_a_few_images(values, patients, expected):
    assert bootstrap_interval(np.array(values), patients, resamples=200) == pytest.approx(expected)


@pytest.mark.parametrize("values, patients, message", [
    ([1.0, 2.0], ["p"] * 3, "2 images with 3 patients"), ([], [], "0 images"),
    ([0.0, np.nan], ["p", "q"], "scores of image 1 are not finite"),
])
def test_other_patients_and_bad_scores_are_refused(values, patients, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(np.array(values), patients)


def test_patients_whose_names_differ_in_unicode_form_only_are_one():
    assert count_patients(["\u00e9", "e\u0301", "e"]) == 2 and count_patients(np.array([3, 3, 10])) == 2
    values = np.array([0.0, 1.0, 0.0, 1.0])
    patients = ["\u00e9", "e\u0301", "f", "f"]
    assert bootstrap_interval(values, patients) == bootstrap_interval(values, list("eeff"))


def test_the_paper_s_tables_have_columns_of_ours_in_which_atfm_is_best():
    for table in (PAPER["LIDC"], PAPER["isic3_style_concat"]):
        for column, (best, _) in table["atfm"].scores.items():
            means = [row.scores[column][0] for row in table.values() if column in row.scores]
            assert best == (min(means) if "GED" in column else max(means))  # none of CFM's columns is ATFM's
            assert column in columns((16, 32, 100))
    lidc = {method: published.scores for method, published in PAPER["LIDC"].items()}
    assert lidc["prob-unet"]["GED16"] == (0.31, 0.01) and lidc["phiseg"]["GED32"] == (0.247, None)
    # MoSE's as CCDM's table has them, not in the columns of the paper's Table 1.
    assert {name: mean for name, (mean, _) in lidc["mose"].items()} == {
        "GED16": 0.218, "GED50": 0.195, "GED100": 0.189, "HM-IoU16": 0.624, "MDM32": 0.767}
    assert PAPER["MMIS"]["cfm-mmis"].scores == {"GED15": (0.231, None), "Dice of means": (0.785, None)}
    assert set(NOTES) <= set(lidc)
    assert {*METHODS, "act-gtr"} - {*PAPER["LIDC"], *PAPER["isic3_style_concat"]} == {
        "cfm-mmis", "prob-unet-energy"}


def test_scores_table_has_the_papers_row_below_each_methods_rows():
    rows = [ACT_GTR, row("atfm", [0.25], "atfm, 5 steps"), ATFM, row("cfm", [0.25])]
    table = scores_table("LIDC", rows, (2,))
    lines = table.splitlines()
    assert lines[0] == "| system | NFE | GED2 | HM-IoU2 | MDM2 | Diversity2 | S_NCC | Dice of means | ECE |"
    assert names_of(table) == [
        "act-gtr, ours", "act-gtr, paper's Table 4", "atfm, 5 steps, ours", "atfm, ours",
        "atfm, paper's Table 1", "cfm, ours", "cfm, arXiv 2507.22418", FLOOR]
    assert lines[2].startswith("| act-gtr, ours | 25 | 0.400 +- 0.141 | 0.200 +- 0.071 |")
    assert lines[4].startswith("| atfm, 5 steps, ours | 25 | 0.250 | 0.125 |")  # one seed: no spread
    assert names_of(scores_table("LIDC_demo", rows, (2,))) == [
        "act-gtr, ours", "atfm, 5 steps, ours", "atfm, ours", "cfm, ours", FLOOR]


def test_the_floor_is_of_each_image_s_experts():
    ged = np.zeros((1, 24))
    experts = np.array([4.0, 2.0] + [1.0] * 22)[None]
    diversity = np.where(experts > 1, 0.3, 0.0)
    rows = [row("atfm", [0.25], **{"Experts": experts, "Experts' diversity": diversity, "GED16": ged})]
    lines = scores_table("LIDC", rows, (2, 16)).splitlines()
    means = [(0.4 * (1 / 4 + 1 / n) + 0.6 * (1 / 2 + 1 / n)) / 2 for n in (2, 16)]
    assert lines[4].startswith(f"| {FLOOR} |  | {means[0]:.3f} | {means[1]:.3f} | - |")
    assert lines[6] == f"{FLOOR}: without the 22 images of 24 that one expert marked."
    rows[0].evaluation.scores["Experts"][:] = 1
    note = scores_table("LIDC", rows, (2,)).splitlines()[-1]
    assert note == f"{FLOOR}: none, as one expert marked each image."


def test_systems_that_cannot_be_trained_here_stand_below_those_that_are_compared():
    table = scores_table("LIDC", [row("mose", [0.25], GED16=np.zeros((1, 24))), ATFM], (16,))
    assert names_of(table)[4:] == [
        "P2SAM, paper's Table 1 (not trained here)", "JProb. U-Net, CCDM's Table 1 (not trained here)",
        "PixelSeg, CCDM's Table 1 (not trained here)", "cFlow, CCDM's Table 1 (not trained here)",
        "HProb. U-Net, CCDM's Table 1 (not trained here)", FLOOR,
        "mose: the paper's Table 1 prints its GED50, 0.195, as GED32 and its HM-IoU16, 0.624, as HM-IoU32."]
    assert "| P2SAM, paper's Table 1 (not trained here) |  | 0.208 |" in table
    assert "| mose, CCDM's Table 1 |  | 0.218 +- 0.003 | 0.624 +- 0.004 |" in table
    assert not not_trained_here("MMIS") and "not trained here" not in scores_table("LIDC", [ATFM], (16,))
    # A column has a number in it: ours are of n = 2 here, MoSE's own of 16 and 50; nothing has HM-IoU50.
    names = scores_table("LIDC", [row("mose", [0.25])], (2, 16, 50)).splitlines()[0].split(" | ")
    assert names[2:] == ["GED2", "GED16", "GED50", "HM-IoU16", "S_NCC", "Dice of means", "ECE |"]


def test_costs_are_of_100_samples_beside_the_papers():
    rows = [ACT_GTR, ATFM]  # 2 seeds x 24 images x 2 samples took 1.5 s
    assert cost_table("LIDC", rows).splitlines()[3:] == [
        "| act-gtr | 25 | 3,000 | 1.56 | - |", "| atfm | 25 | 3,000 | 1.56 | 113 |"]
    assert cost_table("LIDC_demo", rows).splitlines()[1:] == [
        "| cost | NFE per sample | parameters | s per image of 100 samples |", "|---|---|---|---|",
        "| act-gtr | 25 | 3,000 | 1.56 |", "| atfm | 25 | 3,000 | 1.56 |"]


def test_scores_are_shown_at_the_papers_n_where_it_was_drawn():
    assert columns((16, 32, 100))[:4] == ["GED16", "GED32", "GED100", "HM-IoU32"]
    assert columns((4, 8))[:3] == ["GED4", "GED8", "HM-IoU8"]
    assert columns((4, 8), compared=True) == ["GED4", "GED8", "HM-IoU8", "MDM8"]


def test_differences_are_ours_minus_the_others_with_intervals_over_patients():
    rows = [ACT_GTR, ATFM, row("sfm", [0.0], GED2=np.repeat([[0.0, 0.5]], [16, 8], axis=1))]
    lines = differences_table(rows, PATIENTS, (2,)).splitlines()[1:]
    assert lines[:3] == [
        "| difference (negative GED is better) | GED2 | HM-IoU2 | MDM2 |", "|---|---|---|---|",
        f"| atfm minus act-gtr | -0.150 [-0.150, -0.150]{2 * ' | -0.075 [-0.075, -0.075]'} |"]
    mean, low, high = bootstrap_interval(0.25 - rows[2].evaluation.scores["GED2"], PATIENTS)
    assert mean == pytest.approx(0.25 - 0.5 * 8 / 24) and low < 0.083 < high
    assert lines[3].startswith(f"| atfm minus sfm | {mean:+.3f} [{low:+.3f}, {high:+.3f}] | +0.125 ")
    assert "| sfm minus act-gtr |" in differences_table([ACT_GTR, rows[2]], PATIENTS, (2,))
    assert differences_table([ATFM], PATIENTS, (2,)) == ""


def test_few_patients_give_no_intervals_and_no_thirds_and_a_line_says_so():
    few = np.repeat([f"patient {i}" for i in range(9)], [3] * 6 + [2] * 3)
    text = report_tables(Metadata(crop=32), [ACT_GTR, ATFM], few, (2,))
    assert "| atfm minus act-gtr | -0.150 | -0.075 | -0.075 |" in text and "[" not in text
    assert "largest third" not in text and "| atfm, all, " in text
    *_, note, _, tested = text.splitlines()
    assert note == "No intervals and no parts by size: 9 test patients, and such numbers need 10."
    assert tested == ("Tested: LIDC, 32 x 32 pixels, split group, 24 images of 9 patients, 2 seeds of "
                      "sampling (0, 1).")
    text = report_tables(Metadata(), [row("atfm", [0.25])], PATIENTS, (2,))
    assert "largest third" in text and "No intervals" not in text
    assert text.endswith(", 24 images of 12 patients, 1 seed of sampling (0).\n")


def test_results_survive_json(tmp_path):
    report = results([ACT_GTR, ATFM], PATIENTS, "fingerprint", {"torch": "2"}, torch.device("cpu"),
                     evaluation=EvaluationConfig(samples=(2,)))
    write_text(tmp_path / "new" / "results.json", report)
    read = json.loads((tmp_path / "new" / "results.json").read_text())
    assert read["test_images"] == "fingerprint" and read["groups"] == PATIENTS.tolist()
    assert read["evaluation"]["samples"] == [2] and {"command", "commit", "hardware", "versions"} < set(read)
    system = read["systems"]["act-gtr"]
    assert (system["solver"], system["seconds"], system["ids"][23]) == ("euler", 1.5, "image 23")
    assert (system["preset"], system["training"]) == ("paper", {"GTR": {"lr": 1e-4}})
    assert system["scores"]["GED2"] == [[0.5] * 24, [0.3] * 24]


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
    mean, low, high = two_level_interval(values, np.arange(100), resamples=4000)
    half = 1.96 * np.hypot(of_runs.std() / 40**0.5, of_images.std() / 10)
    assert mean == values.mean() and (low, high) == pytest.approx((mean - half, mean + half), abs=0.03)
    # One run: over patients alone, as the plain interval. One patient: over runs alone.
    assert two_level_interval(values[:1], np.arange(100)) == pytest.approx(
        bootstrap_interval(values[0], np.arange(100)), abs=0.02)
    mean, low, high = two_level_interval(values, ["p"] * 100, resamples=4000)
    assert high - low == pytest.approx(2 * 1.96 * of_runs.std() / 40**0.5, rel=0.05)
