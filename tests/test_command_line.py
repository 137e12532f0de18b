"""Flags: generated from the dataclasses, strict, and in the order defaults < preset < method < flags."""

import dataclasses
import shlex

import pytest

from metadata_manager import (
    EXPERIMENTS,
    PATHS,
    GTRConfig,
    LoopConfig,
    Metadata,
    PriorConfig,
    RunConfig,
    SamplingConfig,
)
from models.command_line import parse

PARTS = {"gtr": ("metadata", "gtr", "loop"), "prior": ("metadata", "prior", "loop"),
         "test": ("metadata", "sampling")}
CLASSES = {"metadata": Metadata, "gtr": GTRConfig, "prior": PriorConfig, "loop": LoopConfig,
           "sampling": SamplingConfig}


def read(line, stage="prior", what="LIDC"):
    """The settings of a command line, split as a shell does."""
    return parse(shlex.split(line), what, PARTS[stage], "")


def refused(line, capsys, stage="prior"):
    """What a refused command line prints last."""
    with pytest.raises(SystemExit) as exit:
        read(line, stage)
    assert exit.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def help_of(stage, capsys):
    with pytest.raises(SystemExit) as exit:
        read("--help", stage)
    assert exit.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("stage", PARTS)
def test_every_setting_is_a_flag_with_its_reason(stage, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no line breaks within a reason
    text = " ".join(help_of(stage, capsys).split())
    for kind in (RunConfig, *(CLASSES[part] for part in PARTS[stage])):
        for field in dataclasses.fields(kind):
            if field.metadata:
                assert f"--{field.name} " in text
                assert field.metadata["why"] in text


def test_facts_about_a_dataset_are_not_flags(capsys):
    assert "--annotators 5" in refused("--annotators 5", capsys)


def test_without_flags_the_settings_are_those_of_the_dataset():
    for what, expected in EXPERIMENTS.items():
        for stage in PARTS:
            found = read("", stage, what)
            assert dataclasses.replace(found.experiment.metadata, data_path="") == expected.metadata
            assert found.experiment.metadata.data_path == PATHS[what]
            assert dataclasses.replace(found.experiment, metadata=expected.metadata) == expected
            assert found.run == RunConfig()


@pytest.mark.parametrize("text, value", [("True", True), ("true", True), ("1", True),
                                         ("False", False), ("false", False), ("0", False)])
def test_booleans_are_read_as_they_read(text, value):
    assert read(f"--save_model {text}").experiment.loop.save_model is value


@pytest.mark.parametrize("line, message", [
    ("--save_model no", "argument --save_model: 'no': expected True or False"),
    ("--save_model", "argument --save_model: expected one argument"),
    ("--lrr 1e-3", "unrecognized arguments: --lrr 1e-3"),
    ("--num_epoch 3", "unrecognized arguments: --num_epoch 3"),  # no abbreviations
    ("--epochs 3", "unrecognized arguments: --epochs 3"),  # a flag of the other stage
    ("--dim sixteen", "argument --dim: invalid int value: 'sixteen'"),
    ("--dim 16.5", "argument --dim: invalid int value: '16.5'"),
    ("--solver eular", "argument --solver: invalid choice: 'eular'"),
    ("--method ATFM", "argument --method: invalid choice: 'ATFM'"),
    ("--what lidc", "--what lidc: unknown dataset; expected one of LIDC, isic3_style_concat"),
    ("--preset paper2", "--preset paper2: unknown; expected one of paper, released, best"),
])
def test_mistakes_are_refused_by_name(line, message, capsys):
    assert message in refused(line, capsys)


@pytest.mark.parametrize("line, part, name, value", [
    ("--lr 1e-3", "prior", "lr", 1e-3),
    ("--lr=1e-3", "prior", "lr", 1e-3),
    ("--dim_mults 1 2", "prior", "dim_mults", (1, 2)),
    ("--alphas 0 1e-4 --dim 8", "prior", "alphas", (0.0, 1e-4)),
    ("--gtr some/folder", "prior", "gtr", "some/folder"),
    ("--limit 20", "metadata", "limit", 20),
    ("--split_seed 3", "metadata", "split_seed", 3),
    ("--skip_nonfinite True", "loop", "skip_nonfinite", True),
])
def test_values_get_the_type_of_their_setting(line, part, name, value):
    found = getattr(getattr(read(line).experiment, part), name)
    assert found == value and type(found) is type(value)


def test_a_flag_of_testing_takes_several_values():
    line = "--methods act-gtr cfm --steps 1 2 --samples 16 --solver euler heun"
    found = read(line, "test").experiment.sampling
    assert (found.methods, found.steps, found.samples, found.solver) == (
        ("act-gtr", "cfm"), (1, 2), (16,), ("euler", "heun"))
    assert read("--method sfm", "test").experiment.sampling.methods == ("sfm",)


@pytest.mark.parametrize("name", ["--batchsize", "--betchsize"])
def test_both_spellings_of_batchsize_in_circulation_are_read(name, capsys):
    assert read(f"{name} 5", "gtr").experiment.gtr.batchsize == 5
    assert capsys.readouterr() == ("", "")


def test_only_the_right_spelling_is_shown(capsys):
    text = help_of("gtr", capsys)
    assert "--batchsize" in text and "betchsize" not in text.lower()


def test_the_published_command_for_lidc():
    found = read("--what LIDC --epochs 1000 --batchsize 256 --save_model True --save_model_step 50", "gtr")
    assert found.experiment.metadata.what == "LIDC"
    assert (found.experiment.gtr.epochs, found.experiment.gtr.batchsize) == (1000, 256)
    assert (found.experiment.loop.save_model, found.experiment.loop.save_model_step) == (True, 50)


def test_the_published_command_for_isic3():
    found = read("--what isic3_style_concat --epochs 400 --batchsize 8", "gtr")
    assert (found.experiment.metadata.what, found.experiment.metadata.channels) == ("isic3_style_concat", 3)
    assert (found.experiment.gtr.epochs, found.experiment.gtr.batchsize) == (400, 8)


@pytest.mark.parametrize("line, expected", [
    ("", (6, "euler", "standard", 1e-3, "gtr")),  # defaults
    ("--preset released", (6, "euler", "released", 1e-3, "gtr")),
    ("--method cfm", (64, "midpoint", "standard", 0.0, "normal")),
    ("--preset released --method cfm", (64, "midpoint", "released", 0.0, "normal")),
    ("--alpha 0.5 --method cfm --batch_size 3 --weight_standardization none --preset released",
     (3, "midpoint", "none", 0.5, "normal")),
    ("--method=sfm --what=LIDC", (6, "euler", "standard", 1e-3, "normal")),
])
def test_flags_go_before_the_method_before_the_preset_before_defaults(line, expected):
    found = read(line).experiment.prior
    assert expected == (
        found.batch_size, found.solver, found.weight_standardization, found.alpha, found.source)


def test_the_dataset_of_a_flag_goes_before_that_of_the_script():
    found = read("--what isic3_style_concat", what="LIDC").experiment
    assert (found.metadata.what, found.prior.alpha) == ("isic3_style_concat", 1e-4)


def test_the_path_of_a_flag_goes_before_the_environment_before_the_file(monkeypatch):
    assert read("").experiment.metadata.data_path == PATHS["LIDC"]
    monkeypatch.setenv("ATFM_LIDC_PATH", "/from/environment")
    assert read("").experiment.metadata.data_path == "/from/environment"
    assert read("", what="isic3_style_concat").experiment.metadata.data_path == PATHS["isic3_style_concat"]
    assert read("--data_path /from/flag").experiment.metadata.data_path == "/from/flag"


def test_the_method_trained_is_named_in_its_settings():
    assert read("--method sfm-no-sf").experiment.prior.method == "sfm-no-sf"
