"""The settings: a reason for each, the presets as the sources have them, the papers' numbers."""

import dataclasses

import pytest

from metadata_manager import (
    EXPERIMENTS,
    FLOWS,
    METHODS,
    PAPER_ABLATION,
    PAPER_TABLES,
    PATHS,
    SOLVERS,
    GTRConfig,
    LoopConfig,
    Metadata,
    PriorConfig,
    RunConfig,
    SamplingConfig,
    experiment,
    reported,
)
from models import solvers

KINDS = (Metadata, GTRConfig, PriorConfig, LoopConfig, SamplingConfig, RunConfig)
SETTINGS = [(kind, field) for kind in KINDS for field in dataclasses.fields(kind) if field.metadata]
FACTS = {"what", "reader", "channels", "annotators", "size"}  # of Metadata: checked with the files, not flags


def test_every_setting_has_a_reason():
    assert all(field.metadata["why"].strip() for _, field in SETTINGS)
    for kind in (GTRConfig, PriorConfig, LoopConfig, SamplingConfig, RunConfig):
        assert all(field.metadata for field in dataclasses.fields(kind))
    assert {field.name for field in dataclasses.fields(Metadata) if not field.metadata} == FACTS


@pytest.mark.parametrize("kind, field", SETTINGS, ids=lambda value: getattr(value, "name", None))
def test_a_default_is_one_of_the_choices(kind, field):
    choices = field.metadata["choices"]
    values = field.default if isinstance(field.default, tuple) else (field.default,)
    assert not choices or set(values) <= set(choices)


@pytest.mark.parametrize("parts", [("metadata", "gtr", "loop"), ("metadata", "prior", "loop"),
                                   ("metadata", "sampling")])
def test_no_two_settings_of_one_command_share_a_name(parts):
    kinds = [RunConfig, *(type(getattr(EXPERIMENTS["LIDC"], part)) for part in parts)]
    names = [field.name for kind, field in SETTINGS if kind in kinds]
    assert len(names) == len(set(names))


# Every value in which the authors' code differs from the paper, in order: LIDC, ISIC3.
RELEASED = {
    ("metadata", "split"): ("released", "released"),
    ("gtr", "convs"): (3, 3),
    ("gtr", "pool"): ("avg", "avg"),
    ("gtr", "up"): ("bilinear", "bilinear"),
    ("gtr", "weight_decay"): (1e-4, 1e-4),
    ("prior", "weight_standardization"): ("released", "released"),
    ("prior", "time_scale"): (1.0, 1.0),
    ("prior", "dice"): ("thresholded", "thresholded"),
    ("prior", "dice_over"): ("batch", "batch"),
    ("prior", "steps"): (25, 50),
    ("sampling", "allow_overlap"): (True, True),
}


@pytest.mark.parametrize("column, what", list(enumerate(("LIDC", "isic3_style_concat"))))
def test_the_released_preset_changes_these_values_and_no_other(column, what):
    paper, released = (dataclasses.asdict(experiment(what, preset)) for preset in ("paper", "released"))
    for (part, name), values in RELEASED.items():
        assert released[part].pop(name) == values[column], name
        paper[part].pop(name)
    assert released == paper


@pytest.mark.parametrize("what, epochs", [("LIDC", 800), ("isic3_style_concat", 360)])
def test_the_best_preset_changes_the_training_at_the_same_cost(what, epochs):
    paper, found = (experiment(what, preset) for preset in ("paper", "best"))
    prior = {"experts": "one", "num_epochs": epochs, "ema": 0.999, "weight_standardization": "none",
             "time_scale": 10.0}
    assert found == dataclasses.replace(paper, gtr=dataclasses.replace(paper.gtr, ema=0.99),
                                        prior=dataclasses.replace(paper.prior, **prior))


# The defaults that the paper states (section 5 and App. 6), in order: LIDC, ISIC3.
PAPER = {
    ("gtr", "epochs"): (1000, 400),
    ("gtr", "batchsize"): (256, 8),
    ("gtr", "lr"): (1e-4, 1e-4),
    ("gtr", "num_filters"): ((32, 64, 128, 192),) * 2,
    ("gtr", "rank"): (10, 10),
    ("gtr", "convs"): (2, 2),
    ("gtr", "mc_samples"): (20, 20),
    ("prior", "num_epochs"): (200, 120),
    ("prior", "batch_size"): (6, 1),
    ("prior", "lr"): (1e-4, 1e-4),
    ("prior", "dim"): (128, 256),
    ("prior", "dim_mults"): ((1, 2, 4),) * 2,
    ("prior", "alpha"): (1e-3, 1e-4),
    ("prior", "steps"): (25, 25),
    ("sampling", "samples"): ((16, 32, 100),) * 2,
    ("metadata", "annotators"): (4, 3),
    ("metadata", "size"): (128, 256),
    ("metadata", "channels"): (1, 3),
}


