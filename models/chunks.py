"""How many states, or samples, go through a network at once when sampling."""

import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor

STATES_ON_CPU = 8  # more at once leave a CPU's caches and are slower


class Chunks:
    """Runs a network on a part of its inputs at a time; on smaller ones where memory did not suffice."""

    def __init__(self) -> None:
        self.most_at_once = sys.maxsize

    def __call__(self, at_once: int, net: Callable[..., Tensor], *states: Tensor) -> Tensor:
        """net(*states), each of them (m, ...), with at most `at_once` of the m at a time, in equal parts.

        Out of GPU memory they are halved, which is said, from then on. Changes results by rounding only."""
        m = len(states[0])
        parts = math.ceil(m / min(at_once, self.most_at_once))
        try:
            return torch.cat([net(*part) for part in zip(*(one.tensor_split(parts) for one in states))])
        except torch.cuda.OutOfMemoryError:
            if parts == m:
                raise
        self.most_at_once = math.ceil(math.ceil(m / parts) / 2)
        print(f"out of GPU memory in sampling: going on with {self.most_at_once} states at once")
        return self(at_once, net, *states)
