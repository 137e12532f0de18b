"""python -m fig.draw on tiny runs: which images, samples and curves README's pictures show; mistakes."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import fig
from data.augment import augment
from fig import draw
from metadata_manager import Metadata
from models.stages import train_gtr, train_prior
from models.systems import flow_sampler
from models.testing import test_prior as run_test
from tests import tiny

IMAGES = 6  # of the test split: two slices of three patients


@pytest.fixture(scope="module")
def run(lidc, tmp_path_factory):
    """A run's folder: GTR, a flow, one with another alpha, and a test of the two at 1 and 2 steps."""
    folder = tmp_path_factory.mktemp("runs")
    where = ["--data_path", str(lidc), "--output_path", str(folder)]
    train_gtr("LIDC", [*tiny.GTR, *where, "--rank", "3", "--epochs", "2", "--validate_every", "1"])
    train_prior("LIDC", [*tiny.PRIOR, *where, "--num_epochs", "1", "--steps", "4"])
    train_prior("LIDC", [*tiny.PRIOR, *where, "--num_epochs", "1", "--alphas", "0", "1e-3"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.testing.draw", lambda *arguments: None)
        run_test("LIDC", [*tiny.TEST, *where, "--methods", "atfm", "--alphas", "0", "1e-3",
                          "--steps", "1", "2"])
    return folder


@pytest.fixture
def drawn(monkeypatch, run, lidc, tmp_path):
    """Runs a command and returns what it gave to fig's function of that name, and the picture's path."""

    def call(function, picture, *flags):
        given = {}

        def spy(*arguments, **options):
            given.update(arguments=arguments, options=options)
            given["figure"] = real(*arguments, **options)
            return given["figure"]

        real = getattr(fig, function)
        monkeypatch.setattr(fig, function, spy)
        path = tmp_path / f"{picture}.png"
        reads_data = picture in ("main", "pred", "pred1", "augmentation")
        draw.main([picture, "--output", str(path),
                   *([] if picture == "augmentation" else ["--run", str(run)]),
                   *(["--data_path", str(lidc)] if reads_data else []), *map(str, flags)])
        with Image.open(path) as image:
            assert image.width > 800
        return SimpleNamespace(**given)

    return call


@pytest.fixture
def held_out(lidc):
    return data.load(Metadata(data_path=str(lidc), crop=8, limit=IMAGES), "test")


def trained(run, lidc, method="atfm"):
    return draw.load_run(draw.parser().parse_args(
        ["pred", "--run", str(run), "--method", method, "--data_path", str(lidc), "--device", "cpu"]))


def test_pred_draws_the_images_asked_for_with_the_flows_samples(drawn, run, lidc, held_out, capsys):
    found = drawn("prediction_grid", "pred", "--image", 4, 1, "--seed", 3, "--device", "cpu")
    image, masks, samples = found.arguments
    expected, experts = held_out.batch([4, 1])
    torch.testing.assert_close(image, expected)
    torch.testing.assert_close(masks, experts)
    sample = flow_sampler(trained(run, lidc).atfm, 4, "euler")  # --steps of its training
    torch.testing.assert_close(samples, sample(expected, 16, torch.Generator().manual_seed(3)) >= 0.5)
    first, second = (f"{index} ({held_out.ids[index]})" for index in (4, 1))
    assert f"test images {first}, {second}\n" in capsys.readouterr().out


def test_pred1_takes_the_steps_given(drawn, run, lidc, held_out):
    samples = drawn("prediction_grid", "pred1", "--image", 0, "--steps", 1, "--device", "cpu").arguments[2]
    sample = flow_sampler(trained(run, lidc).atfm, 1, "euler")
    expected = sample(held_out.batch([0])[0], 16, torch.Generator().manual_seed(0)) >= 0.5
    torch.testing.assert_close(samples, expected)


def test_main_draws_the_samplers_own_path(drawn, run, lidc, held_out):
    story = drawn("overview", "main", "--image", 2, "--device", "cpu").arguments
    image, masks, mean, factor, gtr_samples, states, times, samples, variance = story
    expected, experts = held_out[2]
    torch.testing.assert_close(image, expected)
    torch.testing.assert_close(masks, experts)
    atfm = trained(run, lidc).atfm
    gaussian = atfm.gtr(expected[None])
    torch.testing.assert_close((mean, factor), (gaussian.mean[0], gaussian.cov_factor[0]))
    logits = gaussian.sample(16, torch.Generator().manual_seed(0))[0]
    torch.testing.assert_close(gtr_samples, logits.sigmoid())
    assert times == [0, 0.25, 0.5, 0.75, 1]
    end = atfm.sample(expected[None], 16, 4, "euler", torch.Generator().manual_seed(0))[0]
    torch.testing.assert_close(states[-1], end[0])
    torch.testing.assert_close(samples, end >= 0.5)
    p = samples.float().mean(0)
    torch.testing.assert_close(variance, p * (1 - p))
    x = gtr_samples[:1]  # Euler's steps of the first sample, written out
    for state, i in zip(states, range(5)):
        torch.testing.assert_close(state, x[0].clamp(0, 1) if i == 4 else x[0], atol=1e-5, rtol=1e-4)
        x = x + atfm.net(x[None], torch.tensor([i / 4]), expected[None])[0].detach() / 4


def test_what_experts_disagree_on_most_is_drawn_once_per_patient():
    def square(side):
        mask = torch.zeros(10, 10)
        mask[:side, :side] = 1
        return mask

    masks = torch.stack([
        torch.stack([square(4), square(4)]),  # 1 - IoU of the two: 0
        torch.stack([square(4), square(8)]),  # 3/4
        torch.stack([square(2), square(8)]),  # 15/16, of the patient of the one before
        torch.stack([square(4), square(6)]),  # 5/9
        torch.stack([square(0), square(8)]),  # 1, but one expert marked nothing
    ])
    class Five:
        groups = np.array([7, 8, 8, 9, 10])

        def __len__(self):
            return 5

        def batch(self, rows):
            return None, masks[torch.as_tensor(rows)]

    test = Five()
    assert draw.most_disputed(test, 3) == [2, 3, 0]
    with pytest.raises(ValueError, match="3 patients have a test image .* 1% or more, expected 4; "
                                         "choose with --image"):
        draw.most_disputed(test, 4)


def test_the_default_image_is_the_most_disputed(drawn, held_out):
    image = drawn("overview", "main", "--device", "cpu").arguments[0]
    disputes = []
    for masks in (held_out[i][1] for i in range(IMAGES)):
        ious = [float((a * b).sum() / (a + b - a * b).sum()) for a, b in itertools.combinations(masks, 2)]
        disputes.append(1 - sum(ious) / len(ious) if min(masks.mean((1, 2))) >= draw.MIN_AREA else -1)
    torch.testing.assert_close(image, held_out[int(np.argmax(disputes))][0])


def test_augmentation_moves_training_images_and_masks_alike(drawn):
    found = drawn("augmentation_sheet", "augmentation", "--what", "LIDC", "--seed", 1)
    before, masks, after, moved = found.arguments
    assert before.shape == (6, 1, 128, 128) and masks.shape == (6, 4, 128, 128)
    torch.manual_seed(1)
    torch.testing.assert_close((after, moved), augment(before, masks))


def test_curves_have_the_losses_of_the_stages_apart_and_a_line_per_run(drawn):
    found = drawn("learning_curves", "curves")
    (histories,) = found.arguments
    assert sorted(histories) == ["GTR", "atfm", "atfm_alpha_0", "atfm_alpha_0.001"]
    assert [ax.get_title() for ax in found.figure.axes] == [
        "train/loss, GTR", "train/loss, flow", "validation/GED", "validation/HM-IoU"]
    assert [len(ax.lines) for ax in found.figure.axes] == [1, 3, 4, 4]
    assert [ax.get_yscale() for ax in found.figure.axes] == ["log", "log", "linear", "linear"]
    assert len(histories["GTR"]["validation/GED"][0]) == 2  # one per epoch


def test_losses_have_plain_numbers_of_the_same_size_on_their_axes():
    figure = fig.learning_curves({"GTR": {"loss": ([1, 2, 3], [340, 110, 70])}}, log_scale=["loss"])
    fig.figure_to_array(figure)
    ticks = figure.axes[0].get_yticklabels(which="both")
    assert {"100", "200", "300"} <= {tick.get_text() for tick in ticks}
    assert len({tick.get_size() for tick in ticks}) == 1


def test_curves_of_one_stage_and_one_series(drawn, run):
    found = drawn("learning_curves", "curves", "--run", run / "atfm", "--series", "validation/GED")
    assert [ax.get_title() for ax in found.figure.axes] == ["validation/GED"]
    assert [text.get_text() for text in found.figure.legends[0].get_texts()] == ["atfm"]


def test_tradeoff_and_sweep_are_of_the_runs_test(drawn, run):
    for ax in drawn("tradeoff", "tradeoff").figure.axes:
        assert [text.get_text() for text in ax.get_xticklabels()] == ["1", "2"]
    found = drawn("sweep", "sweep", "--results", run / "test" / "results.json")
    for ax in found.figure.axes:
        assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "0.001"]
    assert {drawn.get_label() for drawn in ax.containers} == {"atfm, steps 1", "atfm, steps 2"}


# Mistakes end with one line, and leave no picture.

@pytest.mark.parametrize("flags, message", [
    ("main --image 6", r"--image 6: LIDC has test images 0 to 5"),
    ("main --image 0 --steps 3", "--steps 3: expected at least 4, for 5 states of the path"),
    ("main --image 0 --steps 0", "--steps 0: expected at least 4"),
    ("pred --image 0 --steps 0", "steps=0.*to be at least 1"),
    ("pred --image -1", "--image -1: LIDC has test images 0 to 5"),
    ("pred --method cfm", "cfm.*: no such checkpoint; train that stage first"),
    ("pred", "3 patients have a test image .* expected 4; choose with --image"),
    ("pred --image 0 --output {out}/a.bmq", "a.bmq: found suffix '.bmq', expected one of"),
    ("augmentation --what LIDX", "--what LIDX: unknown dataset"),
    ("curves --series train/los", "--series train/los: .* has .*train/loss.*validation/GED"),
    ("curves --run {out}", "found no TensorBoard log below it; train first"),
    ("tradeoff --run {out}", "test/results.json: no such file; run test_prior"),
    ("sweep --results {out}", "no such file"),
])
def test_a_mistake_is_named_and_leaves_no_picture(run, lidc, tmp_path, flags, message):
    picture, *rest = flags.format(out=tmp_path).split()
    given = [picture, "--output", str(tmp_path / "a.png")]
    given += [] if picture == "augmentation" else ["--run", str(run)]
    given += ["--data_path", str(lidc)] if picture in ("main", "pred", "augmentation") else []
    given += ["--device", "cpu"] if picture in ("main", "pred") else []
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        draw.main([*given, *rest])
    assert not list(tmp_path.iterdir())


def test_a_flow_without_gtr_has_no_main_picture(capsys):
    with pytest.raises(SystemExit):
        draw.main(["main", "--method", "sfm"])
    assert "--method: invalid choice: 'sfm'" in capsys.readouterr().err
