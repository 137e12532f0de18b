"""How many states, or samples, go through a network at once when sampling."""

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metrics.program import out_of_gpu_memory

STATES_ON_CPU = 8  # more at once leave a CPU's caches and are slower
MOST_ELEMENTS = 2**31 - 1  # of a map: beyond, CUDA's kernels count in 64 bits, slowly, or not at all


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
            return torch.cat([net(*part) for part in zip(*(state.tensor_split(parts) for state in states))])
        except RuntimeError as error:
            if parts == m or not out_of_gpu_memory(error):
                raise
        # Retried here, not in the except block, whose traceback would hold the tensors of the failed pass.
        self.most_at_once = math.ceil(math.ceil(m / parts) / 2)
        print(f"out of GPU memory in sampling: going on with {self.most_at_once} states at once")
        return self(at_once, net, *states)


class LargestMap(TorchDispatchMode):
    """While it is active: the elements of the largest tensor that an operation gave.

    torch.compile is left out meanwhile, as its kernels hide what they compute."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        elements = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *elements, 0)
        return result

    def __enter__(self) -> "LargestMap":
        self._eager = torch.compiler.set_stance("force_eager")
        self._eager.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._eager.__exit__(*error)
