"""ATFM: the objective of a batch, in one pass or several, and samples, on networks of a few weights."""

import copy
import functools
import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

from metadata_manager import FLOWS, PRESETS, Objective
from models import ATFM, GTR, STNet
from models.atfm import grey
from models.chunks import STATES_ON_CPU, Chunks, states_at_once
from models.flags import experiment
from tests.tiny import SIZE, batch, seeded

NO_MEMORY_FOR_CUBLAS = RuntimeError(
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def system(recompute=False, annotators_per_pass=None, amp=False, images_per_pass=None, **objective):
    torch.manual_seed(0)
    return ATFM(GTR(1, (4, 8), rank=2), STNet(4, (1, 2), recompute=recompute), Objective(**objective),
                annotators_per_pass=annotators_per_pass, images_per_pass=images_per_pass, amp=amp)


class Leading(nn.Module):
    """A velocity field that leads straight to the masks x_1 (b, 1, h, w)."""

    image_channels = 1

    def __init__(self, x_1):
        super().__init__()
        self.x_1 = x_1

    def forward(self, x_t, t, image):
        return (self.x_1 - x_t) / (1 - t)[:, None, None, None]


def single_pass(atfm, image, masks):
    """The terms of a batch whose annotators go through the net at once."""
    torch.manual_seed(0)
    (terms,) = atfm.losses(image, masks)
    return terms


def step(atfm, seed=0):
    """A training step's gradient and its terms summed over parts; the same seed draws the same numbers."""
    torch.manual_seed(seed)
    atfm.zero_grad()
    sums, parts = {}, 0
    for part in atfm.losses(*batch()):
        part["loss"].backward()
        parts += 1
        for name, value in part.items():
            sums[name] = sums.get(name, 0) + value.item()
    return torch.cat([weight.grad.flatten() for weight in atfm.net.parameters()]), sums, parts


@pytest.mark.parametrize("choices", [
    {}, {"semantic_target": "all"}, {"experts": "one"}, {"experts": "one", "semantic_target": "all"},
    {"source": "normal", "signed": True}, {"source": "normal", "experts": "one"},
])
def test_the_terms_agree_with_their_formulas_under_the_same_seed(choices):
    atfm, (image, masks) = system(alpha=0.25, **choices), batch()
    terms = single_pass(atfm, image, masks)

    torch.manual_seed(0)
    x_0 = torch.randn(2, 1, SIZE, SIZE) if "source" in choices else atfm.gtr(image).sample(1).sigmoid()
    t = torch.randint(1000, (2,)) / 1000
    x_0, targets = x_0.expand(2, 3, SIZE, SIZE), masks
    if choices.get("experts") == "one":
        expert = torch.randint(3, (2,))
        x_0, targets = x_0[[0, 1], expert][:, None], masks[[0, 1], expert][:, None]
    squares, distances = [], []
    for i, annotator in product(range(2), range(targets.shape[1])):
        source, y = x_0[i, annotator], targets[i, annotator]  # the annotators of an image share t
        x_1 = 2 * y - 1 if "signed" in choices else y
        x_t = t[i] * x_1 + (1 - t[i]) * source
        v = atfm.net(x_t[None, None], t[i, None], image[i, None])[0, 0]
        squares.append((v - (x_1 - x_t) / (1 - t[i])).square().mean().item())
        end = x_t + (1 - t[i]) * v
        end = ((end + 1) / 2 if "signed" in choices else end).clamp(0, 1)
        for mask in masks[i] if "semantic_target" in choices else [y]:
            overlap, total = (end * mask).sum().item(), (end + mask).sum().item()
            distances.append(1 - (2 * overlap + 1) / (total + 1))
    l_fm, l_sf = sum(squares) / len(squares), sum(distances) / len(distances)
    expected = {"loss": l_fm + 0.25 * l_sf, "L_FM": l_fm, "L_SF": l_sf}
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(expected, rel=1e-4)
    assert [name for name, value in terms.items() if value.requires_grad] == ["loss"]


@pytest.mark.parametrize("recompute, choices, per_pass, expected_parts", [
    *((False, choices, *parts) for choices in (
        {}, {"semantic_target": "all"}, {"dice_over": "batch"}, {"dice": "thresholded"},
        {"source": "normal", "signed": True, "condition_dropout": 0.5})
      for parts in (((2, None), 2), ((1, 1), 6))),
    (True, {}, (1, None), 3), (True, {"experts": "one"}, (3, 1), 2)])
def test_parts_add_up_to_a_single_pass(recompute, choices, per_pass, expected_parts):
    annotators_per_pass, images_per_pass = per_pass
    if choices.get("dice_over") == "batch" and images_per_pass:
        return  # a Dice over the batch is no sum over its images
    divided = system(recompute, annotators_per_pass, images_per_pass=images_per_pass, alpha=0.5, **choices)
    gradient, terms, parts = step(divided)
    whole_gradient, whole_terms, passes = step(system(alpha=0.5, **choices))
    assert (parts, passes) == (expected_parts, 1)
    assert terms == pytest.approx(whole_terms, rel=1e-5)
    assert (gradient - whole_gradient).norm() < 1e-5 * whole_gradient.norm() and whole_gradient.norm() > 0


def test_gtr_is_not_trained():
    atfm = system()
    gtr, net = copy.deepcopy(atfm.gtr.state_dict()), copy.deepcopy(atfm.net.state_dict())
    optimizer = torch.optim.Adam(atfm.parameters(), lr=0.1, weight_decay=0.1)
    for seed in range(3):
        step(atfm, seed)
        optimizer.step()
    assert not any(weight.requires_grad for weight in atfm.gtr.parameters())
    assert all(torch.equal(weight, gtr[name]) for name, weight in atfm.gtr.state_dict().items())
    assert all((weight != net[name]).any() for name, weight in atfm.net.state_dict().items())


def test_the_net_sees_the_image_in_grey_or_zeros_at_the_stated_rate():
    b, rate, seen = 2000, 0.3, []
    image = torch.rand(b, 3, 2, 2, generator=seeded())
    atfm = ATFM(None, STNet(4, (1,)), Objective(source="normal", condition_dropout=rate))
    atfm.net.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[2]))
    single_pass(atfm, image, torch.zeros(b, 2, 2, 2))
    condition = seen[0].view(b, 2, 2, 2)  # for both annotators
    expected = 0.299 * image[:, 0] + 0.587 * image[:, 1] + 0.114 * image[:, 2]
    kept = condition.flatten(1).any(1)
    torch.testing.assert_close(condition, (expected * kept[:, None, None])[:, None].expand(b, 2, 2, 2))
    assert kept.float().mean().item() == pytest.approx(1 - rate, abs=5 * math.sqrt(rate * (1 - rate) / b))
    assert torch.equal(grey(image[:, :1]), image[:, :1])


