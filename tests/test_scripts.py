"""The five scripts from data to tables, on tiny data: as commands or, where that suffices, called here."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from metadata_manager import METHODS
from models import checkpoint, testing
from models.command_line import parse
from models.stages import train_gtr, train_prior
from models.testing import test_prior as run_test
from tests import tiny

ROOT = Path(__file__).parents[1]
ISIC = "isic3_style_concat"
SCORES = {"GED", "HM-IoU", "MDM", "Diversity"}


def command(script, *flags, cwd, **environment):
    """Runs `python <script> <flags>` in a folder, so that it writes into runs/ there."""
    variables = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(cwd), **environment}
    return subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=cwd, env=variables,
                          capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def lidc_runs(lidc, tmp_path_factory):
    """Folder with runs/LIDC as the three commands leave it, and what the last one printed."""
    folder = tmp_path_factory.mktemp("lidc_runs")
    printed = ""
    for line in ("train_GTR.py --what LIDC --epochs 1 --batchsize 256 --save_model True --save_model_step 50 "
                 + shlex.join(tiny.GTR),
                 "train_prior_LIDC.py --num_epochs 1 " + shlex.join(tiny.PRIOR),
                 "test_prior_LIDC.py --samples 16 32 100 --seeds 0 1 --steps 2 " + shlex.join(tiny.DATA)):
        done = command(*shlex.split(line), cwd=folder, ATFM_LIDC_PATH=str(lidc))
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    return folder / "runs" / "LIDC", printed


@pytest.fixture(scope="module")
def isic_runs(isic_folder, tmp_path_factory):
    """The same for ISIC3; GTR by a call."""
    folder = tmp_path_factory.mktemp("isic_runs")
    train_gtr("LIDC", ["--what", ISIC, *tiny.GTR, "--epochs", "1", "--data_path", str(isic_folder),
                       "--output_path", str(folder / "runs" / ISIC)])
    printed = ""
    for line in ("train_prior_ISIC.py --num_epochs 1 --batch_size 3 " + shlex.join(tiny.PRIOR),
                 "test_prior_ISIC.py --steps 2 " + shlex.join(tiny.TEST)):
        done = command(*shlex.split(line), cwd=folder, ATFM_ISIC3_STYLE_CONCAT_PATH=str(isic_folder))
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    return folder / "runs" / ISIC, printed


@pytest.fixture
def lidc_copy(lidc_runs, tmp_path):
    """A copy of the trained stages, to train and test more in."""
    for stage in ("GTR", "atfm"):
        shutil.copytree(lidc_runs[0] / stage, tmp_path / stage)
    return tmp_path


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(testing, "draw", lambda *arguments: None)


def rows(table):
    """The cells of a markdown table by their first column; the table ends at an empty line."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in table.split("\n\n")[0].splitlines()]
    return {line[0]: dict(zip(lines[0], line)) for line in lines[2:]}


def flags(data_path, output_path):
    return ["--data_path", str(data_path), "--output_path", str(output_path)]


def scores_of(folder):
    """Per image scores of each system in results.json."""
    systems = json.loads((folder / "test" / "results.json").read_text())["systems"]
    return {label: system["scores"] for label, system in systems.items()}


# What the scripts leave behind.

@pytest.mark.parametrize("runs", ["lidc_runs", "isic_runs"])
def test_the_three_steps_leave_checkpoints_tables_and_pictures(runs, request):
    folder, printed = request.getfixturevalue(runs)
    for stage in ("GTR", "atfm"):
        assert {"best.pt", "last.pt", "log.txt"} <= {path.name for path in (folder / stage).iterdir()}
        assert list((folder / stage).glob("events.out.tfevents*"))
    assert {path.name for path in (folder / "test").iterdir()} == {
        "results.json", "table.md", "act-gtr.png", "act-gtr_uncertainty.png", "atfm.png",
        "atfm_uncertainty.png"}
    assert (folder / "test" / "table.md").read_text() in printed


