"""What one adds is one entry of a table: both steps, a test and the pictures run with it."""

import json

import pytest
import torch
from torch import nn

import test_prior_LIDC
import train_GTR
import train_prior_LIDC
from fig import draw
from models import checkpoint
from models.gtr import BACKBONES
from models.losses import TERMS, Term
from models.sources import SOURCES, Source
from models.st_net import NETWORKS
from tests import tiny

EPOCH = ("--epochs", "1")


class Plain(nn.Module):
    """A network of the flow that sees one pixel at a time."""

    def __init__(self, image_channels):
        super().__init__()
        self.image_channels = image_channels
        self.layer = nn.Conv2d(image_channels + 2, 1, 1)

    def forward(self, x_t, t, image):
        time = t[:, None, None, None].expand_as(x_t)
        return self.layer(torch.cat([x_t, time, image], dim=1))

    def with_fixed_weights(self):
        return self


def soft(image, gaussian, n, generator=None):
    return (gaussian.sample(n, generator) / 4).sigmoid()


def roughness(prediction, choice):
    return prediction.x_1t.diff(dim=-1).square().mean()


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setitem(SOURCES, "soft", Source(soft, over_gtr=True, unit_range=True))
    monkeypatch.setitem(BACKBONES, "layer",
                        lambda channels, config: nn.Conv2d(channels, config.num_filters[0], 1))
    monkeypatch.setitem(NETWORKS, "plain", lambda config, image_channels: Plain(image_channels))
    monkeypatch.setitem(TERMS, "L_rough", Term(roughness, lambda choice: 0.1))


def test_a_source_a_backbone_a_network_and_a_loss_term_are_trained_tested_and_drawn(
        added, lidc, tmp_path, capsys):
    where = tiny.where(lidc, tmp_path)
    train_GTR.main([*tiny.GTR, *where, *EPOCH, "--backbone", "layer", "--rank", "3"])
    assert "unet.weight" in checkpoint.load(tmp_path / "GTR" / "best.pt")["model"]
    train_prior_LIDC.main(
        [*tiny.PRIOR, *where, "--num_epochs", "1", "--source", "soft", "--network", "plain"])
    printed = capsys.readouterr().out
    assert "L_FM" in printed and "L_rough" in printed
    content = checkpoint.load(tmp_path / "atfm" / "best.pt")
    assert set(content["model"]) == {"layer.weight", "layer.bias"} and content["preset"] == "custom"
    # The source is over GTR: its weights are asked for, not noise taken in its place.
    assert content["config"]["gtr_weights"] is not None

    test_prior_LIDC.main([*tiny.TEST, *where])
    report = json.loads((tmp_path / "test" / "results.json").read_text())
    assert set(report["systems"]) == {"act-gtr (custom)", "atfm (custom)"}
    assert (tmp_path / "test" / "comparison.png").exists()
    draw.main(["main", "--run", str(tmp_path), "--image", "0", "--data_path", str(lidc),
               "--device", "cpu"])
    assert (tmp_path / "main.png").exists()
