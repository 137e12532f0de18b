"""The five scripts from data to tables, on tiny data: called here or, to see exit codes, as commands."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import test_prior_ISIC
import test_prior_LIDC
import train_GTR
import train_prior_ISIC
import train_prior_LIDC
from metadata_manager import BASELINES, CONTROLS, FLOWS, METHODS
from metrics.paper import PAPER, not_trained_here
from metrics.report import FLOOR
from models import checkpoint
from tests import tiny
from tests.tiny import where

ROOT = Path(__file__).parents[1]
EPOCH = ["--epochs", "1"]  # of GTR
PRIOR = [*tiny.PRIOR, "--num_epochs", "1"]
BASELINE = [*PRIOR, "--annotators_per_pass", "1"]
THOROUGH = [*tiny.DATA, "--samples", "16", "32", "--seeds", "0", "1", "--steps", "1"]
TEST = [*tiny.DATA, "--samples", "2", "--seeds", "0", "--steps", "1"]


def rows(table):
    """The cells of a markdown table by their first column; the table ends at an empty line."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in table.split("\n\n")[0].splitlines()]
    return {line[0]: dict(zip(lines[0], line)) for line in lines[2:]}


def results(folder):
    return json.loads((folder / "test" / "results.json").read_text())


def scores_of(folder):
    """Per image scores of each system."""
    return {label: system["scores"] for label, system in results(folder)["systems"].items()}


# What the scripts leave behind.