def test_results_hold_what_is_needed_to_repeat_them(lidc_runs):
    found = json.loads((lidc_runs[0] / "test" / "results.json").read_text())
    assert "test_prior_LIDC.py --samples 16 32 100 --seeds 0 1 --steps 2 --crop 8" in found["command"]
    assert found["versions"]["torch"] == torch.__version__
    assert "cores" in found["hardware"]
    assert found["run"]["seed"] == 0
    assert (found["metadata"]["what"], found["metadata"]["crop"]) == ("LIDC", 8)
    assert found["sampling"]["seeds"] == [0, 1]
    assert set(found["systems"]) == {"act-gtr", "atfm"}
    atfm = found["systems"]["atfm"]
    assert (atfm["method"], atfm["evaluations"], atfm["seeds"]) == ("atfm", 2, [0, 1])
    assert atfm["checkpoints"] == ["runs/LIDC/GTR/best.pt", "runs/LIDC/atfm/best.pt"]
    assert len(atfm["ids"]) == len(found["groups"]) == 6
    assert {f"{name}{n}" for name in SCORES for n in (16, 32, 100)} <= set(atfm["scores"])
    for runs in atfm["scores"].values():
        assert len(runs) == 2 and all(len(images) == 6 for images in runs)


def test_the_table_holds_the_mean_over_images_of_each_run_and_the_papers_row(lidc_runs):
    folder, printed = lidc_runs
    table = rows(printed)
    assert list(table) == ["act-gtr, ours", "act-gtr, paper", "atfm, ours", "atfm, paper"]
    first, second = (sum(images) / 6 for images in scores_of(folder)["atfm"]["GED32"])
    deviation = abs(first - second) / 2**0.5
    assert table["atfm, ours"]["GED32"] == f"{(first + second) / 2:.3f} +- {deviation:.3f}"
    paper = table["atfm, paper"]
    assert [paper[name] for name in ("GED16", "GED32", "GED100", "HM-IoU32", "MDM32", "ECE")] == [
        "0.206 +- 0.002", "0.188 +- 0.001", "0.162 +- 0.002", "0.667 +- 0.002", "0.948 +- 0.001", "-"]
    assert table["act-gtr, paper"]["GED100"] == "0.230"
    assert "| minus atfm |" in printed


def test_a_second_run_with_the_same_seed_repeats_weights_and_scores(lidc, lidc_runs, tmp_path, no_pictures):
    where = flags(lidc, tmp_path)
    train_gtr("LIDC", [*tiny.GTR, *where, "--epochs", "1"])
    train_prior("LIDC", [*tiny.PRIOR, *where, "--num_epochs", "1"])
    run_test("LIDC", [*tiny.DATA, *where, "--samples", "16", "32", "100", "--seeds", "0", "1",
                      "--steps", "2"])
    for stage in ("GTR", "atfm"):
        ours, theirs = (checkpoint.load(folder / stage / "best.pt") for folder in (tmp_path, lidc_runs[0]))
        assert all(torch.equal(ours["model"][name], weight) for name, weight in theirs["model"].items())
    assert scores_of(tmp_path) == scores_of(lidc_runs[0])


def test_another_seed_gives_other_weights(lidc, lidc_runs, tmp_path):
    train_gtr("LIDC", [*tiny.GTR, *flags(lidc, tmp_path), "--epochs", "1", "--seed", "1"])
    ours, theirs = (checkpoint.load(folder / "GTR" / "best.pt")["model"]
                    for folder in (tmp_path, lidc_runs[0]))
    assert not torch.equal(ours["mean.weight"], theirs["mean.weight"])


def test_the_pickle_folder_trains_too(lidc_folder, tmp_path):
    train_gtr("LIDC", [*tiny.GTR, *flags(lidc_folder, tmp_path), "--epochs", "1"])
    assert checkpoint.load(tmp_path / "GTR" / "best.pt")["training_ids"][0].startswith("LIDC-IDRI-00")


