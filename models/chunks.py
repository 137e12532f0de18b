"""How many states, or samples, go through a network at once when sampling."""

import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from metrics.program import out_of_gpu_memory

# More states at once do not fit a CPU's caches and are slower.
STATES_ON_CPU = 8
# 64 states of 128x128 keep a GPU busy. At ST-Net's widest, dim 256, they take 10 GiB (estimated), and its
# maps stay below the 2^31 elements beyond which CUDA's kernels are slow or fail.
PIXELS_ON_GPU = 2**20


def states_at_once(image: Tensor) -> int:
    """How many states of the size of an image (b, c, h, w) go through a network at once, on its device."""
    if image.device.type == "cpu":
        return STATES_ON_CPU
    return max(1, PIXELS_ON_GPU // image[0, 0].numel())


class Chunks:
    """Runs a network on a part of its inputs at a time, and on smaller parts where memory did not suffice."""

    def __init__(self) -> None:
        self.most_at_once = sys.maxsize

    def __call__(self, at_once: int, net: Callable[..., Tensor], *states: Tensor) -> Tensor:
        """net(*states), each of them (m, ...), with at most `at_once` of the m at a time, in equal parts.

        Where GPU memory does not suffice, the parts are halved from then on, and a line is printed. Changes
        results by rounding only."""
        m = len(states[0])
        # Equal parts, because a small rest would use the device badly.
        parts = math.ceil(m / min(at_once, self.most_at_once))
        try:
            return torch.cat([net(*part) for part in zip(*(state.tensor_split(parts) for state in states))])
        except RuntimeError as error:
            # A single state did not fit: there is nothing left to halve.
            if parts == m or not out_of_gpu_memory(error):
                raise
        # Retried here, not in the except block, whose traceback would hold the tensors of the failed pass.
        self.most_at_once = math.ceil(math.ceil(m / parts) / 2)
        print(f"out of GPU memory in sampling: going on with {self.most_at_once} states at once")
        return self(at_once, net, *states)
