"""From models to samplers: how many states go through ST-Net at once. (The rest: test_scripts.py.)"""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from models import ATFM, STNet
from models.systems import STATES_ON_CPU, flow_sampler, states_at_once, that_fit

GIB = 2**30


@pytest.mark.parametrize("each, free, expected", [
    (10, 1000, 64), (10, 920, 64), (10, 910, 32), (10, 100, 4), (10, 29, 2), (10, 15, 1), (10, 0, 1)])
def test_a_power_of_two_of_states_fits_in_70_percent_of_the_memory(each, free, expected):
    assert that_fit(each, free) == expected


def test_a_sampler_takes_as_many_states_as_its_device_holds_unless_told():
    atfm, sizes = ATFM(None, STNet(4, (1, 2)), source="normal"), []
    atfm.net.register_forward_pre_hook(lambda net, inputs: sizes.append(len(inputs[0])))
    image, generator = torch.rand(1, 1, 8, 8), torch.Generator()
    for batch_size in (None, 5):
        flow_sampler(atfm, 1, "euler", batch_size, atfm.net)(image, 2 * STATES_ON_CPU, generator)
    assert sizes == [STATES_ON_CPU] * 2 + [4] * 4


def test_a_gpu_s_free_memory_is_divided_by_what_a_state_takes():
    """Its allocator simulated: 3 GiB in use and 4 more reserved, 5 GiB at the most with two states."""
    drawn = []
    atfm = SimpleNamespace(net=None, sample=lambda image, n, steps, net: drawn.append((n, steps)))
    gpu = dict(reset_peak_memory_stats=None, memory_allocated=3 * GIB, max_memory_allocated=5 * GIB,
               memory_reserved=7 * GIB, mem_get_info=(20 * GIB, 24 * GIB))
    returns = {name: mock.Mock(return_value=value) for name, value in gpu.items()}
    with mock.patch.multiple(torch.cuda, **returns):
        found = states_at_once(atfm, SimpleNamespace(device=torch.device("cuda")))
    assert drawn == [(2, 1)]
    assert found == 16  # of 1 GiB, in 70 % of 20 + 4