@pytest.mark.parametrize("what", ["LIDC_demo", "isic3_demo"])
def test_the_embedded_sets_train_without_a_path(what, tmp_path):
    train_gtr("LIDC", ["--what", what, *tiny.GTR, "--epochs", "1", "--output_path", str(tmp_path)])
    assert (tmp_path / "GTR" / "best.pt").exists()


def test_no_checkpoint_is_left_if_none_is_wanted(lidc, tmp_path):
    train_gtr("LIDC", [*tiny.GTR, *flags(lidc, tmp_path), "--epochs", "1", "--save_model", "False"])
    assert not list(tmp_path.glob("*/*.pt"))


def test_a_gtr_may_be_named_by_its_folder_or_its_file(lidc, lidc_runs, tmp_path):
    for number, gtr in enumerate((lidc_runs[0] / "GTR", lidc_runs[0] / "GTR" / "last.pt")):
        train_prior("LIDC", [*tiny.PRIOR, *flags(lidc, tmp_path / str(number)), "--num_epochs", "1",
                             "--gtr", str(gtr)])
        assert (tmp_path / str(number) / "atfm" / "best.pt").exists()


# Several systems side by side.

def test_every_method_trains_and_tests(lidc, lidc_copy, no_pictures, capsys):
    where = flags(lidc, lidc_copy)
    for method in set(METHODS) - {"atfm"}:
        train_prior("LIDC", [*tiny.PRIOR, *where, "--num_epochs", "1", "--method", method])
        assert checkpoint.load(lidc_copy / method / "best.pt")["stage"] == method
    capsys.readouterr()
    run_test("LIDC", [*tiny.TEST, *where, "--steps", "1", "--seeds", "0", "--methods", "act-gtr", *METHODS])
    table = rows(capsys.readouterr().out)
    assert {name: row["evaluations"] for name, row in table.items()} == {
        "act-gtr, ours": "0", "act-gtr, paper": "", "atfm, ours": "1", "atfm, paper": "",
        "atfm-no-sf, ours": "1", "atfm-no-sf, paper": "", "sfm, ours": "1", "sfm, paper": "",
        "sfm-no-sf, ours": "1", "sfm-no-sf, paper": "",
        "cfm, ours": "4"}  # two per midpoint step, each with and without the image


def test_each_number_of_steps_and_each_solver_has_a_row(lidc, lidc_copy, no_pictures):
    run_test("LIDC", [*tiny.TEST, *flags(lidc, lidc_copy), "--methods", "atfm", "--steps", "1", "2",
                      "--solver", "euler", "heun", "--seeds", "0"])
    systems = json.loads((lidc_copy / "test" / "results.json").read_text())["systems"]
    assert {label: system["evaluations"] for label, system in systems.items()} == {
        "atfm, euler, 1 steps": 1, "atfm, euler, 2 steps": 2,
        "atfm, heun, 1 steps": 2, "atfm, heun, 2 steps": 4}
    assert systems["atfm, euler, 1 steps"]["scores"] != systems["atfm, euler, 2 steps"]["scores"]


def test_the_number_of_steps_in_training_is_that_of_testing(lidc, lidc_copy, no_pictures):
    train_prior("LIDC", [*tiny.PRIOR, *flags(lidc, lidc_copy), "--num_epochs", "1", "--method", "sfm",
                         "--steps", "3"])
    run_test("LIDC", [*tiny.TEST, *flags(lidc, lidc_copy), "--methods", "sfm"])
    assert json.loads((lidc_copy / "test" / "results.json").read_text())["systems"]["sfm"]["evaluations"] == 3


