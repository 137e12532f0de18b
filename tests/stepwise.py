"""Small systems that sample in steps, for their tests."""

import torch
from torch import nn

from metadata_manager import FlowConfig
from models.baselines.analog_bits import AnalogBits
from models.baselines.ccdm import CCDM
from models.baselines.cimd import CIMD
from models.baselines.flow_ssn import FlowSSN
from tests.tiny import batch

T = 8
SYSTEMS = {"ccdm": (CCDM, {"T": T}), "ab": (AnalogBits, {"T": T}), "cimd": (CIMD, {"T": T, "latents": 2}),
           "flow-ssn": (FlowSSN, {"steps": T, "flow_dim": 4})}


def system(name, experts="one", channels=1, **options):
    torch.manual_seed(0)
    kind, small = SYSTEMS[name]
    config = FlowConfig(dim=4, dim_mults=(1, 2), experts=experts, weight_standardization="none",
                        time_scale=10.0)
    return kind(channels, config, **small | options)


def one_piece(model, seed):
    """The terms of a batch, one expert per image, as numbers."""
    torch.manual_seed(seed)
    (terms,) = model.losses(*batch())
    assert [name for name, value in terms.items() if value.requires_grad] == ["loss"]
    return {name: value.item() for name, value in terms.items()}


def replay(seed):
    """The image and a random expert's masks (b, 1, h, w), and t, as a step draws them under a seed."""
    torch.manual_seed(seed)
    image, masks = batch()
    return image, masks[[0, 1], torch.randint(3, (2,))][:, None], torch.randint(1, T + 1, (2,))


class Known(nn.Module):
    """A net of the formula `answer(x_t, t, seen)`, t counted to T; keeps what it was asked."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.states, self.seen = answer, [], []

    def forward(self, x_t, t, seen):
        self.states.append(x_t)
        self.seen.append(seen)
        return self.answer(x_t, round(t[0].item() * T), seen)
