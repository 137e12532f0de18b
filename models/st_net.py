"""ST-Net, the velocity field v(x_t, t, image): a time-conditioned U-Net with linear attention (App. 6)."""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from metadata_manager import FlowConfig
from models.norm import Norm

# Of both kinds of attention, as in the released code.
HEADS, HEAD_WIDTH = 4, 32
Block = Callable[[int, int], nn.Module]  # (in_channels, out_channels) -> a residual block


def standardize(weight: Tensor, method: str) -> Tensor:
    """Weight (out, in, 3, 3) with zero mean per output filter, and scaled by method.

    standard: divided by the standard deviation (arXiv 1903.10520, Eq. 2). released: multiplied by it, as in
    the authors' code. none: the weight as it is.
    """
    if method == "none":
        return weight
    variance, mean = torch.var_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
    # 1e-5 keeps the scale finite for a filter of equal weights.
    scale = (variance + 1e-5).rsqrt()
    return (weight - mean) * scale if method == "standard" else (weight - mean) / scale


class StandardizedConv2d(nn.Conv2d):
    """3x3 convolution whose weight is standardized at every call."""

    def __init__(self, in_channels: int, out_channels: int, method: str) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        self.method = method

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, standardize(self.weight, self.method), self.bias)


class Recomputable(nn.Module):
    """A module that, where `recompute` is set, keeps only its inputs and runs again in the backward pass."""

    recompute = False

    def __call__(self, *inputs: Tensor) -> Tensor:
        # Without a gradient nothing is kept, so there is nothing to save.
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(super().__call__, *inputs, use_reentrant=False)
        return super().__call__(*inputs)


class ResidualBlock(Recomputable):
    """Twice a standardized 3x3 convolution, GroupNorm and SiLU, plus a 1x1 shortcut.

    method: see `standardize`. Called with the time and x, on the way up also with the skip. x and the skip
    are joined here, so that with recomputing the joined copy need not be kept.
    """

    def __init__(self, in_channels: int, out_channels: int, *, time_channels: int, method: str) -> None:
        super().__init__()
        self.time = nn.Linear(time_channels, 2 * out_channels)
        self.conv1 = StandardizedConv2d(in_channels, out_channels, method)
        self.norm1 = Norm(out_channels)
        self.conv2 = StandardizedConv2d(out_channels, out_channels, method)
        self.norm2 = Norm(out_channels)
        self.shortcut = (nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels
                         else nn.Identity())

    def forward(self, time: Tensor, *joined: Tensor) -> Tensor:
        x = torch.cat(joined, dim=1) if len(joined) > 1 else joined[0]
        scale, shift = self.time(F.silu(time)).chunk(2, dim=1)  # (b, out_channels)
        # Time scales and shifts the channels once per block, after the first norm.
        y = F.silu(self.norm1(self.conv1(x), scale, shift))
        y = F.silu(self.norm2(self.conv2(y)))
        return y + self.shortcut(x)


class LinearAttention(Recomputable):
    """x + attention(norm(x)) at a cost linear in the pixels: softmax of q over features, of k over pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * HEADS * HEAD_WIDTH, 1, bias=False)
        self.to_out = nn.Conv2d(HEADS * HEAD_WIDTH, channels, 1)
        self.out_norm = Norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = _heads(self.to_qkv(self.norm(x)))  # each (b, heads, width, h * w)
        # k and v first: this makes a width x width matrix per head in place of an h w x h w one.
        context = k.softmax(dim=-1) @ v.transpose(-1, -2)  # (b, heads, width, width)
        out = context.transpose(-1, -2) @ (q.softmax(dim=-2) * HEAD_WIDTH**-0.5)
        return x + self.out_norm(self.to_out(out.reshape(len(x), -1, *x.shape[2:])))


class Attention(Recomputable):
    """x + softmax attention between all pixels of norm(x), for the small map in the middle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * HEADS * HEAD_WIDTH, 1, bias=False)
        self.to_out = nn.Conv2d(HEADS * HEAD_WIDTH, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # Fused kernels ask for contiguous inputs. Without such a kernel the h w x h w products are kept for
        # the gradient.
        q, k, v = (part.transpose(-1, -2).contiguous() for part in _heads(self.to_qkv(self.norm(x))))
        out = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)  # (b, heads, width, h * w)
        return x + self.to_out(out.reshape(len(x), -1, *x.shape[2:]))