def test_each_alpha_is_trained_and_tested_on_its_own(lidc, lidc_copy, no_pictures):
    train_prior("LIDC", [*tiny.PRIOR, *flags(lidc, lidc_copy), "--num_epochs", "1", "--alphas", "0", "5e-4"])
    folders = {alpha: lidc_copy / f"atfm_alpha_{alpha}" for alpha in ("0", "0.0005")}
    configs = {alpha: checkpoint.load(folder / "best.pt")["config"] for alpha, folder in folders.items()}
    assert {alpha: config["alpha"] for alpha, config in configs.items()} == {"0": 0.0, "0.0005": 5e-4}
    run_test("LIDC", [*tiny.TEST, *flags(lidc, lidc_copy), "--methods", "atfm", "--alphas", "0", "5e-4",
                      "--steps", "1"])
    assert set(scores_of(lidc_copy)) == {"atfm, alpha 0", "atfm, alpha 0.0005"}


def test_the_released_preset_runs_and_prints_its_overlap(lidc, tmp_path, no_pictures, capsys):
    where = [*flags(lidc, tmp_path), "--preset", "released"]
    train_gtr("LIDC", [*tiny.GTR, *where, "--epochs", "1", "--limit", "30"])
    train_prior("LIDC", [*tiny.PRIOR, *where, "--num_epochs", "1", "--limit", "30"])
    config = checkpoint.load(tmp_path / "GTR" / "best.pt")["config"]
    expected = {"convs": 3, "pool": "avg", "up": "bilinear", "weight_decay": 1e-4}
    assert {name: config[name] for name in expected} == expected
    config = checkpoint.load(tmp_path / "atfm" / "best.pt")["config"]
    expected = {"weight_standardization": "released", "time_scale": 1.0, "dice": "thresholded"}
    assert {name: config[name] for name in expected} == expected
    capsys.readouterr()
    run_test("LIDC", [*tiny.TEST, *where, "--limit", "30", "--steps", "1"])
    printed = capsys.readouterr().out
    found = re.search(
        r"split released: (\d) of 6 test images .* in the training list; use --split group", printed)
    assert int(found[1]) > 0
    assert f"atfm/best.pt: {found[1]} of the 6 test images were trained on" in printed


# Mistakes end with one line and exit code 1.

