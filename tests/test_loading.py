"""Trained models from checkpoints: which files a flag means, and what a model is refused for."""

import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_prior_LIDC
from metadata_manager import EvaluationConfig, RunConfig
from models import checkpoint, load_flow, load_gtr, load_systems
from models.flags import experiment
from models.gtr import TrainedOn
from models.loading import refuse_overlap
from tests import tiny

METADATA = replace(experiment("LIDC").metadata, crop=8)
CPU = torch.device("cpu")


def images(*ids, patients=()):
    return SimpleNamespace(ids=ids, patients=patients)


NO_IMAGES = images()


def systems(run, metadata=METADATA, test=NO_IMAGES, **flags):
    return load_systems(EvaluationConfig(**flags), metadata, RunConfig(output_path=str(run)), CPU,
                        lambda method, sample: (method, sample), test)


def test_a_top_folder_a_steps_folder_and_a_file_mean_the_same_checkpoint(run):
    for place in ("", "GTR", "GTR/best.pt"):
        assert checkpoint.find(run / place, "GTR") == run / "GTR" / "best.pt"
    with pytest.raises(FileNotFoundError, match="none: no such checkpoint; train that stage first"):
        checkpoint.load(checkpoint.find(run / "none", "GTR"))  # named as it was given


def test_a_system_is_a_function_from_an_image_to_probabilities(run):
    compared = systems(run, steps=(1, 2), solver=("euler", "midpoint"))
    assert {system.label: system.nfe for system in compared} == {
        "act-gtr": 0, "atfm, euler, 1 steps": 1, "atfm, euler, 2 steps": 2, "atfm, midpoint, 1 steps": 2,
        "atfm, midpoint, 2 steps": 4}
    image, samples = torch.rand(1, 1, 8, 8), []
    for system in compared:
        samples.append(system.sample(image, 3, generator=torch.Generator().manual_seed(0)))
        assert samples[-1].shape == (1, 3, 8, 8) and samples[-1].min() >= 0 and samples[-1].max() <= 1
        assert (system.trained_on.side, system.trained_on.channels) == (8, 1)
    assert all(not torch.equal(a, b) for a, b in combinations(samples, 2))
    assert [Path(path).parent.name for path in compared[-1].checkpoints] == ["GTR", "atfm"]


def test_what_was_trained_on_is_not_tested(run, capsys):
    trained_on = load_gtr(run / "GTR" / "best.pt", METADATA).trained_on.ids
    with pytest.raises(ValueError, match="GTR/best.pt: 1 of the 2 test images were trained on.*--allow_over"):
        systems(run, test=images(trained_on[0], "another"))
    systems(run, test=images(trained_on[0], "another"), allow_overlap=True)
    assert "warning" in capsys.readouterr().out


@pytest.mark.parametrize("patients, tested, refused", [
    (("LIDC-IDRI-0001", "1.2.3"), ("1.2.3", "1.2.4"), True), (("7", "8"), (7, 9), False),
    (("a", "b"), ("c",), None), ((), ("a",), None)])
def test_other_images_of_patients_that_were_trained_on_are_not_tested(patients, tested, refused, capsys):
    trained_on = TrainedOn(8, 1, ("one",), patients, path=Path("GTR.pt"))
    test = images("two", "three", patients=tested)
    message = rf"GTR.pt: it was trained on other images of 1 of the {len(tested)} test patients, such as"
    if refused:
        with pytest.raises(ValueError, match=f"{message} 1.2.3; test with the split"):
            refuse_overlap(trained_on, test, allowed=False)
    refuse_overlap(trained_on, test, allowed=refused is True)
    out = capsys.readouterr().out
    assert bool(re.search(message, out)) == (refused is not None)


def test_images_of_another_kind_are_refused(run, isic_folder):
    with pytest.raises(ValueError, match="trained on 8 x 8 pixels.*pass the same --crop to all stages"):
        systems(run, replace(METADATA, crop=16))
    assert systems(run, replace(METADATA, crop=16), test=None)  # the user's own are resized
    rgb = experiment("isic3_style_concat").metadata
    with pytest.raises(ValueError, match="1-channel images of LIDC, but isic3_style_concat has 3"):
        systems(run, rgb)
    # A flow that sees grey images could take those of any data set.
    with pytest.raises(ValueError, match="atfm/best.pt: trained on 1-channel images of LIDC"):
        load_flow(run / "atfm" / "best.pt", "atfm", lambda: load_gtr(run / "GTR" / "best.pt", METADATA), rgb)


def test_a_checkpoint_of_the_other_step_is_refused(run):
    gtr, flow = (run / stage / "best.pt" for stage in ("GTR", "atfm"))
    with pytest.raises(ValueError, match="a checkpoint of stage GTR, expected atfm"):
        systems(run, prior=str(gtr))
    with pytest.raises(ValueError, match="a checkpoint of stage atfm, expected GTR"):
        load_gtr(flow, METADATA)


def test_one_file_for_several_systems_is_refused(run):
    with pytest.raises(ValueError, match="--gtr names one GTR, but --methods act-gtr act-gtr-best asks for"):
        systems(run, methods=("act-gtr", "act-gtr-best"), gtr="some.pt")
    with pytest.raises(ValueError, match="--prior names one system, but --methods atfm sfm asks for 2"):
        systems(run, methods=("atfm", "sfm"), prior="some.pt")


def test_a_flow_over_another_gtr_is_pointed_out(run, capsys):
    gtr = load_gtr(run / "GTR" / "best.pt", METADATA)
    load_flow(run / "atfm" / "best.pt", "atfm", lambda: gtr, METADATA)
    assert capsys.readouterr().out == ""
    torch.nn.init.zeros_(gtr.mean.weight)
    load_flow(run / "atfm" / "best.pt", "atfm", lambda: gtr, METADATA)
    assert "was trained over another GTR than the one given" in capsys.readouterr().out


def test_a_flow_is_sampled_as_it_was_trained_unless_told(lidc, tmp_path, no_pictures):
    train_prior_LIDC.main([*tiny.PRIOR, *tiny.where(lidc, tmp_path), "--num_epochs", "1", "--steps", "3",
                           "--method", "cfm"])
    (cfm,) = systems(tmp_path, methods=("cfm",))  # without a GTR, which it does not need
    assert (cfm.solver, cfm.steps, cfm.nfe) == ("midpoint", 3, 12)
    assert cfm.checkpoints == (f"{tmp_path}/cfm/best.pt",)


def test_the_authors_weights_are_read_as_such_and_not_for_data_of_ones_own(tmp_path):
    torch.save({"state_dict": {"init_conv.weight": torch.ones(1)}}, tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match="released weights do not fit this STNet"):
        systems(tmp_path, methods=("sfm",), prior=str(tmp_path / "theirs.pth"), released_checkpoint=True)
    with pytest.raises(ValueError, match="--released_checkpoint True: the authors' weights are not for mine"):
        systems(Path(), replace(METADATA, what="mine.h5"), released_checkpoint=True)
