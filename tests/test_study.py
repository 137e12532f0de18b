"""The study trains what it says, once, and computes its table and picture from what is there."""

import json
import math
from dataclasses import fields
from pathlib import Path

import pytest

from metadata_manager import (
    EvaluationConfig,
    FlowConfig,
    GTRConfig,
    LoopConfig,
    Metadata,
    Objective,
    RunConfig,
    parse,
)
from tests.benchmarks import gain, study

SCRIPTS = {"train_GTR": (GTRConfig, LoopConfig), "train_prior_LIDC": (FlowConfig, LoopConfig),
           "test_prior_LIDC": (EvaluationConfig,)}
PAPER, PLAIN, ALL_EXPERTS, LEAK = (study.VARIANTS[number].name for number in (0, 3, 12, 14))


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Scripts that only parse and note what they were asked for, (script, folder, flags); made-up results.

    ATFM's GED is 0.4 in the first row, 0.3 without weight standardization, higher by 0.02 per seed."""
    asked = []

    def script(name):
        def main(argv):
            parse(argv, "LIDC", "", RunConfig, Metadata, *SCRIPTS[name])
            folder = Path(argv[argv.index("--output_path") + 1])
            asked.append((name, str(folder.relative_to(tmp_path)), " ".join(argv)))
            if name == "train_GTR":
                (folder / "GTR").mkdir(parents=True, exist_ok=True)
            if name == "test_prior_LIDC":
                ged = (0.3 if "none" in folder.name else 0.4) + 0.02 * int(argv[argv.index("--seed") + 1])
                scores = {"act-gtr": {"GED16": [[0.5, 0.7, 0.6]], "HM-IoU16": [[0.5, 0.5, 0.5]]},
                          "atfm": {"GED16": [[ged, ged, ged]], "HM-IoU16": [[0.4, 0.5, 0.9]]}}
                results = {"test_images": "split" in folder.name, "groups": ["a", "a", "b"],
                           "systems": {system: {"scores": of} for system, of in scores.items()}}
                (folder / "test").mkdir(parents=True)
                (folder / "test" / "results.json").write_text(json.dumps(results))
        return main

    for name in SCRIPTS:
        monkeypatch.setattr(getattr(study, name), "main", script(name))
    return asked


def run(folder, rows, seeds=("0",)):
    study.main(["--data_path", "lidc.h5", "--output_path", str(folder), "--rows", *rows, "--seeds", *seeds])


@pytest.mark.slow
def test_a_row_trains_its_own_gtr_only_where_it_differs_and_nothing_twice(trained, tmp_path, monkeypatch):
    """A GTR that is there may have been stopped: its script is asked again, and knows whether it is done."""
    monkeypatch.setattr(study.fig, "save", lambda *_: None)  # takes a second
    run(tmp_path, [PLAIN, ALL_EXPERTS], ["0", "2"])
    gtrs = [folder for script, folder, _ in trained if script == "train_GTR"]
    own = "all_experts_per_step_in_GTR"
    asked = ["paper", "paper", own]
    assert gtrs == [f"{seed}/{folder}" for seed in ("seed0", "seed2") for folder in asked]
    flows = {folder: flags for script, folder, flags in trained if script == "train_prior_LIDC"}
    assert "--weight_standardization none" in flows["seed2/weight_standardization_none"]
    assert f"--gtr {tmp_path}/seed2/paper/GTR" in flows["seed2/weight_standardization_none"]
    assert "--seed 2" in flows["seed2/weight_standardization_none"]
    after = [flags for script, folder, flags in trained if folder == f"seed0/{own}" and script != "train_GTR"]
    assert len(after) == 2 and all(f"--gtr {tmp_path}/seed0/{own}/GTR" in flags for flags in after)
    done = len(trained)
    run(tmp_path, [PLAIN])
    assert len(trained) == done