def _heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(b, 3 * heads * width, h, w) -> q, k, v of (b, heads, width, h * w)."""
    q, k, v = qkv.unflatten(1, (3, HEADS, HEAD_WIDTH)).flatten(4).unbind(1)
    return q, k, v


class Resample(nn.Module):
    """A change of the map's size (none at the last level), then a convolution."""

    def __init__(self, change: Callable[[Tensor], Tensor], conv: nn.Conv2d) -> None:
        super().__init__()
        self.change, self.conv = change, conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.change(x))


def downsample(in_channels: int, out_channels: int, last: bool) -> Resample:
    """Halves each side: 2x2 space-to-depth, 1x1 convolution. The last level keeps its size: a 3x3 one."""
    if last:
        return Resample(nn.Identity(), nn.Conv2d(in_channels, out_channels, 3, padding=1))
    # Pixels go into channels, so that nothing is lost before the convolution chooses what to keep.
    return Resample(nn.PixelUnshuffle(2), nn.Conv2d(4 * in_channels, out_channels, 1))


def upsample(in_channels: int, out_channels: int, last: bool) -> Resample:
    """Doubles each side (nearest) unless it is the last level, then a 3x3 convolution."""
    change = nn.Identity() if last else nn.Upsample(scale_factor=2)
    return Resample(change, nn.Conv2d(in_channels, out_channels, 3, padding=1))


class Down(nn.Module):
    """A level of the way down: two residual blocks, each leaving a skip, linear attention, downsampling."""

    def __init__(self, in_channels: int, out_channels: int, block: Block, last: bool) -> None:
        super().__init__()
        self.block1 = block(in_channels, in_channels)
        self.block2 = block(in_channels, in_channels)
        self.attention = LinearAttention(in_channels)
        self.resample = downsample(in_channels, out_channels, last)

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        skip1 = self.block1(time, x)
        skip2 = self.attention(self.block2(time, skip1))
        return self.resample(skip2), skip1, skip2


