"""Every path of training, sampling and scoring on a pretended GPU: no operation meets tensors of two devices.

What needs a real one is marked "cuda" in other tests, and measured by tests/benchmarks/gpu.py.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data import Loader, augmentations, load
from metadata_manager import BASELINES, FLOWS, FlowConfig, GTRConfig, LoopConfig, Metadata
from metrics import evaluate
from models import ATFM, GTR, STNet, Validation, baseline, energy_score, monte_carlo_nll, norm, train_loop
from models.flags import experiment
from models.flow import SOLVERS, one_expert
from models.norm import SplitNorm
from models.processes import Processes
from tests import pretended
from tests.benchmarks import gpu

pytestmark = pytest.mark.slow
SMALL = {"dim": 4, "dim_mults": (1, 2), "batch_size": 2}
LOOP = LoopConfig(save_model=False, validate_every=1)
PICTURE = np.zeros((2, 2, 3), np.uint8)


@pytest.fixture
def cuda():
    with pretended.gpu() as device:
        yield device


def demo(what, **changes):
    return replace(experiment(what).metadata, crop=16, limit=4, **changes)


def train(system, losses, batches, validate, folder, config, device):
    optimizer = torch.optim.AdamW(system.parameters(), lr=1e-3)
    before = [weight.detach().cpu() for weight in system.parameters()]
    train_loop(system, losses, optimizer, batches, validate, folder=folder,
               about={"stage": "x", "config": {}}, epochs=1, config=LOOP, seed=0, optimization=config,
               processes=Processes(device))
    assert any((weight.detach().cpu() != old).any() for weight, old in zip(system.parameters(), before))


def validation(sample, metadata, device):
    held_out = load(metadata, "val").spread(2)
    result = evaluate(sample, held_out, (2,), device=device)
    return Validation(result.means(2, "GED", "HM-IoU", "Diversity"), PICTURE)


@pytest.mark.parametrize("what, loss, changes", [
    ("LIDC_demo", "nll", {"dihedral": True}), ("isic3_demo", "nll", {"augment": True}),
    ("LIDC_demo", "energy", {})])
def test_step_1(what, loss, changes, cuda, tmp_path):
    metadata = demo(what, **changes)
    config = GTRConfig(ema=0.9, clip=1.0, weight_decay=0.1)
    gtr = GTR(metadata.channels, (4, 8), rank=2, tta=loss == "energy").to(cuda)

    def losses(done, image, masks):
        if loss == "energy":
            return [{"loss": energy_score(gtr(image).rsample(4).sigmoid(), masks)}]
        return [{"loss": monte_carlo_nll(gtr(image).rsample(4, antithetic=True), one_expert(masks))}]

    batches = Loader(load(metadata, "train"), 3, 0, cuda, augmentations(metadata))
    train(gtr, losses, batches, lambda model: validation(model.sample, metadata, cuda), tmp_path, config,
          cuda)


@pytest.mark.parametrize("method", FLOWS)
@pytest.mark.parametrize("what, changes", [
    ("LIDC_demo", {}), ("isic3_demo", {"amp": True, "recompute": True}),
    ("LIDC_demo", {"dice_over": "batch"})])
def test_step_2(method, what, changes, cuda, tmp_path):
    metadata = demo(what)
    flow = replace(experiment(what, "paper", method).flow, **SMALL, recompute=changes.get("recompute", False))
    flow = replace(flow, dice_over=changes.get("dice_over", "image"), images_per_pass=None, ema=0.9)
    net = STNet.of(flow, 1)
    atfm = ATFM(GTR(metadata.channels, (4, 8), rank=2), net, flow, amp=changes.get("amp", False)).to(cuda)

    def validate(trained):
        return validation(lambda image, n, generator: atfm.for_validation(trained).sample(
            image, n, 1, generator=generator, batch_size=2), metadata, cuda)

    batches = Loader(load(metadata, "train"), 2, 0, cuda, augmentations(metadata))
    train(net, lambda done, *batch: atfm.losses(*batch), batches, validate, tmp_path, flow, cuda)


@pytest.mark.parametrize("method", BASELINES)
def test_every_system_that_the_papers_compare_with(method, cuda, tmp_path):
    metadata = demo("isic3_demo")
    widths = (1,) * 5 if method == "phiseg" else (1, 2)
    config = replace(experiment("isic3_demo", "paper", method).flow, **SMALL | {"dim_mults": widths})
    system = baseline(method, metadata.channels, config).to(cuda)
    batches = Loader(load(metadata, "train"), 2, 0, cuda, with_style=system.needs_style)
    steps = 2 if system.steps else None

    def validate(trained):
        return validation(lambda image, n, generator: trained.sample(
            image, n, steps=steps, generator=generator), metadata, cuda)

    train(system, lambda done, *batch: system.losses(*batch), batches, validate, tmp_path, config, cuda)


@pytest.mark.parametrize("solver", SOLVERS)
def test_sampling(solver, cuda):
    atfm = ATFM(GTR(1, (4, 8), rank=2), STNet(4, (1, 2))).to(cuda).for_sampling(amp=False)
    samples = atfm.sample(torch.rand(2, 1, 16, 16, device=cuda), 5, 2, solver)
    assert samples.device.type == "cuda" and samples.shape == (2, 5, 16, 16)


def test_st_net_takes_the_norm_for_cuda(cuda, monkeypatch):
    calls, forward = [], SplitNorm.forward
    monkeypatch.setattr(SplitNorm, "forward",
                        staticmethod(lambda ctx, *inputs: calls.append(1) or forward(ctx, *inputs)))
    net = STNet(4, (1, 2)).to(cuda)
    norms = sum(isinstance(module, torch.nn.GroupNorm) for module in net.modules())
    x = torch.rand(1, 1, 8, 8, device=cuda)
    net(x, torch.rand(1, device=cuda), x).sum().backward()
    assert len(calls) == norms > 30
    # Without a gradient scale and shift by time take no pass of their own over a map.
    passes, scaled = [], norm.scaled
    monkeypatch.setattr(norm, "scaled", lambda *inputs: passes.append(1) or scaled(*inputs))
    with torch.no_grad():
        net(x, torch.rand(1, device=cuda), x)
    assert len(passes) == norms


def test_a_step_reads_nothing_back_that_is_not_there(cuda, tmp_path):
    """Batch, augmentation, both losses, update: the host prepares a step while the GPU works on the last."""
    metadata, waits = demo("isic3_demo", augment=True, dihedral=True), []
    config = FlowConfig(ema=0.9)  # without clipping, which asks C++ for the device of the pretended data
    atfm = ATFM(GTR(3, (4, 8), rank=2), STNet(4, (1, 2)), config).to(cuda)
    gtr = GTR(3, (4, 8), rank=2).to(cuda)

    def losses(done, image, masks):
        waits.append(len(pretended.WAITS))
        yield {"loss": monte_carlo_nll(gtr(image).rsample(4, antithetic=True), one_expert(masks))}
        yield from ({"loss": piece["loss"]} for piece in atfm.losses(image, masks))

    batches = Loader(load(metadata, "train"), 1, 0, cuda, augmentations(metadata))
    train(atfm.net, losses, batches, lambda _: Validation({"GED": 0.0}, PICTURE), tmp_path, config, cuda)
    assert len(waits) == 4 and len(set(waits)) == 1


def test_the_check_of_a_gpu_finds_what_is_wrong_on_it(cuda, monkeypatch):
    systems = dict(gpu.systems())
    for name in ("gtr", "atfm", "ccdm", "prob-unet"):
        result = gpu.differences(systems[name], cuda)
        assert all(result[what] <= most for what, most in gpu.RIGHT.items()), (name, result)
    assert gpu.differences(systems["atfm"], cuda)["gradient"] > 0  # by the norm for CUDA
    monkeypatch.setattr("models.norm.scaled",
                        lambda x, a, d: 1.05 * x * a[:, :, None, None] + d[:, :, None, None])
    assert gpu.differences(systems["atfm"], cuda)["gradient"] > gpu.RIGHT["gradient"]


def test_a_mix_of_devices_is_seen(cuda):
    """The pretended GPU itself: it refuses what CUDA refuses, and takes what CUDA takes."""
    there, here = torch.rand(3, device=cuda), torch.rand(3)
    for mix in (lambda: there + here, lambda: torch.stack([there, here]), lambda: there.numpy(),
                lambda: here[torch.tensor([0], device=cuda)], lambda: torch.nn.Linear(3, 1)(there),
                lambda: np.asarray(there)):
        with pytest.raises((RuntimeError, TypeError), match="cuda:0"):
            mix()
    assert (there * torch.tensor(2.0)).device == there[torch.tensor([0])].device == cuda
    assert there.to("cpu").device.type == "cpu" and Metadata().size == 128