@pytest.mark.slow
def test_the_table_compares_runs_of_the_same_seeds_on_the_same_images(trained, tmp_path, capsys):
    run(tmp_path, [PAPER], ["0", "1"])
    run(tmp_path, [PLAIN, LEAK], ["1"])
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:])
    cells = {name: of_row for name, *of_row in rows}
    assert cells[PAPER][:5] == ["2", "0.600", "0.500", "0.410", "0.600"]
    assert cells[PAPER][6] == "-"
    assert cells[PLAIN][0] == "1"
    assert cells[PLAIN][6] == "-0.100 [-0.100, -0.100]"  # seed 1 of both
    spread = math.hypot(0.15, 0.3)  # each 0.6 [0.45, 0.9], of other images: not paired
    assert cells[LEAK][8] == f"+0.000 [{-spread:+.3f}, {spread:+.3f}]"
    assert cells[PAPER][7].startswith("+0.100 [-0.050, +0.400]")  # patients a (two images) and b
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_the_scripts_know_the_flags_of_every_row(trained, tmp_path):
    for variant in study.VARIANTS:
        study.run(study.CHOICES, variant, tmp_path, ["--data_path", "lidc.h5", "--seed", "0"])
    assert len({folder for _, folder, _ in trained}) == len(study.VARIANTS)


def test_the_gain_is_of_the_same_run_and_in_per_cent_of_the_control():
    def result(ged):
        empty = {"Empty": [[0.5, 0.25]], "Experts empty": [[0.5, 0.0]]}
        scores = {"act-gtr": {"GED16": [[0.4, 0.4]], "HM-IoU16": [[0.4, 0.4]], **empty},
                  "act-gtr-emptied": {"GED16": [[0.3, 0.3]], "HM-IoU16": [[0.5, 0.5]], **empty},
                  "atfm": {"GED16": [[ged, ged]], "HM-IoU16": [[0.6, 0.6]], **empty}}
        return {"groups": ["a", "b"],
                "systems": {name: {"nfe": 2, "scores": of} for name, of in scores.items()}}

    runs = {0: result(0.2), 1: result(0.3)}
    *_, gtr, emptied, best = gain.table({"best": runs}).splitlines()
    assert gtr == "| Act. GTR | 2 | 2 | 0.400 | 0.400 |  |  |  |  | 0.38, +1.00 |"
    assert emptied.startswith("| emptied | 2 | 2 | 0.300 | 0.500 |")
    twice = "+0.200 [+0.200, +0.200] (+50%)"
    ours = (f"| best | 2 | 2 | 0.250 | 0.600 | -0.150 [-0.200, -0.100] (-38%) | {twice} "
            "| -0.050 [-0.100, +0.000] (-17%) | +0.100 [+0.100, +0.100] (+20%) ")
    assert best == f"{ours}| 0.38, +1.00 |"
    found = {"best": runs, gain.ALONE[1]: {0: result(0.2)}}
    *_, best, alone = gain.table(found).splitlines()
    assert best == f"{ours}| 0.38, +1.00 |"
    assert alone.startswith(f"| {gain.ALONE[1]} | 1 | 2 | 0.400 | 0.400 |  |")
    assert gain.alone_table(found).splitlines()[3:] == [  # seed 0, which both have
        f"| best | {gain.ALONE[1]} | -0.200 [-0.200, -0.200] (-50%) | {twice} |"]
    assert gain.runs_table("best", runs).splitlines()[3] == (
        "| 0 | -0.200 [-0.200, -0.200] | +0.200 [+0.200, +0.200] | -0.100 [-0.100, -0.100] "
        "| +0.100 [+0.100, +0.100] |")


def test_the_scripts_know_the_flags_of_every_row_of_the_gain():
    for variant in gain.ROWS:
        common = ["--what", "LIDC"]
        parse([*gain.GTR, *common, *(variant.gtr or "").split()], "LIDC", "", RunConfig, Metadata, GTRConfig,
              LoopConfig)
        parse([*gain.FLOW, *common, *(variant.flow or "").split()], "LIDC", "", RunConfig, Metadata,
              FlowConfig, LoopConfig)
        parse([*gain.TEST, *common, *variant.test.split()], "LIDC", "", RunConfig, Metadata, EvaluationConfig)
    assert len({variant.folder for variant in gain.ROWS}) == len(gain.ROWS)


def test_the_row_best_has_what_the_preset_best_learns():
    def objective(*flags):
        _, found, _ = parse(flags, "LIDC", "", RunConfig, FlowConfig, LoopConfig)
        return {one.name: getattr(found, one.name) for one in fields(Objective)}

    (row,) = (row for row in gain.ROWS if row.name == "best")
    assert objective(*gain.FLOW, *row.flow.split(), *row.test.split()) == objective("--preset", "best")
