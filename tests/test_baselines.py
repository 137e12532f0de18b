"""What the systems that ATFM is compared with take of the settings, and what they refuse."""

from dataclasses import replace

import pytest
import torch

from metadata_manager import BASELINES, EXPERIMENTS, EvaluationConfig, FlowConfig
from models.baselines import CLASSES, baseline
from models.flags import experiment
from models.systems import check_flags, ways_to_sample

SMALL = FlowConfig(dim=4, dim_mults=(1,))
CHANGED = {"amp": True, "alphas": (0.0, 1.0), "alpha": 0.5, "recompute": True, "dice": "thresholded",
           "steps": 5, "annotators_per_pass": 2, "images_per_pass": 1, "time_scale": 1.0, "guidance": 0.3,
           "weight_standardization": "none", "solver": "midpoint", "compile": True, "signed": True}
STEPWISE = {"ccdm", "ab", "cimd", "flow-ssn"}


@pytest.mark.parametrize("method", BASELINES)
def test_settings_that_a_system_does_not_have_are_refused(method):
    for name, value in CHANGED.items():
        config = replace(SMALL, **{name: value})
        if method in STEPWISE and name in ("time_scale", "weight_standardization", "recompute"):
            baseline(method, 1, config)
        else:
            flag = {"recompute": "checkpoint"}.get(name, name)
            with pytest.raises(ValueError, match=rf"--{flag} .*: {method} has no such part"):
                baseline(method, 1, config)


@pytest.mark.parametrize("what", EXPERIMENTS)
@pytest.mark.parametrize("preset", ["paper", "best"])
def test_the_defaults_of_every_data_set_are_taken(what, preset):
    for method in BASELINES:
        config = experiment(what, preset, method).flow
        small = replace(config, dim=4, dim_mults=(1,))
        assert isinstance(baseline(method, 3, small), CLASSES[method])
        assert config.experts == BASELINES[method][1]["experts"]
        assert (config.dim == experiment(what).flow.dim) if EXPERIMENTS[what].small else (
            config.lr == BASELINES[method][1]["lr"])


@pytest.mark.parametrize("flag, methods, refused", [
    ({"amp": True}, ("ssn", "ccdm"), True), ({"amp": True}, ("ssn", "atfm"), False),
    ({"amp": "False"}, ("ssn",), False), ({}, ("ssn",), False),
    ({"solver": ("midpoint",)}, ("ccdm",), True), ({"alphas": (1.0,)}, ("ssn",), True),
    ({"steps": (2,)}, ("act-gtr", "ssn"), True), ({"steps": (2,)}, ("ssn", "ccdm"), False),
])
def test_flags_of_a_test_that_none_of_its_systems_has_are_refused(flag, methods, refused):
    config = EvaluationConfig(methods=methods, **flag)
    if not refused:
        return check_flags(config, methods)
    with pytest.raises(ValueError, match=f"--{next(iter(flag))}: none of --methods {' '.join(methods)}"):
        check_flags(config, methods)


def test_more_steps_than_there_are_noise_levels_are_refused_before_anything_is_drawn():
    system = baseline("ccdm", 1, SMALL)
    with pytest.raises(ValueError, match="--steps 251: CCDM has 250 at most"):
        list(ways_to_sample(system, EvaluationConfig(steps=(10, 251)), amp=False))


@pytest.mark.parametrize("method", ["prob-unet", "ccdm"])
def test_without_memory_for_all_states_they_are_halved_and_the_samples_are_the_same(method, capsys):
    system = baseline(method, 1, SMALL).eval()
    image, drawn = torch.rand(1, 1, 8, 8), {}
    for enough in (10, 3):
        def allocate(net, inputs, enough=enough):
            if len(inputs[0]) > enough:
                raise torch.cuda.OutOfMemoryError

        hook = (system.combine if method == "prob-unet" else system.net).register_forward_pre_hook(allocate)
        drawn[enough] = system.sample(image, 10, 1, torch.Generator().manual_seed(0), batch_size=10)
        hook.remove()
    torch.testing.assert_close(drawn[3], drawn[10], rtol=0, atol=1e-5)
    assert "out of GPU memory in sampling: going on with 5 states at once" in capsys.readouterr().out


@pytest.mark.parametrize("method, side", [("phiseg", 12), ("ccdm", 6)])
def test_a_size_that_does_not_suit_the_levels_names_the_flags(method, side):
    config = replace(SMALL, dim_mults=(1, 1, 1, 1))
    image, masks = torch.rand(1, 1, side, side), torch.ones(1, 1, side, side)
    with pytest.raises(ValueError, match="--dim_mults.*--crop"):
        next(baseline(method, 1, config).losses(image, masks))