def test_a_net_of_as_many_channels_sees_the_image_as_it_is_and_gtr_always_does():
    over_gtr, colour = ATFM(GTR(3, (4, 8), rank=2), STNet(4, (1, 2))), batch(channels=3)[0]
    assert torch.equal(over_gtr.sample_source(colour, 5, seeded()), over_gtr.gtr.sample(colour, 5, seeded()))
    image, masks = torch.rand(2, 3, 4, 4), torch.zeros(2, 2, 4, 4)
    seen = []
    atfm = ATFM(None, STNet(4, (1,), image_channels=3), Objective(source="normal"))
    atfm.net.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[2]))
    single_pass(atfm, image, masks)
    assert torch.equal(seen[0], image.repeat_interleave(2, dim=0))
    assert atfm.sample(image, 2, 1).shape == (2, 2, 4, 4)
    with pytest.raises(ValueError, match="expected"):
        ATFM(None, STNet(4, (1,), image_channels=2), Objective(source="normal")).sample(image, 1, 1)


@pytest.mark.parametrize("method", FLOWS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_flow_samples_under_every_preset(preset, method):
    config = replace(experiment("LIDC", preset, method).flow, dim=4, dim_mults=(1,))
    atfm = ATFM(GTR(1, (4, 8), rank=2), STNet.of(config), config)
    assert atfm.sample(batch()[0], 2, steps=1).shape == (2, 2, SIZE, SIZE)


def test_normal_source_needs_no_gtr():
    atfm = ATFM(None, STNet(4, (1, 2)), Objective(source="normal"))
    x_0 = atfm.sample_source(torch.zeros(2, 1, SIZE, SIZE), 200, seeded())
    assert x_0.shape == (2, 200, SIZE, SIZE)
    assert (x_0.mean().item(), x_0.std().item()) == pytest.approx((0, 1), abs=0.03)
    assert system(source="normal").gtr is None


@pytest.mark.parametrize("choices, message", [
    ({"source": "grt"}, "--source grt: unknown; expected one of gtr, normal"),
    ({"signed": True}, "--signed True: x_0 of --source gtr is in"),
    ({}, "--source gtr needs a GTR; .*take one of normal")])
def test_a_source_that_does_not_exist_or_fit_is_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        ATFM(GTR(1, (4, 8)) if choices else None, STNet(4, (1,)), Objective(**choices))


def test_samples_are_probabilities_that_the_generator_decides(device):
    atfm, image = system(source="normal").to(device), batch()[0].to(device)
    samples = atfm.sample(image, 3, steps=2, generator=seeded(5, device))
    assert samples.shape == (2, 3, SIZE, SIZE) and samples.dtype == torch.float32
    assert (samples.min().item(), samples.max().item()) == (0, 1)  # some of x_1 lies outside
    assert not samples.requires_grad
    assert torch.equal(atfm.sample(image, 3, steps=2, generator=seeded(5, device)), samples)
    assert not torch.equal(atfm.sample(image, 3, steps=2, generator=seeded(6, device)), samples)
    assert (samples[:, 0] != samples[:, 1]).any()


def test_the_objective_says_how_to_sample():
    atfm, (image, _) = system(solver="midpoint", steps=3), batch()
    three, default = (of.sample(image, 1, generator=seeded()) for of in (atfm, system()))
    assert torch.equal(three, system().sample(image, 1, 3, "midpoint", seeded()))
    assert torch.equal(default, system().sample(image, 1, 25, "euler", seeded()))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("solver", ["euler", "midpoint", "ab2"])
def test_the_true_velocity_has_no_loss_and_ends_at_the_mask(signed, solver, device):
    image, masks = (tensor.to(device) for tensor in batch(k=2))
    x_1 = masks.flatten(0, 1)[:, None]
    atfm = ATFM(None, Leading(2 * x_1 - 1 if signed else x_1), Objective(source="normal", signed=signed))
    samples = atfm.sample(image, 2, 4, solver, batch_size=4)  # `Leading` takes all four states or none
    torch.testing.assert_close(samples, masks, rtol=0, atol=1e-5)
    assert single_pass(atfm, image, masks)["loss"].item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("batch_size, sizes", [(1, [1] * 10), (4, [4, 3, 3]), (8, [5, 5]), (100, [10]),
                                               (None, [5, 5])])
def test_samples_drawn_in_even_batches_are_those_drawn_at_once(batch_size, sizes):
    assert STATES_ON_CPU == 8
    atfm, (image, _), batches = system(), batch(), []
    at_once = atfm.sample(image, 5, steps=2, generator=seeded(), batch_size=10)
    atfm.net.register_forward_pre_hook(lambda net, inputs: batches.append(len(inputs[0])))
    in_batches = atfm.sample(image, 5, steps=2, generator=seeded(), batch_size=batch_size)
    torch.testing.assert_close(in_batches, at_once, rtol=0, atol=1e-5)
    assert batches == 2 * sizes


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError, NO_MEMORY_FOR_CUBLAS])
def test_without_memory_for_all_states_they_are_halved_and_the_samples_are_the_same(error, capsys):
    """A net that says it is out of memory for more than three states at once."""
    atfm, (image, _), batches = system(), batch(), []
    expected = atfm.sample(image, 5, steps=2, generator=seeded())

    def allocate(net, inputs):
        batches.append(len(inputs[0]))
        if len(inputs[0]) > enough:
            raise error

    enough = 3

    atfm.net.register_forward_pre_hook(allocate)
    halved = atfm.sample(image, 5, steps=2, generator=seeded(), batch_size=10)
    torch.testing.assert_close(halved, expected, rtol=0, atol=1e-5)
    assert batches == [10, 5, *[3, 3, 2, 2] * 2]
    assert "out of GPU memory in sampling: going on with 5 states at once" in capsys.readouterr().out
    atfm.sample(image, 5, steps=1, generator=seeded(), batch_size=10)
    assert batches[10:] == [3, 3, 2, 2]  # from now on
    enough = 0
    with pytest.raises(RuntimeError) as last:
        atfm.sample(image, 1, steps=1)
    assert last.value is error or isinstance(last.value, torch.cuda.OutOfMemoryError)


