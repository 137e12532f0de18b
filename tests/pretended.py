"""A GPU for tests on a machine without one: tensors that say they are on cuda:0, their data on the CPU.

Every operation is checked as CUDA would: one that meets tensors of both devices raises, and so does NumPy's
view of a tensor of the GPU. Kernels, memory and speed are the CPU's: for these see tests/benchmarks/gpu.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # torch imports it where it first needs it, and it names the Generator replaced below
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda:0")
aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default)
INDEXES = (aten.index.Tensor, aten.index_put_.default)  # take indices on the CPU
IN_CPP = (aten.index_put.default,)  # of a gradient, whose zeros C++ makes, for which the data's device counts
ANSWERS = {"is_bf16_supported": True, "max_memory_allocated": 2}
QUIET = ("_lazy_init", "set_device", "synchronize", "reset_peak_memory_stats", "empty_cache",
         "is_current_stream_capturing")  # they give None


class OnCuda(torch.Tensor):
    """A tensor that says it is on cuda:0. held: its data, a plain tensor."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "OnCuda":
        made = torch.Tensor._make_subclass(cls, held, False, device_for_backend_keys=CUDA)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return checked(func, args, kwargs or {})

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("copy", None)
        device, dtype, without_waiting, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == "cpu":
            if not without_waiting:
                return self.cpu().to(dtype or self.dtype)
            host = torch.full_like(self.held.detach(), torch.nan)
            COPIES.append((host, self.held))
            return host
        change = {"dtype": dtype} if dtype not in (None, self.dtype) else {}
        return aten._to_copy.default(self, **change) if change else self

    def cpu(self, *_: Any, **__: Any) -> torch.Tensor:
        WAITS.append("copy to the host")
        return self.held.detach().clone()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def tolist(self) -> Any:
        WAITS.append("tolist")
        return self.held.tolist()

    def __deepcopy__(self, memo: dict) -> "OnCuda":
        copied = OnCuda(self.held.clone()).requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copied._is_param = True  # what makes it an nn.Parameter
        return memo.setdefault(id(self), copied)


WAITS: list[str] = []  # what the host had to wait for, since it was cleared
COPIES: list[tuple[torch.Tensor, torch.Tensor]] = []  # to the host without waiting: (there, its data)


class Event:
    """Until one that was recorded after a copy is waited for, the copy holds NaN."""

    def record(self) -> None:
        self.copies, COPIES[:] = COPIES[:], []

    def synchronize(self) -> None:
        for host, data in self.copies:
            host.copy_(data)


def checked(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """func(*args, **kwargs) on the data, after checking where they lie."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_gpu = [tensor for tensor in tensors if isinstance(tensor, OnCuda)]
    asked = kwargs.get("device")
    if func is aten._local_scalar_dense.default and on_gpu:
        WAITS.append("a number")
    if on_gpu and func not in (*MOVES, *IN_CPP):
        plain = [tensor for tensor in tensors if not isinstance(tensor, OnCuda) and tensor.ndim]
        if plain and not (func in INDEXES and isinstance(args[0], OnCuda)):
            raise RuntimeError(f"{func}: Expected all tensors to be on the same device, but found cuda:0 and "
                               f"a CPU tensor of shape {tuple(plain[0].shape)}")
    held_args, held_kwargs = tree_map(
        lambda leaf: leaf.held if isinstance(leaf, OnCuda) else leaf, (args, kwargs))
    if asked is not None:
        held_kwargs["device"] = torch.device("cpu")
    result = func(*held_args, **held_kwargs)
    if func._schema.is_mutable and isinstance(result, torch.Tensor):
        return next((tensor for tensor in on_gpu if tensor.held is result), result)
    if not on_gpu if asked is None else torch.device(asked).type != "cuda":
        return result
    return tree_map(lambda leaf: OnCuda(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)


class Pretend(TorchDispatchMode):
    """While it is active, tensors can be made on CUDA."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return checked(func, args, kwargs or {})


@contextmanager
def gpu() -> Iterator[torch.device]:
    """The pretended GPU, while the block runs; its generators are the CPU's."""
    make, make_tensor = torch.Generator, torch.tensor
    answers = {name: mock.Mock(return_value=value)
               for name, value in (ANSWERS | dict.fromkeys(QUIET)).items()}

    def tensor(data: Any, device: Any = None, **settings: Any) -> torch.Tensor:
        made = make_tensor(data, **settings)
        return made if device is None else made.to(device)

    def one_hot(x: torch.Tensor, classes: int) -> torch.Tensor:
        return (x[..., None] == torch.arange(classes, device=x.device)).long()

    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with (mock.patch.multiple(torch.cuda, Event=Event, **answers),
              mock.patch.object(torch, "Generator", lambda device="cpu": make()),
              # These make or move tensors in C++, where no mode sees it.
              mock.patch.object(torch, "tensor", tensor), mock.patch("metrics.maps.one_hot", one_hot),
              mock.patch.object(torch.nn.functional, "one_hot", one_hot),
              mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
              Pretend()):
            yield CUDA
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
