"""The U-Net whose features Z feed the heads of GTR (paper, Eq. 3 and App. 6)."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Conv = TypeVar("Conv", nn.Conv2d, nn.ConvTranspose2d)
POOLS: dict[str, Callable[..., Tensor]] = {"max": F.max_pool2d, "avg": F.avg_pool2d}


def channels_last(conv: Conv) -> Conv:
    """The convolution with its weight in the layout whose maps have their channels innermost.

    Maps keep the layout from there on. On a CPU a training step takes 10 to 40 % less time. All weights have
    it, because a gradient in another layout than its weight would be copied."""
    conv.weight = nn.Parameter(conv.weight.detach().contiguous(memory_format=torch.channels_last))
    return conv


class ConvBlock(nn.Sequential):
    """`convs` 3x3 convolutions, each followed by ReLU: (b, in, h, w) -> (b, out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, convs: int) -> None:
        layers: list[nn.Module] = []
        for i in range(convs):
            layers.append(channels_last(
                nn.Conv2d(in_channels if i == 0 else out_channels, out_channels, 3, padding=1)))
            # In place: the gradient of ReLU needs its output only, so that one map less is kept.
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


class Bilinear(nn.Module):
    """Upsampling by 2 without parameters, corners aligned, as in the released code."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class UNet(nn.Module):
    """Features Z = f_theta(image): (b, c, h, w) -> (b, num_filters[0], h, w).

    One level per entry of `num_filters`; h and w must be multiples of 2 ** (levels - 1).
    Paper: two convolutions per block, 2x2 max pooling, transposed convolutions.
    Released: three, 2x2 average pooling, bilinear upsampling.
    """

    def __init__(self, in_channels: int, num_filters: Sequence[int], convs: int, pool: str, up: str) -> None:
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"pool={pool!r}: expected one of {', '.join(POOLS)}")
        if up not in ("transposed", "bilinear"):
            raise ValueError(f"up={up!r}: expected transposed or bilinear")
        self.pool = POOLS[pool]
        self.down_blocks = nn.ModuleList()
        for before, filters in zip([in_channels, *num_filters], num_filters):
            self.down_blocks.append(ConvBlock(before, filters, convs))
        self.ups, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for below, filters in zip(reversed(num_filters[1:]), reversed(num_filters[:-1])):
            self.ups.append(channels_last(nn.ConvTranspose2d(below, filters, 2, stride=2))
                            if up == "transposed" else Bilinear())
            # Bilinear upsampling keeps the channels of the level below; the block has to take them.
            upsampled = filters if up == "transposed" else below
            self.up_blocks.append(ConvBlock(upsampled + filters, filters, convs))

    def forward(self, image: Tensor) -> Tensor:
        return self.ascend(descend(image, self.down_blocks, self.pool))

    def ascend(self, maps: Sequence[Tensor]) -> Tensor:
        """The features Z of the maps that `descend` gives, from the coarsest up."""
        # Every map but the coarsest is a skip; the coarsest of the skips is taken first.
        x, skips = maps[-1], list(maps[:-1])
        for up, block in zip(self.ups, self.up_blocks):
            x = block(torch.cat([up(x), skips.pop()], dim=1))
        return x


def descend(image: Tensor, blocks: nn.ModuleList, pool: Callable[..., Tensor]) -> list[Tensor]:
    """The maps of a U-Net's levels on the way down, the finest first: (b, filters[i], h / 2^i, w / 2^i).

    Raises ValueError if h or w is no multiple of 2 ** (levels - 1)."""
    # Pooling would drop an odd last row, and the way up would then not fit the skips.
    factor = 2 ** (len(blocks) - 1)
    if image.shape[-2] % factor or image.shape[-1] % factor:
        raise ValueError(f"image of {tuple(image.shape[-2:])} pixels: with {len(blocks)} levels each side "
                         f"must be a multiple of {factor}; choose fewer levels (--num_filters of GTR, "
                         "--dim_mults of the others), or --crop")
    # The first level sees the image at full size.
    maps: list[Tensor] = []
    for block in blocks:
        maps.append(block(pool(maps[-1], 2) if maps else image))
    return maps
