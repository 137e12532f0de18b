"""ST-Net's GroupNorm over whole maps (App. 6), on CUDA computed by all of a GPU."""

from typing import Any

import torch
from torch import Tensor, nn


class SplitNorm(torch.autograd.Function):
    """GroupNorm(1) of maps x (b, c, h, w) whose mean and variance all of a GPU computes; torch's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rstd = normalized(x, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, mean, rstd, weight = ctx.saved_tensors
        b, c, h, w = x.shape
        # The operation reads memory in order. 1 is the number of groups.
        of_inputs = torch.ops.aten.native_group_norm_backward(
            grad.contiguous(), x, mean, rstd, weight, b, c, h * w, 1, ctx.needs_input_grad[:3])
        # eps is a number and has no gradient.
        return *of_inputs, None


def normalized(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """GroupNorm(1) of maps x (b, c, h, w), with their mean and 1 / standard deviation, both (b, 1).

    weight, bias: (c,), or (b, c) where they differ from map to map."""
    variance, mean = torch.var_mean(x.flatten(1), dim=1, correction=0, keepdim=True)
    rstd = (variance + eps).rsqrt()
    # (x - mean) * rstd * weight + bias, sorted so that one multiplication and one addition per pixel remain.
    factor = rstd * weight  # (b, c)
    return scaled(x, factor, bias - factor * mean), mean, rstd


def scaled(x: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
    """x * factor + shift for x (b, c, h, w), factor and shift (b, c), in one pass over x."""
    return torch.addcmul(shift[:, :, None, None], x, factor[:, :, None, None])


class Norm(nn.GroupNorm):
    """GroupNorm(1), each state's whole map (c, h, w) with one mean and variance, in float32.

    On CUDA torch's kernel computes the mean of a state with a single block of threads. For ST-Net's few large
    maps this leaves most of a GPU idle, so `SplitNorm` is used there. Under torch.compile torch's operation
    stays, because it can be fused with its neighbours."""

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels)

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """norm(x), or norm(x) * (1 + scale) + shift for scale and shift (b, c): (b, c, h, w)."""
        if self.splits(x):
            return self.split(x, scale, shift)
        return modulated(super().forward(x), scale, shift)

    def splits(self, x: Tensor) -> bool:
        """Whether x is normalized by `split`."""
        return x.is_cuda and not torch.compiler.is_compiling()

    def split(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """The same as `forward`, by `SplitNorm`; without a gradient, in a single pass after the moments."""
        # Means over a whole map need float32, under autocast, too.
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if torch.is_grad_enabled():
                return modulated(SplitNorm.apply(x, self.weight, self.bias, self.eps), scale, shift)
            # Scale and shift change the norm's few weights instead of its large map.
            weight, bias = self.weight, self.bias
            if scale is not None and shift is not None:
                weight, bias = weight * (scale + 1), bias * (scale + 1) + shift  # (b, c)
            return normalized(x, weight, bias, self.eps)[0]


def modulated(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """y * (1 + scale) + shift, or y itself without them."""
    return y if scale is None or shift is None else scaled(y, scale + 1, shift)
