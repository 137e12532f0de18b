"""The systems that sample in steps, what they share; and Flow-SSN."""

import pytest
import torch

from metadata_manager import FlowConfig
from models.baselines.flow_ssn import FlowSSN
from tests.stepwise import SYSTEMS, T, one_piece, system
from tests.tiny import SIZE, batch, seeded

CHANNELS = r"image of shape .*: expected \(b, 1, h, w\)"


def test_flow_ssn_learns_the_endpoint_from_a_source_of_unit_variance():
    model = system("flow-ssn")
    terms = one_piece(model, 4)
    torch.manual_seed(4)
    image, masks = batch()
    y = masks[[0, 1], torch.randint(3, (2,))][:, None]
    t, noise = torch.rand(2), torch.randn(y.shape)
    entropies = []
    for i in range(2):
        x_t = (1 - t[i]) * (model.mean(image[i, None]) + noise[i]) + t[i] * y[i]
        p = model.net(x_t, t[i, None], torch.zeros(1, 0, SIZE, SIZE))[0].sigmoid()
        entropies.append(-(y[i] * p.log() + (1 - y[i]) * (1 - p).log()).mean().item())
    expected = sum(entropies) / 2
    assert terms == pytest.approx({"loss": expected, "CE": expected}, rel=1e-4)


def test_flow_ssns_sample_is_the_mean_of_its_steps_probabilities():
    model, (image, _) = system("flow-ssn"), batch()
    samples = model.sample(image, 2, 5, seeded())
    with torch.no_grad():
        x_0 = model.mean(image).repeat_interleave(2, 0) + torch.randn(4, 1, SIZE, SIZE, generator=seeded())
        x, total = x_0, torch.zeros_like(x_0)
        for i in range(5):
            p = model.net(x, torch.full((4,), i / 5), x[:, :0]).sigmoid()
            total += p / 5
            x = x + (p - x_0) / 5
    torch.testing.assert_close(samples.flatten(0, 1)[:, None], total, rtol=0, atol=1e-5)


def test_flow_ssns_flow_is_tiny_at_full_size():
    with torch.device("meta"):
        model = FlowSSN(1, FlowConfig(dim=32, dim_mults=(1, 2, 4, 6)))
    counts = [sum(weight.numel() for weight in part.parameters()) for part in (model.net, model.mean)]
    assert 100_000 < counts[0] < 200_000 < 1_000_000 < counts[1]


@pytest.mark.parametrize("steps, expected", [(1, [8, 0]), (3, [8, 5, 2, 0]), (8, list(range(8, -1, -1)))])
def test_fewer_steps_go_through_some_of_the_levels(steps, expected):
    assert system("ccdm").levels(steps) == expected


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_generator_alone_decides_samples_up_to_rounding(name):
    model, (image, _) = system(name, channels=3), batch(channels=3)
    samples = model.sample(image, 3, 2, seeded(5), batch_size=6)
    torch.manual_seed(1)
    assert samples.shape == (2, 3, SIZE, SIZE) and samples.dtype == torch.float32
    assert not samples.requires_grad
    assert samples.min() >= 0 and samples.max() <= 1
    assert torch.equal(model.sample(image, 3, 2, seeded(5), batch_size=6), samples)
    assert (samples[:, 0] != samples[:, 1]).any()
    assert not torch.equal(model.sample(image, 3, 2, seeded(6)), samples)
    for batch_size in (1, 4):
        batched = model.sample(image, 3, 2, seeded(5), batch_size)
        torch.testing.assert_close(batched, samples, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_net_is_called_as_often_as_the_system_says(name):
    model, calls = system(name), []
    model.net.register_forward_pre_hook(lambda net, inputs: calls.append(len(inputs[0])))
    samples = model.sample(batch()[0], 3, generator=seeded(), batch_size=6)
    assert model.nfe() == T and calls == [6] * T
    assert torch.equal(model.sample(batch()[0], 3, T, seeded(), 6), samples)
    calls.clear()
    model.sample(batch()[0], 5, 1, seeded(), batch_size=4)
    assert sum(calls) == 10 and max(calls) <= 4


@pytest.mark.parametrize("name", SYSTEMS)
def test_gradients_reach_every_parameter(name):
    model = system(name, experts="all")
    for seed in range(2):
        torch.manual_seed(seed)
        for piece in model.losses(*batch()):
            piece["loss"].backward()
    reached = {key for key, weight in model.named_parameters()
               if weight.grad is not None and weight.grad.any()}
    assert reached == set(dict(model.named_parameters()))


@pytest.mark.parametrize("name", SYSTEMS)
def test_all_experts_give_a_piece_each_whose_sum_is_the_mean(name):
    model, (image, masks) = system(name, experts="all"), batch()
    torch.manual_seed(0)
    pieces = [{key: value.item() for key, value in piece.items()} for piece in model.losses(image, masks)]
    torch.manual_seed(0)
    assert len(pieces) == 3
    for i, piece in enumerate(pieces):
        alone = {key: value.item() / 3 for key, value in model.terms(image, masks[:, [i]]).items()}
        assert piece == pytest.approx(alone, rel=1e-5)


MASKS = r"masks of shape .* for image of shape .*: expected \(b, k, h, w\)"


@pytest.mark.parametrize("channels, shape, message", [
    (1, (2, SIZE, SIZE), MASKS), (1, (1, 3, SIZE, SIZE), MASKS), (1, (2, 3, SIZE, 4), MASKS),
    (2, (2, 3, SIZE, SIZE), CHANNELS)])
def test_a_batch_of_other_shapes_is_refused(channels, shape, message):
    with pytest.raises(ValueError, match=message):
        next(system("ccdm").losses(batch(channels=channels)[0], torch.zeros(shape)))


@pytest.mark.parametrize("name", ["ccdm", "flow-ssn"])
@pytest.mark.parametrize("asked, message", [
    ({"steps": 0}, "steps=0.*at least 1"), ({"n": 0}, "n=0"), ({"batch_size": 0}, "batch_size=0"),
    ({"image": torch.zeros(0, 1, SIZE, SIZE)}, "^0 images"),
    ({"image": torch.zeros(1, SIZE, SIZE)}, CHANNELS),
    ({"image": torch.zeros(1, 2, SIZE, SIZE)}, CHANNELS), ({"image": torch.zeros(1, 1, 9, 8)}, "multiple"),
])
def test_what_cannot_be_sampled_is_refused(name, asked, message):
    with pytest.raises(ValueError, match=message):
        system(name).sample(**{"image": batch()[0], "n": 1, **asked})


def test_a_diffusion_takes_no_more_steps_than_it_has_noise_levels():
    image, _ = batch()
    for name in ("ccdm", "ab", "cimd"):
        with pytest.raises(ValueError, match="steps=9.*at most 8 steps"):
            system(name).sample(image, 1, T + 1)
    assert system("flow-ssn").sample(image, 1, T + 1).isfinite().all()