@pytest.mark.slow
def test_the_scripts_leave_checkpoints_tables_and_pictures(isic_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATFM_ISIC3_STYLE_CONCAT_PATH", str(isic_folder))
    train_GTR.main(["--what", "isic3_style_concat", *tiny.GTR, *EPOCH])
    train_prior_ISIC.main([*PRIOR, "--batch_size", "3"])
    test_prior_ISIC.main([*TEST, "--methods", "atfm"])
    folder = tmp_path / "runs" / "isic3_style_concat"
    for stage in ("GTR", "atfm"):
        assert {"best.pt", "last.pt", "log.txt"} <= {path.name for path in (folder / stage).iterdir()}
        assert list((folder / stage).glob("events.out.tfevents*"))
    assert {path.name for path in (folder / "test").iterdir()} == {
        "settings.json", "scores.1of1.0.jsonl", "results.json", "table.md", "parts.png", "report.html",
        "atfm.png"}
    assert results(folder)["metadata"]["channels"] == 3


@pytest.fixture(scope="module")
def tested(lidc, run, tmp_path_factory):
    """The folder of the run's test."""
    folder = tmp_path_factory.mktemp("tested")
    with pytest.MonkeyPatch.context() as patch:
        tiny.draw_nothing(patch)
        test_prior_LIDC.main([*THOROUGH, *where(lidc, folder), "--gtr", str(run), "--prior", str(run)])
    return folder


def test_a_test_leaves_a_table_and_what_is_needed_to_repeat_it(run, tested):
    assert list(rows((tested / "test" / "table.md").read_text())) == [
        "act-gtr, ours", "act-gtr, paper's Table 4", "atfm, ours", "atfm, paper's Table 1", FLOOR]
    report = results(tested)
    assert report["versions"]["torch"] == torch.__version__ and "cores" in report["hardware"]
    assert (report["run"]["seed"], report["sampling"]["seeds"]) == (0, [0, 1])
    assert (report["metadata"]["what"], report["metadata"]["crop"]) == ("LIDC", 8)
    assert set(report["systems"]) == {"act-gtr", "atfm"}
    atfm = report["systems"]["atfm"]
    assert (atfm["method"], atfm["nfe"], atfm["seeds"]) == ("atfm", 1, [0, 1])
    assert atfm["checkpoints"] == [f"{run}/GTR/best.pt", f"{run}/atfm/best.pt"]
    assert len(atfm["ids"]) == len(report["groups"]) == 6
    assert {f"{name}{n}" for name in ("GED", "HM-IoU", "MDM", "Diversity") for n in (16, 32)} <= set(
        atfm["scores"])
    assert all(len(runs) == 2 and len(runs[0]) == len(runs[1]) == 6 for runs in atfm["scores"].values())


def test_the_same_seed_repeats_weights_and_scores_and_another_does_not(lidc, run, tested, tmp_path,
                                                                     no_pictures):
    for script, flags in ((train_GTR, [*tiny.GTR, *EPOCH]), (train_prior_LIDC, PRIOR)):
        torch.manual_seed(1)  # whatever was drawn before
        script.main([*flags, *where(lidc, tmp_path)])
    test_prior_LIDC.main([*THOROUGH, *where(lidc, tmp_path)])
    for stage in ("GTR", "atfm"):
        tiny.assert_same_runs(tmp_path / stage, run / stage)
    assert scores_of(tmp_path) == scores_of(tested)
    train_GTR.main([*tiny.GTR, *where(lidc, tmp_path / "other"), *EPOCH, "--seed", "1"])
    ours, theirs = (checkpoint.load(folder / "GTR" / "best.pt") for folder in (tmp_path / "other", run))
    assert not torch.equal(ours["model"]["mean.weight"], theirs["model"]["mean.weight"])


def test_a_run_of_an_older_version_goes_on_and_is_tested(lidc, run_copy, no_pictures):
    for path in run_copy.glob("*/*.pt"):
        tiny.to_older_form(path)
    train_prior_LIDC.main([*PRIOR, *where(lidc, run_copy), "--num_epochs", "2"])
    assert checkpoint.load(run_copy / "atfm" / "last.pt")["state"]["epoch"] == 2
    test_prior_LIDC.main([*TEST, *where(lidc, run_copy)])
    # Which preset they are of, checkpoints did not say.
    assert {name.partition(" ")[0] for name in scores_of(run_copy)} == {"act-gtr", "atfm"}


@pytest.mark.parametrize("what", ["LIDC_demo", "isic3_demo"])
def test_the_embedded_sets_train_without_a_path(what, tmp_path, no_pictures):
    train_GTR.main(["--what", what, *tiny.GTR, *EPOCH, "--output_path", str(tmp_path), "--ema", "0.9"])
    assert "unaveraged" in checkpoint.load(tmp_path / "GTR" / "best.pt")


def test_the_pickle_folder_trains_too(lidc_folder, tmp_path, no_pictures):
    train_GTR.main([*tiny.GTR, *where(lidc_folder, tmp_path), *EPOCH])
    assert checkpoint.load(tmp_path / "GTR" / "best.pt")["training_ids"][0].startswith("LIDC-IDRI-00")


# Several systems side by side.

@pytest.mark.slow
def test_every_method_trains_and_tests(lidc, run_copy, no_pictures):
    methods = [method for method in METHODS if not method.startswith("c-")]  # these need the experts' styles
    for method in set(methods) - {"atfm"}:
        flags = PRIOR if method in FLOWS else BASELINE
        train_prior_LIDC.main([*flags, *where(lidc, run_copy), "--method", method])
        assert checkpoint.load(run_copy / method / "best.pt")["stage"] == method
    test_prior_LIDC.main([*TEST, *where(lidc, run_copy), "--methods", "act-gtr", *CONTROLS, *methods])
    table = rows((run_copy / "test" / "table.md").read_text())
    assert {name: row["NFE"] for name, row in table.items()} == {
        "act-gtr, ours": "0", "act-gtr-emptied, ours": "0", "atfm, ours": "1",
        "atfm-no-sf, ours": "1", "sfm, ours": "1", "sfm-no-sf, ours": "1",
        "cfm, ours": "4", "cfm-mmis, ours": "4",  # two per midpoint step, each with and without the image
        **{f"{method}, {paper.source}": "" for method, paper in PAPER["LIDC"].items()
           if method in ("act-gtr", *methods)},
        **{f"{method}, ours": "1" for method in BASELINES if method in methods},
        **{f"{name}, {paper.source} (not trained here)": ""
           for name, paper in not_trained_here("LIDC").items()},
        FLOOR: ""}


def test_what_needs_styles_is_trained_where_there_are_some(isic_folder, lidc, tmp_path, no_pictures):
    for method in ("c-ssn", "c-prob-unet"):
        train_prior_ISIC.main([*BASELINE, *where(isic_folder, tmp_path), "--method", method])
    test_prior_ISIC.main([*TEST[:-2], *where(isic_folder, tmp_path), "--methods", "c-ssn", "c-prob-unet"])
    table = rows((tmp_path / "test" / "table.md").read_text())
    assert set(table) == {"c-ssn, ours", "c-ssn, paper's Table 2", "c-prob-unet, ours",
                          "c-prob-unet, paper's Table 2", FLOOR}
    with pytest.raises(ValueError, match="has no style of the experts' masks"):
        train_prior_LIDC.main([*BASELINE, *where(lidc, tmp_path), "--method", "c-ssn"])


@pytest.mark.slow
def test_each_alpha_is_trained_and_tested_on_its_own(lidc, run_copy, no_pictures):
    train_prior_LIDC.main([*PRIOR, *where(lidc, run_copy), "--alphas", "0", "5e-4"])
    for alpha, folder in ((0.0, "atfm_alpha_0"), (5e-4, "atfm_alpha_0.0005")):
        assert checkpoint.load(run_copy / folder / "best.pt")["config"]["alpha"] == alpha
    test_prior_LIDC.main([*TEST, *where(lidc, run_copy), "--methods", "atfm", "--alphas", "0", "5e-4"])
    assert set(scores_of(run_copy)) == {"atfm, alpha 0", "atfm, alpha 0.0005"}
    assert (run_copy / "test" / "sweep.png").exists()


def test_the_released_preset_runs_and_prints_its_overlap(lidc, tmp_path, no_pictures, capsys):
    flags = [*where(lidc, tmp_path), "--preset", "released"]
    train_GTR.main([*tiny.GTR, *flags, *EPOCH, "--limit", "30"])
    train_prior_LIDC.main([*PRIOR, *flags, "--limit", "30"])
    config = checkpoint.load(tmp_path / "GTR-released" / "best.pt")["config"]
    assert [config[name] for name in ("convs", "pool", "up", "weight_decay")] == [3, "avg", "bilinear", 1e-4]
    config = checkpoint.load(tmp_path / "atfm-released" / "best.pt")["config"]
    assert [config[name] for name in ("weight_standardization", "time_scale", "dice", "dice_over")] == [
        "released", 1.0, "thresholded", "batch"]
    test_prior_LIDC.main([*TEST, *flags, "--limit", "30"])
    printed = capsys.readouterr().out
    overlap = re.search(r"split released: (\d) of 6 test images .* are in the training list", printed)
    assert int(overlap[1]) > 0
    assert f"atfm-released/best.pt: {overlap[1]} of the 6 test images were trained on" in printed


# As commands.

SCRIPTS = ("train_GTR", "train_prior_LIDC", "train_prior_ISIC", "test_prior_LIDC", "test_prior_ISIC")


def command(script, *flags, cwd, **environment):
    """Runs `python <script>.py <flags>` in a folder, so that it writes into runs/ there."""
    variables = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(cwd), **environment}
    return subprocess.run([sys.executable, str(ROOT / f"{script}.py"), *flags], cwd=cwd, env=variables,
                          capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mistake_ends_a_command_with_one_line_and_code_1(script, tmp_path):
    done = command(script, cwd=tmp_path)
    assert done.returncode == 1 and re.fullmatch(r"device: .*\n", done.stdout)
    what, folder = ("isic3_style_concat", "ISIC3") if script.endswith("ISIC") else ("LIDC", "LIDC")
    assert done.stderr == (
        f"error: {what}: data_path 'datasets/{folder}' does not exist; edit PATHS in metadata_manager.py, "
        f"set ATFM_{what.upper()}_PATH or pass --data_path\n")


@pytest.mark.slow
def test_the_commands_of_the_readme_write_into_runs(lidc, tmp_path):
    for script, flags in (("train_GTR", [*tiny.GTR, *EPOCH]), ("train_prior_LIDC", PRIOR),
                          ("test_prior_LIDC", TEST)):
        done = command(script, *flags, cwd=tmp_path, ATFM_LIDC_PATH=str(lidc))
        assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "LIDC"
    assert (folder / "test" / "table.md").read_text().partition("\n## Training")[0] in done.stdout
    assert "test_prior_LIDC.py --crop 8 --limit 6" in results(folder)["command"]
    assert results(folder)["systems"]["atfm"]["checkpoints"][1] == "runs/LIDC/atfm/best.pt"
