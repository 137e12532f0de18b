"""Flags: generated from the dataclasses, strict, and in the order defaults < preset < method < flags."""

import math
import shlex
from dataclasses import fields, replace
from itertools import chain, product

import numpy as np
import pytest

import metadata_manager
from data import Writer
from metadata_manager import (
    EXPERIMENTS,
    METHODS,
    PATHS,
    PRESETS,
    EvaluationConfig,
    FlowConfig,
    GTRConfig,
    LoopConfig,
    Metadata,
    Objective,
    RunConfig,
    stage_folder,
)
from models.flags import experiment, parse

KINDS = {"gtr": (GTRConfig, LoopConfig), "flow": (FlowConfig, LoopConfig), "test": (EvaluationConfig,)}


def read(line, script="flow", what="LIDC"):
    """The settings of a command line, split as a shell does, by the type of each."""
    settings = parse(shlex.split(line), what, "", RunConfig, Metadata, *KINDS[script])
    return {type(config): config for config in settings}


@pytest.mark.parametrize("script", KINDS)
def test_every_setting_is_a_flag_with_its_reason(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no line breaks within a reason
    with pytest.raises(SystemExit, match="0"):
        read("--help", script)
    text = " ".join(capsys.readouterr().out.split())
    for setting in chain.from_iterable(map(fields, (RunConfig, Metadata, *KINDS[script]))):
        assert not setting.metadata or setting.metadata["why"] in text


def test_experiment_is_found_in_metadata_manager_too():
    assert metadata_manager.experiment("MMIS", "best", "cfm-mmis") == experiment("MMIS", "best", "cfm-mmis")


@pytest.mark.parametrize("what", EXPERIMENTS)
def test_without_flags_the_settings_are_those_of_the_dataset(what):
    expected = experiment(what)
    settings = read("", "flow", what) | read("", "gtr", what) | read("", "test", what)
    assert settings[Metadata] == replace(expected.metadata, data_path=PATHS[what])
    assert settings[RunConfig] == RunConfig(output_path=f"runs/{what}", preset="paper")
    for config in (expected.gtr, expected.flow, expected.loop, expected.evaluation):
        assert settings[type(config)] == config


@pytest.mark.parametrize("line, message", [
    ("--save_model no", "argument --save_model: 'no': expected True or False"),
    ("--save_model", "argument --save_model: expected one argument"),
    ("--lrr 1e-3", "unrecognized arguments: --lrr 1e-3"),
    ("--num_epoch 3", "unrecognized arguments: --num_epoch 3"),  # no abbreviations
    ("--epochs 3", "unrecognized arguments: --epochs 3"),  # a flag of the other step
    ("--annotators 5", "unrecognized arguments: --annotators 5"),  # a fact about the data set
    ("--dim sixteen", "argument --dim: invalid int value: 'sixteen'"),
    ("--solver eular", "argument --solver: invalid choice: 'eular'"),
    ("--source grt", "argument --source: invalid choice: 'grt'"),
    ("--network unet", "argument --network: invalid choice: 'unet'"),
    ("--method ATFM", "argument --method: invalid choice: 'ATFM'"),
    ("--what lidc", "--what lidc: unknown dataset; expected one of LIDC, isic3_style_concat"),
    ("--preset paper2", "--preset paper2: unknown; expected one of paper, released, best"),
])
def test_mistakes_are_refused_by_name(line, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        read(line)
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("line, script, kind, name, value", [
    ("--lr=1e-3", "flow", FlowConfig, "lr", 1e-3),
    ("--dim_mults 1 2", "flow", FlowConfig, "dim_mults", (1, 2)),
    ("--alphas 0 1e-4 --dim 8", "flow", FlowConfig, "alphas", (0.0, 1e-4)),
    ("--gtr some/folder", "flow", FlowConfig, "gtr", "some/folder"),
    ("--checkpoint True", "flow", FlowConfig, "recompute", True),
    ("--limit 20", "flow", Metadata, "limit", 20),
    ("--save_model False", "gtr", LoopConfig, "save_model", False),
    ("--save_model 0", "gtr", LoopConfig, "save_model", False),
    ("--skip_nonfinite true", "gtr", LoopConfig, "skip_nonfinite", True),
    ("--batchsize 5", "gtr", GTRConfig, "batchsize", 5),
    ("--betchsize 5", "gtr", GTRConfig, "batchsize", 5),  # as the authors spell it
    ("--methods act-gtr cfm", "test", EvaluationConfig, "methods", ("act-gtr", "cfm")),
    ("--method sfm", "test", EvaluationConfig, "methods", ("sfm",)),
    ("--solver euler ab2", "test", EvaluationConfig, "solver", ("euler", "ab2")),
])
def test_values_get_the_type_of_their_setting(line, script, kind, name, value):
    settings = getattr(read(line, script)[kind], name)
    assert settings == value and type(settings) is type(value)


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
    flow = read(line)[FlowConfig]
    assert expected == (flow.batch_size, flow.solver, flow.weight_standardization, flow.alpha, flow.source)


def test_the_path_of_a_flag_goes_before_the_environment_before_the_file(monkeypatch):
    monkeypatch.setenv("ATFM_LIDC_PATH", "/from/environment")
    assert read("")[Metadata].data_path == "/from/environment"
    assert read("", what="isic3_style_concat")[Metadata].data_path == PATHS["isic3_style_concat"]
    assert read("--data_path /from/flag")[Metadata].data_path == "/from/flag"


def test_every_method_and_preset_has_values_that_exist():
    for what, preset, method in product(EXPERIMENTS, PRESETS, METHODS):
        assert read(f"--preset {preset} --method {method}", what=what)[FlowConfig].method == method


def test_cfm_takes_its_100_000_steps_on_lidc():
    """64 % of 15,096 slices, 64 a step."""
    for line, what, epochs in (("--method cfm", "LIDC", 663), ("--preset best --method cfm", "LIDC", 663),
                               ("--method sfm", "LIDC", 200), ("--method cfm", "LIDC_demo", 5)):
        assert read(line, what=what)[FlowConfig].num_epochs == epochs
    assert 100_000 <= 663 * math.ceil(9661 / 64) < 100_000 + 151


@pytest.mark.parametrize("script", ["flow", "test"])
def test_channels_last_needs_compile(script):
    with pytest.raises(ValueError, match="--channels_last True needs --compile True"):
        read("--channels_last True", script)
    assert all(getattr(config, "channels_last", True)
               for config in read("--channels_last True --compile True", script).values())
    FlowConfig(channels_last=True)  # checkpoints of older runs have it


def test_mmis_is_seen_in_three_channels_and_cfm_has_a_recipe_for_it():
    settings = read("--method cfm-mmis", what="MMIS")
    flow, metadata = settings[FlowConfig], settings[Metadata]
    assert (metadata.channels, metadata.flow_channels, metadata.annotators) == (3, 3, 4)
    assert (flow.dim, flow.dim_mults, flow.batch_size) == (64, (1, 2, 4, 4), 24)
    assert (flow.num_epochs, flow.lr, metadata.split) == (500, 1e-4, "file")
    assert flow.source == "normal" and flow.ema == 0.9999 and flow.signed
    assert read("", "test", "MMIS")[EvaluationConfig].samples == (15,)


def store_of(path, channels, annotators, size, name="a/{}"):
    with Writer(path, "a test", prepared='{"axis": "y", "window": [-5, 7]}') as writer:
        for row in range(3):
            writer.append(np.zeros((size, size, channels), np.uint8), np.zeros((annotators, size, size)),
                          patient=row, id=name.format(row))
    return path


@pytest.mark.parametrize("size, batchsize", [(16, 256), (136, 8)])  # as for LIDC, as for ISIC3
def test_a_file_of_one_s_own_says_what_it_holds(tmp_path, size, batchsize):
    path = store_of(tmp_path / "mine.h5", 2, 5, size)
    settings = read("", "gtr", str(path)) | read("", "flow", str(path))
    metadata = settings[Metadata]
    assert (metadata.what, metadata.data_path, metadata.reader) == ("mine.h5", str(path), "cases")
    assert (metadata.channels, metadata.flow_channels, metadata.annotators, metadata.size) == (2, 2, 5, size)
    assert (metadata.axis, metadata.window, metadata.split) == ("y", (-5, 7), "group")
    assert settings[GTRConfig].batchsize == batchsize and settings[FlowConfig].dim == 128
    assert settings[RunConfig].output_path == "runs/mine" and settings[RunConfig].preset == "paper"
    assert read("--preset best", "gtr", str(path))[GTRConfig].loss == "energy"


def test_a_file_that_came_split_stays_so_and_another_file_is_named(tmp_path):
    with Writer(tmp_path / "split.h5", "a test") as writer:
        for fold in ("train", "val", "test"):
            writer.append(np.zeros((8, 8), np.uint8), np.zeros((1, 8, 8)), patient=fold, id=f"{fold}/a")
    assert experiment(str(tmp_path / "split.h5")).metadata.split == "file"
    (tmp_path / "text.h5").write_text("text")
    for name in ("text.h5", "none.h5"):
        with pytest.raises(ValueError, match=f"--what .*{name}: not a file of images.*data.prepare"):
            experiment(str(tmp_path / name))


def test_a_flow_per_alpha_and_per_preset_has_a_folder_of_its_own():
    config = FlowConfig(alphas=(0.0, 5e-4))
    assert [(flow.alpha, flow.folder("paper")) for flow in config.per_alpha()] == [
        (0.0, "atfm_alpha_0"), (5e-4, "atfm_alpha_0.0005")]
    assert FlowConfig(method="sfm").folder("paper") == "sfm"
    assert [stage_folder("GTR", preset) for preset in PRESETS] == ["GTR", "GTR-released", "GTR-best"]
    assert config.per_alpha()[0].folder("best") == "atfm-best_alpha_0"


@pytest.mark.parametrize("line, script, label", [
    ("", "gtr", "paper"), ("--epochs 3 --crop 32 --num_filters 4 8 --lr 1e-3", "gtr", "paper"),  # sizes
    ("--preset best", "gtr", "best"), ("--preset released", "flow", "released"), ("", "flow", "paper"),
    ("--loss energy", "gtr", "custom"), ("--alpha 0.5", "flow", "custom"),
    ("--dim 8 --amp True", "flow", "paper"),
    ("--loss energy --mc_samples 16 --ema 0.99 --schedule cosine --temperature 0.8 --tta True "
     "--dihedral True", "gtr", "best"),
    ("--preset best --method ssn", "flow", "best"), ("--preset best --temperature 1", "gtr", "custom"),
])
def test_a_run_says_which_preset_its_settings_are_those_of(line, script, label):
    assert read(line, script)[RunConfig].trained_as == label


@pytest.mark.parametrize("script, kind", [("flow", FlowConfig), ("test", EvaluationConfig)])
def test_amp_is_auto_or_a_boolean_as_older_checkpoints_have_it(script, kind):
    lines = ("", "--amp True", "--amp False")
    assert [read(line, script)[kind].amp for line in lines] == ["auto", "True", "False"]
    assert [kind(amp=old).amp for old in (True, False)] == ["True", "False"]
    with pytest.raises(SystemExit):
        read("--amp half", script)


@pytest.mark.parametrize("make, message", [
    (lambda: FlowConfig(dice="hard"), "dice='hard': expected one of soft, thresholded"),
    (lambda: GTRConfig(pool="min"), "pool='min': expected one of max, avg"),
    (lambda: EvaluationConfig(seeds=(0, 1, 0)), "--seeds 0 1 0: a value comes twice"),
    (lambda: RunConfig(seed=-1), r"--seed -1: expected a number in \[0, 4294967295\]"),
    (lambda: RunConfig(seed=2**64), "--seed 18446744073709551616"),
    (lambda: LoopConfig(val_images=0), r"--val_images 0: expected a number in \[1, inf\)"),
    (lambda: GTRConfig(lr=0.0), r"--lr 0.0: expected a number in \(0, inf\)"),
    (lambda: GTRConfig(lr=math.inf), "--lr inf"), (lambda: Objective(guidance=math.nan), "--guidance nan"),
    (lambda: GTRConfig(ema=1.0), r"--ema 1.0: expected a number in \[0, 1\)"),
    (lambda: Objective(condition_dropout=1.5), r"--condition_dropout 1.5: expected a number in \[0, 1\]"),
    (lambda: GTRConfig(num_filters=(4, 0)), "--num_filters 0"), (lambda: Metadata(limit=-1), "--limit -1"),
    (lambda: EvaluationConfig(samples=(16, 0)), "--samples 0"),
    (lambda: experiment("lidc"), "--what lidc: unknown dataset"),
    (lambda: experiment("LIDC", "papers"), "--preset papers: unknown"),
])
def test_a_value_that_does_not_exist_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