def test_another_error_is_not_taken_for_one_of_memory():
    chunks, calls = Chunks(), []

    def fail(state):
        calls.append(len(state))
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        chunks(10, fail, torch.zeros(10))
    assert calls == [10]


def test_on_a_gpu_as_many_states_go_through_the_net_as_have_a_million_pixels():
    for side, expected in ((64, 256), (128, 64), (256, 16), (2048, 1)):
        assert states_at_once(torch.empty(2, 3, side, side, device="meta")) == expected


@pytest.mark.parametrize("guidance", [0.0, 0.3, 2.0])
def test_guidance_extrapolates_from_the_field_without_image(guidance):
    atfm, (image, _) = system(guidance=guidance), batch()
    samples = atfm.sample(image, 3, steps=1, generator=seeded())
    with torch.no_grad():
        x_0 = atfm.sample_source(image, 3, seeded())
        conditional, null = (torch.cat([atfm.net(x, torch.zeros(2), seen) for x in x_0.split(1, 1)], 1)
                             for seen in (image, torch.zeros_like(image)))
    assert (conditional - null).abs().max() > 0.01
    expected = (x_0 + (1 + guidance) * conditional - guidance * null).clamp(0, 1)
    assert ((expected > 0) & (expected < 1)).float().mean() > 0.1
    torch.testing.assert_close(samples, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_net_is_one_graph_for_all_sizes_of_a_batch(monkeypatch):
    """Of training and its last batches, of one image too; and of the parts of a sample."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    torch._dynamo.utils.counters.clear()
    for recompute in (False, True):
        atfm = system(recompute, annotators_per_pass=1)
        atfm.compile_net()
        plain = step(system(recompute, annotators_per_pass=1))[0]
        torch.testing.assert_close(step(atfm)[0], plain)
        for b in (3, 1, 5):
            for part in atfm.losses(*batch(b)):
                part["loss"].backward()
        assert len(graphs) == 1
        fast, sizes = atfm.for_sampling(amp=False, compiled=True), (4, 2, 3)
        fast.sample(batch()[0], 5, steps=1, batch_size=4)
        for n in sizes:
            fast.sample(batch(b=1)[0], n, steps=1, batch_size=2)
        assert len(graphs) == 2
        graphs.clear()
        torch._dynamo.reset()
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("options", [
    {}, {"channels_last": True}, pytest.param({"compiled": True}, marks=pytest.mark.slow)])
def test_ways_to_be_fast_change_samples_by_rounding_only(options, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # minutes less
    atfm, (image, _) = system(guidance=0.5, solver="midpoint", steps=2), batch()
    fast = atfm.for_sampling(amp=False, **options)
    expected, samples = (of.sample(image, 3, generator=seeded()) for of in (atfm, fast))
    torch.testing.assert_close(samples, expected, rtol=0, atol=1e-5)
    assert fast.net is not atfm.net and all(weight.requires_grad for weight in atfm.net.parameters())


def test_validation_is_in_the_plain_layout_as_it_is_not_compiled():
    atfm = system()
    atfm.net.to(memory_format=torch.channels_last)
    assert not atfm.net.middle.block1.conv1.weight.is_contiguous()
    assert all(weight.is_contiguous() for weight in atfm.for_validation(atfm.net).net.parameters())
    assert not atfm.net.middle.block1.conv1.weight.is_contiguous()


def test_bfloat16_changes_results_by_its_rounding_only():
    image, masks = batch()
    full, half = system(), system(amp=True)
    samples, rounded, fast = (of.sample(image, 2, steps=3, generator=seeded())
                              for of in (full, half, full.for_sampling(amp=True)))
    for others in rounded, fast:
        assert others.dtype == torch.float32 and not torch.equal(others, samples)
        torch.testing.assert_close(others, samples, rtol=0, atol=0.05)
    loss = single_pass(half, image, masks)["loss"]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(single_pass(full, image, masks)["loss"].item(), rel=0.02)


@pytest.mark.parametrize("shape", [(2, SIZE, SIZE), (1, 3, SIZE, SIZE), (2, 3, SIZE, 4)])
def test_masks_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"masks of shape .* for image of shape .*: expected \(b, k, h, w\)"):
        next(system().losses(batch()[0], torch.zeros(shape)))


CHANNELS = r"image of shape .*: expected \(b, 1, h, w\) or \(b, 3, h, w\)"
COUNTS = "one of euler, midpoint.* and the numbers to be at least 1"


@pytest.mark.parametrize("asked, message", [
    ({"image": torch.zeros(2, 2, SIZE, SIZE)}, CHANNELS), ({"image": torch.zeros(1, SIZE, SIZE)}, CHANNELS),
    ({"image": torch.zeros(1, 1, 9, 8)}, "multiple.* of 2"), ({"solver": "rk5"}, COUNTS),
    ({"steps": 0}, COUNTS), ({"n": 0}, COUNTS), ({"batch_size": 0}, COUNTS),
])
@pytest.mark.parametrize("source", ["gtr", "normal"])
def test_what_cannot_be_sampled_is_refused(source, asked, message):
    with pytest.raises(ValueError, match=message):
        system(source=source).sample(**{"image": batch()[0], "n": 1, **asked})