class Middle(nn.Module):
    """Residual block, full attention, residual block, on the smallest map."""

    def __init__(self, channels: int, block: Block) -> None:
        super().__init__()
        self.block1 = block(channels, channels)
        self.attention = Attention(channels)
        self.block2 = block(channels, channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.block2(time, self.attention(self.block1(time, x)))


class Up(nn.Module):
    """A level of the way up: two residual blocks, each with a skip, linear attention, upsampling."""

    def __init__(self, in_channels: int, out_channels: int, block: Block, last: bool) -> None:
        super().__init__()
        # out_channels are those of the skips, which come from the same level of the way down.
        self.block1 = block(in_channels + out_channels, in_channels)
        self.block2 = block(in_channels + out_channels, in_channels)
        self.attention = LinearAttention(in_channels)
        self.resample = upsample(in_channels, out_channels, last)

    def forward(self, x: Tensor, time: Tensor, skip1: Tensor, skip2: Tensor) -> Tensor:
        # The skips come in the reverse of the order in which the way down left them.
        x = self.block1(time, x, skip2)
        x = self.attention(self.block2(time, x, skip1))
        return self.resample(x)


class STNet(nn.Module):
    """v = net(x_t, t, image): one velocity map per state (App. 6); 38,547,585 parameters at dim 128.

    dim: width of the first level; dim_mults: its multiple per level.
    weight_standardization: see `standardize`.
    time_scale: t in [0, 1] is multiplied by it before the sinusoidal embedding, whose base 10000 is meant for
    steps counted to 1000. The released code leaves t as it is.
    recompute: gradient checkpointing: training keeps only the inputs of residual blocks and attentions.
    image_channels: of all that the velocity is conditioned on, which is the image in ATFM; may be 0.
    """

    def __init__(self, dim: int = 128, dim_mults: Sequence[int] = (1, 2, 4),
                 weight_standardization: str = "standard", time_scale: float = 1000.0,
                 recompute: bool = False, image_channels: int = 1) -> None:
        super().__init__()
        if weight_standardization not in ("standard", "released", "none"):
            raise ValueError(f"weight_standardization={weight_standardization!r}: expected standard, "
                             "released or none")
        # The embedding of time has dim / 2 frequencies and divides by dim / 2 - 1.
        if dim < 4 or dim % 2:
            raise ValueError(f"dim={dim}: expected an even number of at least 4")
        self.dim, self.time_scale, self.image_channels = dim, time_scale, image_channels
        time_channels = 4 * dim
        block = partial(ResidualBlock, time_channels=time_channels, method=weight_standardization)
        levels = list(pairwise([dim, *(dim * mult for mult in dim_mults)]))  # (channels in, channels out)
        deepest = len(levels) - 1

        # Image and state enter together, as channels of one map.
        self.stem = nn.Conv2d(image_channels + 1, dim, 1)
        self.time_mlp = nn.Sequential(nn.Linear(dim, time_channels), nn.GELU(),
                                      nn.Linear(time_channels, time_channels))
        self.downs = nn.ModuleList(Down(above, below, block, last=i == deepest)
                                   for i, (above, below) in enumerate(levels))
        self.middle = Middle(levels[-1][1], block)
        # Levels are reversed here, so that `last` is the finest one, which has reached the full size.
        self.ups = nn.ModuleList(Up(below, above, block, last=i == deepest)
                                 for i, (above, below) in enumerate(reversed(levels)))
        # It also takes the stem's output, a skip around all levels.
        self.final_block = block(2 * dim, dim)
        self.final_conv = nn.Conv2d(dim, 1, 1)
        for module in self.modules():
            if isinstance(module, Recomputable):
                module.recompute = recompute

    @classmethod
    def of(cls, config: FlowConfig, image_channels: int = 1) -> "STNet":
        """An untrained ST-Net as a config describes it."""
        return cls(config.dim, config.dim_mults, config.weight_standardization, config.time_scale,
                   config.recompute, image_channels)

    def forward(self, x_t: Tensor, t: Tensor, image: Tensor) -> Tensor:
        """x_t (b, 1, h, w), t (b,) in [0, 1], image (b, image_channels, h, w) -> v (b, 1, h, w).

        Raises ValueError for other shapes, or if h or w is no multiple of 2 ** (levels - 1).
        """
        # All levels but the last halve the sides, and the way up has to come back to the same size.
        factor = 2 ** (len(self.downs) - 1)
        b, _, h, w = x_t.shape if x_t.ndim == 4 else (0, 0, 0, 0)
        fits = (x_t.shape == (b, 1, h, w) and t.shape == (b,)
                and image.shape == (b, self.image_channels, h, w))
        if not fits or h % factor or w % factor:
            raise ValueError(f"x_t {tuple(x_t.shape)}, t {tuple(t.shape)}, image {tuple(image.shape)}: "
                             f"expected (b, 1, h, w), (b,), (b, {self.image_channels}, h, w) with h "
                             f"and w multiples of {factor}; see --dim_mults and --crop")
        time = self.time_mlp(time_embedding(t * self.time_scale, self.dim))  # (b, 4 dim)
        stem = self.stem(torch.cat([image, x_t], dim=1))  # (b, dim, h, w)
        x, skips = stem, []
        # Each level leaves two skips for its counterpart on the way up, which starts with the last level's.
        for down in self.downs:
            x, *level_skips = down(x, time)
            skips.append(level_skips)
        x = self.middle(x, time)  # (b, dim * dim_mults[-1], h / factor, w / factor)
        for up in self.ups:
            x = up(x, time, *skips.pop())
        return self.final_conv(self.final_block(time, x, stem))

    @torch.no_grad()
    def with_fixed_weights(self) -> "STNet":
        """A copy for sampling, whose weights are standardized once instead of at every call."""
        net = copy.deepcopy(self).requires_grad_(False)
        for module in net.modules():
            if isinstance(module, StandardizedConv2d):
                module.weight.copy_(standardize(module.weight, module.method))
                # Else the next call would standardize it again.
                module.method = "none"
        return net


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding with base 10000: (b,) -> (b, dim)."""
    # From 1 down to 1/10000 in equal ratios (arXiv 1706.03762, Sec. 3.5).
    frequencies = torch.exp(torch.arange(dim // 2, device=t.device) * (-math.log(10000) / (dim // 2 - 1)))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


# Networks of the flow: (settings, channels of the condition) -> a module that is called as STNet is, with the
# attribute `image_channels` and the method `with_fixed_weights`. A network that is added is one entry here.
NETWORKS: dict[str, Callable[[FlowConfig, int], nn.Module]] = {"st-net": STNet.of}


def network(config: FlowConfig, image_channels: int) -> nn.Module:
    """An untrained network of the flow; raises ValueError, naming the flag, if it is not in NETWORKS."""
    if config.network not in NETWORKS:
        raise ValueError(f"--network {config.network}: unknown; expected one of {', '.join(NETWORKS)}")
    return NETWORKS[config.network](config, image_channels)
