"""Trained models from checkpoints: which files a flag means, and what a model is refused for."""

import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import train_prior_LIDC
from metadata_manager import EvaluationConfig, Objective, RunConfig
from models import ATFM, STNet, checkpoint, load_flow, load_gtr, load_systems
from models.atfm import STATES_ON_CPU
from models.flags import experiment
from models.gtr import TrainedOn
from models.loading import refuse_overlap
from tests import tiny

METADATA = replace(experiment("LIDC").metadata, crop=8)
CPU = torch.device("cpu")
GIB = 2**30


def images(*ids, patients=()):
    return SimpleNamespace(ids=ids, patients=patients)


NO_IMAGES = images()


def systems(run, metadata=METADATA, test=NO_IMAGES, **flags):
    return load_systems(EvaluationConfig(**flags), metadata, RunConfig(output_path=str(run)), CPU,
                        lambda method, sample: (method, sample), test)


@pytest.mark.parametrize("place", ["", "GTR", "GTR/best.pt"])
def test_a_top_folder_a_steps_folder_and_a_file_mean_the_same_checkpoint(run, place):
    assert checkpoint.find(run / place, "GTR") == run / "GTR" / "best.pt"


def test_a_place_that_does_not_exist_is_named_as_it_was_given(tmp_path):
    assert checkpoint.find(tmp_path / "GTR", "GTR") == tmp_path / "GTR"
    with pytest.raises(FileNotFoundError, match="GTR: no such checkpoint; train that stage first"):
        checkpoint.load(tmp_path / "GTR")


def test_a_system_is_a_function_from_an_image_to_probabilities(run):
    found = systems(run, steps=(1, 2), solver=("euler", "midpoint"))
    assert {system.label: system.nfe for system in found} == {
        "act-gtr": 0, "atfm, euler, 1 steps": 1, "atfm, euler, 2 steps": 2, "atfm, midpoint, 1 steps": 2,
        "atfm, midpoint, 2 steps": 4}
    image, ends = torch.rand(1, 1, 8, 8), []
    for system in found:
        ends.append(system.sample(image, 3, generator=torch.Generator().manual_seed(0)))
        assert ends[-1].shape == (1, 3, 8, 8) and ends[-1].min() >= 0 and ends[-1].max() <= 1
        assert (system.trained_on.side, system.trained_on.channels) == (8, 1)
    assert all(not torch.equal(a, b) for a, b in combinations(ends, 2))
    assert [Path(path).parent.name for path in found[-1].checkpoints] == ["GTR", "atfm"]


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
    trained_on, test = TrainedOn(8, 1, ("one",), patients), images("two", "three", patients=tested)
    message = rf"GTR.pt: it was trained on other images of 1 of the {len(tested)} test patients, such as"
    if refused:
        with pytest.raises(ValueError, match=f"{message} 1.2.3; test with the split"):
            refuse_overlap(Path("GTR.pt"), trained_on, test, allowed=False)
    refuse_overlap(Path("GTR.pt"), trained_on, test, allowed=refused is True)
    out = capsys.readouterr().out
    assert bool(re.search(message, out)) == (refused is not None)


def test_images_of_another_kind_are_refused(run, isic_folder):
    with pytest.raises(ValueError, match="trained on 8 x 8 pixels.*pass the same --crop to all stages"):
        systems(run, replace(METADATA, crop=16))
    assert systems(run, replace(METADATA, crop=16), test=None)  # the user's own are resized
    with pytest.raises(ValueError, match="1-channel images of LIDC, but isic3_style_concat has 3"):
        systems(run, experiment("isic3_style_concat").metadata)


def test_a_checkpoint_of_the_other_step_is_refused(run):
    gtr, flow = (run / stage / "best.pt" for stage in ("GTR", "atfm"))
    with pytest.raises(ValueError, match="a checkpoint of stage GTR, expected atfm"):
        systems(run, prior=str(gtr))
    with pytest.raises(ValueError, match="a checkpoint of stage atfm, expected GTR"):
        load_gtr(flow, METADATA)


def test_one_flow_for_several_methods_is_refused(run):
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


def test_the_authors_weights_are_read_as_such(tmp_path):
    torch.save({"state_dict": {"init_conv.weight": torch.ones(1)}}, tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match="released weights do not fit this STNet"):
        systems(tmp_path, methods=("sfm",), prior=str(tmp_path / "theirs.pth"), released_checkpoint=True)


def test_the_authors_weights_are_not_for_data_of_ones_own():
    with pytest.raises(ValueError, match="--released_checkpoint True: the authors' weights are not for mine"):
        systems(Path(), replace(METADATA, what="mine.h5"), released_checkpoint=True)


def test_states_go_through_the_net_a_few_at_a_time():
    atfm, sizes = ATFM(None, STNet(4, (1, 2)), Objective(source="normal")), []
    atfm.net.register_forward_pre_hook(lambda net, inputs: sizes.append(len(inputs[0])))
    for batch_size in (None, 5):
        atfm.sample(torch.rand(1, 1, 8, 8), 2 * STATES_ON_CPU, steps=1, batch_size=batch_size)
    assert sizes == [STATES_ON_CPU] * 2 + [4] * 4


@pytest.mark.parametrize("free, expected", [(20, 16), (19, 16), (18, 8), (0, 2), (-4, 1)])
def test_a_power_of_two_of_states_fits_in_70_percent_of_a_gpu_s_memory(free, expected, monkeypatch):
    """Its allocator simulated: 3 GiB in use and 4 more reserved, 5 GiB at the most with two states."""
    atfm, states = ATFM(None, STNet(4, (1,)), Objective(source="normal")), mock.MagicMock()
    monkeypatch.setattr(atfm, "_velocity", mock.MagicMock())
    states.device = torch.device("cuda")
    gpu = {"memory_allocated": 3 * GIB, "max_memory_allocated": 5 * GIB, "memory_reserved": 7 * GIB,
           "mem_get_info": (free * GIB, 24 * GIB)}
    returns = {name: mock.Mock(return_value=value) for name, value in gpu.items()}
    with mock.patch.multiple(torch.cuda, reset_peak_memory_stats=mock.Mock(), **returns):
        assert atfm.states_at_once(states, states) == expected