@pytest.mark.parametrize("column, what", list(enumerate(("LIDC", "isic3_style_concat"))))
def test_the_defaults_are_the_papers(column, what):
    found = experiment(what)
    assert {key: getattr(getattr(found, key[0]), key[1]) for key in PAPER} == {
        key: values[column] for key, values in PAPER.items()}


def test_five_runs_by_default():
    assert len(SamplingConfig().seeds) == 5


def test_methods_change_settings_of_the_flow_only():
    settings = {field.name: field for _, field in SETTINGS if field.name in PriorConfig.__dataclass_fields__}
    assert tuple(METHODS) == FLOWS
    for changes in METHODS.values():
        for name, value in changes.items():
            assert name in settings
            assert not settings[name].metadata["choices"] or value in settings[name].metadata["choices"]
            assert type(value) is type(getattr(PriorConfig(), name))


def test_methods_are_the_ablation_and_cfm():
    assert METHODS["atfm"] == {}
    assert METHODS["atfm-no-sf"] == {"alpha": 0.0}
    assert METHODS["sfm"] == {"source": "normal"}
    assert METHODS["sfm-no-sf"] == {"source": "normal", "alpha": 0.0}
    assert METHODS["cfm"] == {"source": "normal", "alpha": 0.0, "experts": "one", "signed": True,
                              "batch_size": 64, "condition_dropout": 0.5, "guidance": 0.3,
                              "solver": "midpoint", "steps": 100}


def test_solvers_are_those_that_exist():
    assert set(SOLVERS) == set(solvers.SOLVERS)


def test_every_dataset_has_a_path_and_its_own_name():
    assert set(PATHS) == set(EXPERIMENTS)
    assert all(found.metadata.what == what for what, found in EXPERIMENTS.items())


def test_settings_cannot_be_changed_in_place():
    for part in (experiment("LIDC"), *vars(experiment("LIDC")).values()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            part.lr = 1.0


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="--what lidc: unknown .* expected one of LIDC, isic3_style_concat"):
        experiment("lidc")
    with pytest.raises(ValueError, match="--preset paper2: unknown; expected one of paper, released, best"):
        experiment("LIDC", "paper2")


def test_the_environment_gives_a_datasets_path(monkeypatch):
    monkeypatch.setenv("ATFM_ISIC3_STYLE_CONCAT_PATH", "/data/isic")
    assert experiment("isic3_style_concat").metadata.data_path == "/data/isic"
    assert experiment("isic3_style_concat", "released").metadata.data_path == "/data/isic"
    assert experiment("LIDC").metadata.data_path == PATHS["LIDC"]
    monkeypatch.setenv("ATFM_ISIC3_STYLE_CONCAT_PATH", "")
    assert experiment("isic3_style_concat").metadata.data_path == PATHS["isic3_style_concat"]


def test_what_the_paper_reports():
    assert reported("LIDC", "atfm") == {
        "GED16": (0.206, 0.002), "GED32": (0.188, 0.001), "GED100": (0.162, 0.002),
        "HM-IoU32": (0.667, 0.002), "MDM32": (0.948, 0.001)}
    assert reported("isic3_style_concat", "atfm")["GED32"] == (0.152, 0.002)
    ablation = {method: (row["GED100"][0], row["HM-IoU32"][0]) for method, row in PAPER_ABLATION.items()}
    assert ablation == {"act-gtr": (0.230, 0.550), "sfm-no-sf": (0.185, 0.624), "sfm": (0.176, 0.631),
                        "atfm-no-sf": (0.249, 0.597), "atfm": (0.162, 0.667)}


def test_what_the_paper_does_not_report():
    assert reported("LIDC", "cfm") is None
    assert reported("isic3_style_concat", "sfm") is None
    assert reported("LIDC_demo", "atfm") is None


def test_the_ablation_and_the_main_table_agree():
    main = PAPER_TABLES["LIDC"]["ATFM"]
    assert all(main[name][0] == mean for name, (mean, _) in PAPER_ABLATION["atfm"].items())


def test_atfm_is_the_papers_best_in_every_column():
    for table in PAPER_TABLES.values():
        for name, (best, _) in table["ATFM"].items():
            others = [row[name][0] for method, row in table.items() if method != "ATFM" and name in row]
            assert best <= min(others) if name.startswith("GED") else best >= max(others)