def test_a_mistake_ends_a_command_with_one_line_and_code_1(tmp_path):
    done = command("train_GTR.py", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == ("error: LIDC: data_path 'datasets/LIDC' does not exist; edit PATHS in "
                           "metadata_manager.py, set ATFM_LIDC_PATH or pass --data_path\n")


def mistake(script, *arguments):
    """The one line that a script ends with."""
    with pytest.raises(SystemExit) as end:
        script("LIDC", [str(argument) for argument in arguments])
    assert isinstance(end.value.code, str) and "\n" not in end.value.code  # what sys.exit prints, with code 1
    return end.value.code


def test_a_missing_gtr_is_named(lidc, tmp_path):
    found = mistake(train_prior, *tiny.PRIOR, *flags(lidc, tmp_path))
    assert found.startswith(f"error: {tmp_path}/GTR") and "train that stage first" in found


def test_a_checkpoint_of_the_other_step_is_refused(lidc, lidc_runs, tmp_path):
    gtr, flow = (lidc_runs[0] / stage / "best.pt" for stage in ("GTR", "atfm"))
    found = mistake(run_test, *tiny.TEST, *flags(lidc, tmp_path), "--gtr", gtr, "--prior", gtr)
    assert found.startswith(f"error: {gtr}: a checkpoint of stage GTR, expected atfm")
    found = mistake(train_prior, *tiny.PRIOR, *flags(lidc, tmp_path), "--gtr", flow)
    assert found.startswith(f"error: {flow}: a checkpoint of stage atfm, expected GTR")


def test_one_flow_for_several_methods_is_refused(lidc, lidc_runs):
    found = mistake(run_test, *tiny.TEST, *flags(lidc, lidc_runs[0]), "--methods", "atfm", "sfm",
                    "--prior", "some.pt")
    assert "--prior names one flow, but --methods atfm sfm asks for 2" in found


def test_a_gtr_for_other_images_is_refused(isic_folder, lidc_runs, tmp_path):
    with pytest.raises(SystemExit, match="trained on 1-channel images of LIDC, but isic3_style_concat has 3"):
        train_prior(ISIC, [*tiny.PRIOR, *flags(isic_folder, tmp_path), "--gtr", str(lidc_runs[0] / "GTR")])


def test_data_of_another_size_is_refused(isic_folder, tmp_path):
    data_path = ROOT / "data" / "LIDC_demo.h5"
    assert mistake(train_gtr, *tiny.GTR, *flags(data_path, tmp_path)) == (
        f"error: {data_path}: (64, 64) pixels per side, expected (128, 128) for LIDC; is it the right file?")


def test_a_damaged_checkpoint_is_named(lidc, lidc_copy):
    path = lidc_copy / "atfm" / "best.pt"
    path.write_bytes(path.read_bytes()[:1000])
    found = mistake(run_test, *tiny.TEST, *flags(lidc, lidc_copy))
    assert found.startswith(f"error: {path}: not a readable checkpoint")


def test_an_unavailable_device_is_named(lidc, tmp_path):
    assert "--device cuda:99" in mistake(train_gtr, *tiny.GTR, *flags(lidc, tmp_path), "--device", "cuda:99")


def test_a_model_is_not_tested_on_what_it_was_trained_on(lidc, lidc_copy, no_pictures, capsys):
    arguments = [*tiny.TEST, *flags(lidc, lidc_copy), "--split_seed", "1", "--limit", "30", "--steps", "1"]
    found = mistake(run_test, *arguments)
    both = int(re.search(r"GTR/best.pt: (\d) of the 6 test images were trained on", found)[1])
    assert both > 0 and "--allow_overlap True" in found
    assert not (lidc_copy / "test").exists()
    run_test("LIDC", [*arguments, "--allow_overlap", "True"])
    warning = f"warning: {lidc_copy}/GTR/best.pt: {both} of the 6 test images were trained on"
    assert warning in capsys.readouterr().out


def test_a_flow_over_another_gtr_is_pointed_out(lidc, lidc_copy, tmp_path, no_pictures, capsys):
    train_gtr("LIDC", [*tiny.GTR, *flags(lidc, tmp_path / "other"), "--epochs", "1", "--seed", "1"])
    run_test("LIDC", [*tiny.TEST, *flags(lidc, lidc_copy), "--steps", "1",
                      "--gtr", str(tmp_path / "other" / "GTR")])
    assert "best.pt was trained over another GTR than the one given" in capsys.readouterr().out


# What the documentation says.

COMMAND = re.compile(r"python (train|test)_(GTR|prior_LIDC|prior_ISIC)\.py([^\n`&]*)")
DOCUMENTED = [(path.name, *found) for path in [ROOT / "README.md", *sorted(ROOT.glob("*_*.py"))]
              for found in COMMAND.findall(path.read_text())]


@pytest.mark.parametrize("where, step, script, line", DOCUMENTED)
def test_documented_commands_are_accepted(where, step, script, line):
    stage = "gtr" if script == "GTR" else "prior"
    parts = ("metadata", "sampling") if step == "test" else ("metadata", stage, "loop")
    parse(shlex.split(line), ISIC if script == "prior_ISIC" else "LIDC", parts, "")


def test_commands_are_documented():
    assert len(DOCUMENTED) >= 10


def test_stages_of_another_image_size_are_refused(lidc, lidc_runs, tmp_path):
    where = ["--data_path", str(lidc), "--output_path", str(lidc_runs[0]), "--device", "cpu"]
    for stage in (lambda: train_prior("LIDC", [*where, "--crop", "16"]), lambda: run_test("LIDC", where)):
        with pytest.raises(SystemExit, match="trained on 8 x 8 pixels.*pass the same --crop to all stages"):
            stage()
