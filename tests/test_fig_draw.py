"""python -m fig.draw on tiny runs: which images, samples and curves README's pictures show; mistakes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fig
import train_GTR
import train_prior_LIDC
from data import load
from fig import draw
from metadata_manager import Metadata
from models import load_flow, load_gtr
from tests import tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(lidc, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    where = ["--data_path", str(lidc), "--output_path", str(folder)]
    train_GTR.main([*tiny.GTR, *where, "--rank", "3", "--epochs", "1"])
    train_prior_LIDC.main([*tiny.PRIOR, *where, "--num_epochs", "1", "--steps", "4"])
    return folder


@pytest.fixture
def drawn(monkeypatch, run, lidc, tmp_path):
    """Runs a command and returns what it gave to fig's function of that name, and the figure."""

    def call(function, picture, *flags):
        given, real = [], getattr(fig, function)
        monkeypatch.setattr(fig, function, lambda *arrays: given.extend(arrays) or given.append(real(*arrays))
                            or given[-1])
        draw.main([picture, "--output", str(tmp_path / "a.png"), "--run", str(run), "--data_path", str(lidc),
                   "--device", "cpu", *map(str, flags)])
        return given

    return call


@pytest.fixture
def trained(run, lidc):
    metadata = Metadata(data_path=str(lidc), crop=8, limit=6)
    gtr = load_gtr(run / "GTR" / "best.pt", metadata)
    return load_flow(run / "atfm" / "best.pt", "atfm", lambda: gtr, metadata), load(metadata, "test")


def test_pred_draws_the_images_asked_for_with_the_flows_samples(drawn, trained):
    image, masks, samples, _ = drawn("prediction_grid", "pred", "--image", 4, 1)
    atfm, test = trained
    expected, experts = test.batch([4, 1])
    assert torch.equal(image, expected) and torch.equal(masks, experts)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(samples, atfm.sample(expected, 16, 4, generator=generator) >= 0.5)


def test_main_draws_the_path_of_the_sampler(drawn, trained):
    image, _, mean, factor, gtr_samples, states, times, samples, _ = drawn("overview", "main", "--image", 2)
    (atfm, test), generator = trained, torch.Generator()
    assert torch.equal(image, test[2][0]) and times == [0, 0.25, 0.5, 0.75, 1]
    gaussian = atfm.gtr(image[None])
    torch.testing.assert_close((mean, factor), (gaussian.mean[0], gaussian.cov_factor[0]))
    torch.testing.assert_close(gtr_samples, atfm.gtr.sample(image[None], 16, generator.manual_seed(0))[0])
    end = atfm.sample(image[None], 16, 4, "euler", generator.manual_seed(0))[0]
    assert torch.equal(samples, end >= 0.5)
    x = gtr_samples[:1]  # Euler's steps of the first sample, written out
    for i, state in enumerate(states):
        torch.testing.assert_close(state, x[0].clamp(0, 1) if i == 4 else x[0], atol=1e-5, rtol=1e-4)
        x = x + atfm.net(x[None], torch.tensor([i / 4]), image[None])[0].detach() / 4


def test_what_experts_disagree_on_most_is_drawn_once_per_patient():
    masks = torch.zeros(5, 2, 10, 10)
    # 1 - IoU: 0; 3/4; 15/16 of the patient of the image before; 5/9; 1, but an expert's mask is empty
    for of_image, sides in zip(masks, [(4, 4), (4, 8), (2, 8), (4, 6), (0, 8)]):
        for mask, side in zip(of_image, sides):
            mask[:side, :side] = 1

    class Five(list):
        patients = np.array([7, 8, 8, 9, 10])

    assert draw.most_disputed(Five((None, of) for of in masks), 3) == [2, 3, 0]


@pytest.mark.parametrize("flags, message", [
    ("main --image 6", "--image 6: LIDC has test images 0 to 5"),
    ("main --image 0 1", "--image: 2 images, expected one"),
    ("pred", "3 patients have a test image .* expected 4; choose with --image"),
    ("pred --image 0 --output {out}/a.bmq", "a.bmq: suffix '.bmq', expected one of"),
    ("pred --method sfm", "sfm/best.pt: no such checkpoint"),
])
def test_a_mistake_is_named_in_one_line_and_leaves_no_picture(run, lidc, tmp_path, flags, message):
    picture, *rest = flags.format(out=tmp_path).split()
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        draw.main([picture, "--output", str(tmp_path / "a.png"), "--run", str(run), "--data_path", str(lidc),
                   "--device", "cpu", *rest])
    assert not list(tmp_path.iterdir())


def test_a_flow_without_gtr_has_no_picture_of_the_method_but_one_of_samples(drawn, lidc, tmp_path):
    place = ["--output_path", str(tmp_path / "run"), "--data_path", str(lidc), "--num_epochs", "1"]
    train_prior_LIDC.main([*tiny.PRIOR, *place, "--method", "sfm", "--steps", "1"])
    flags = ["--image", 0, "--method", "sfm", "--run", tmp_path / "run"]
    with pytest.raises(SystemExit, match="--method sfm: a flow without GTR, expected one whose x_0"):
        drawn("overview", "main", *flags)
    assert drawn("prediction_grid", "pred", *flags)[2].shape[1] == 16


def test_a_file_that_exists_is_kept_and_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pred.png").write_bytes(b"the user's")
    with pytest.raises(SystemExit, match=f"--output {tmp_path}/run/pred.png: exists and is kept; remove it"):
        draw.main(["pred", "--run=~/run"])
    assert (tmp_path / "run" / "pred.png").read_bytes() == b"the user's"


def test_help_and_misspelt_flags_are_answered_without_importing_torch():
    code = ("import sys\nfrom fig import draw\ntry: draw.main(['--help'])\n"
            "finally: print(*{'torch', 'matplotlib', 'data', 'models'} & set(sys.modules), file=sys.stderr)")
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0 and answer.stderr.strip() == ""
    assert all(name in answer.stdout for name in draw.PICTURES) and answer.stdout.isascii()
