"""The parts of RevBiFPN: stem, stages of the reversible body, neck, head."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import MBConv, norm_act
from ..layers.geometry import placed
from ..reversible import (
    AdditiveCoupling,
    Parallel,
    ReversibleOp,
    RevSilo,
    SpaceToDepth,
    recompute,
)

NUM_SCALES = 4
BLOCKS_PER_STAGE = 2

# Per scale, fine to coarse, at width 1 (as in the published network).
BODY_CHANNELS = (48, 64, 80, 160)
NECK_CHANNELS = (48, 64, 128, 320)
FC_FEATURES = 1280
_EXP_RATIO = (1, 1, 2, 2)
_SE_RATIO = (0.25, 0.25, 0.125, 0.0)
_BASE_KERNEL = (3, 5, 5, 3)
_EXTRA_KERNEL = (0, 0, 0, 2)
_NECK_EXP_RATIO = (1, 2, 2, 2)
_NECK_SE_RATIO = (0.25, 0.25, 0.125, 0.125)
_NECK_KERNEL = 5


def scaled(base: int, width: float) -> int:
    """Channels at width multiplier ``width``: rounded down to a multiple of 16."""
    return int(width * base) // 16 * 16


@dataclass(frozen=True)
class Strides:
    """Reductions of the scales: doubled from one to the next, up to ``output_stride``; from there on they dilate.

    Args:
        stem: of the finest scale.
        output: the largest reduction, 32, 16 or 8.

    Raises:
        ValueError: for another one.

    Example:
        >>> [Strides(4, 16).of(k) for k in range(4)], [Strides(4, 16).dilation(k) for k in range(4)]
        ([4, 8, 16, 16], [1, 1, 1, 2])
    """

    stem: int = 4
    output: int = 32

    def __post_init__(self) -> None:
        if self.stem not in (1, 2, 4):
            raise ValueError(f"stem_stride={self.stem}: expected 4 (as published), or 2 or 1 for small images")
        if self.output not in (8, 16, 32):
            raise ValueError(f"output_stride={self.output}: expected 32 (as published), or 16 or 8, which dilate")

    def of(self, scale: int) -> int:
        """Side of the image's square that a pixel of a scale stands for."""
        return min(self.stem * 2**scale, self.output)

    def dilation(self, scale: int) -> int:
        """Of the convolutions that read a scale, so that they see what they would see without ``output``."""
        return self.stem * 2**scale // self.of(scale)

    def step(self, fine: int, coarse: int) -> int:
        """Stride from one scale to another."""
        return self.of(coarse) // self.of(fine)


class Neck(nn.Module):
    """One MBConv per scale from the body's channels to the neck's; recomputed in the backward pass unless stored."""

    def __init__(
        self, in_chs: Sequence[int], out_chs: Sequence[int], mode: str, strides: Strides, **block_args: Any
    ) -> None:
        super().__init__()
        self.mode = mode
        self.blocks = nn.ModuleList(
            MBConv(
                in_chs[k],
                out_chs[k],
                kernel_size=_NECK_KERNEL,
                exp_ratio=_NECK_EXP_RATIO[k],
                se_ratio=_NECK_SE_RATIO[k],
                dilation=strides.dilation(k),
                **block_args,
            )
            for k in range(len(in_chs))
        )

    def forward(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """Args: xs: one map per scale. Returns: one map per scale, channels changed."""
        return [run_end(self, block, x) for block, x in zip(self.blocks, xs, strict=True)]


class Head(nn.Module):
    """Merges the pyramid from fine to coarse and widens it: the part of the classifier before pooling.

    ``o_0 = n_0; o_{k+1} = n_{k+1} + H_k(o_k)``, then a 1x1 convolution to ``out_chs``.
    """

    def __init__(self, in_chs: Sequence[int], out_chs: int, mode: str, strides: Strides, **block_args: Any) -> None:
        super().__init__()
        self.mode = mode
        self.blocks = nn.ModuleList(
            MBConv(
                in_chs[k],
                in_chs[k + 1],
                kernel_size=_NECK_KERNEL,
                stride=strides.step(k, k + 1),
                exp_ratio=_NECK_EXP_RATIO[k],
                se_ratio=_NECK_SE_RATIO[k],
                dilation=strides.dilation(k),
                **block_args,
            )
            for k in range(len(in_chs) - 1)
        )
        dd = placed(block_args.get("device"), block_args.get("dtype"))
        self.conv = nn.Conv2d(in_chs[-1], out_chs, 1, bias=False, **dd)
        self.bn = block_args["norm_layer"](out_chs, **dd)
        self.act = block_args["act_layer"]()

    def forward(self, xs: Sequence[Tensor]) -> Tensor:
        """Args: xs: the neck's maps. Returns: ``(N, out_chs, H, W)`` at the coarsest scale."""
        merged = xs[0]
        for block, x in zip(self.blocks, xs[1:], strict=True):
            merged = x + run_end(self, block, merged)
        return run_end(self, self._widen, merged)

    def _widen(self, x: Tensor) -> Tensor:
        return norm_act(self.conv(x), self.bn, self.act)


class Coarsest(nn.Module):
    """In the place of a head that was pruned: the coarsest of the neck's maps that were kept."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, xs: Sequence[Tensor]) -> Tensor:
        """Args: xs: the neck's maps. Returns: one of them."""
        return xs[self.scale]


def run_end(end: "Neck | Head", part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Run a part of an end, which is not reversible: recomputed in training's backward pass unless all is stored."""
    return recompute(part, x) if end.training and end.mode != "store" else part(x)


def handed_out(y: Tensor, network: nn.Module) -> Tensor:
    """A map as whoever asked for it expects it: contiguous, unless the weights are channels-last.

    Inside, training may have it channels-last in any case; see ``SpaceToDepth``.
    """
    if not network.training or y.is_contiguous():
        return y
    weight = next((p for p in network.parameters() if p.dim() == 4), None)
    return y if weight is not None and _is_channels_last(weight) else _Contiguous.apply(y)


def _is_channels_last(weight: Tensor) -> bool:
    """By its strides, those of sides of length 1 included: by them convolutions know the layout that is wanted."""
    return weight.stride(1) == 1 and weight.stride(3) == weight.shape[1]


class _Contiguous(torch.autograd.Function):
    """A contiguous copy; its gradient goes back in the layout of the original."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.channels_last = x.is_contiguous(memory_format=torch.channels_last)
        return x.contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous(memory_format=torch.channels_last) if ctx.channels_last else grad


def make_stem(in_chans: int, out_chans: int, stride: int, **dd: Any) -> tuple[nn.Module | None, SpaceToDepth | None]:
    """The reversible stem, or a strided convolution where the image has more channels than fit."""
    repeated = out_chans // stride**2
    if in_chans <= repeated and repeated * stride**2 == out_chans:
        return None, SpaceToDepth(in_chans, stride, repeated, channels_last=True)
    return nn.Conv2d(in_chans, out_chans, stride, stride, **dd), None


def make_stage(
    channels: Sequence[int],
    num_inputs: int,
    num_outputs: int,
    drop_path: float,
    strides: Strides,
    block_args: dict[str, Any],
) -> list[ReversibleOp]:
    """Rounds of per-scale reversible blocks, then one RevSilo."""
    ops: list[ReversibleOp] = []
    for _ in range(BLOCKS_PER_STAGE):
        couplings: list[ReversibleOp] = []
        for k in range(num_inputs):
            second = channels[k] // 2
            first = channels[k] - second
            block: Callable[[int, int], MBConv] = partial(
                MBConv,
                kernel_size=_BASE_KERNEL[k] + _EXTRA_KERNEL[k],
                exp_ratio=_EXP_RATIO[k],
                se_ratio=_SE_RATIO[k],
                drop_path_rate=drop_path,
                dilation=strides.dilation(k),
                **block_args,
            )
            couplings.append(AdditiveCoupling(block(first, second), block(second, first)))
        ops.append(Parallel(couplings))
    down = {
        (i, j): MBConv(
            channels[i],
            channels[j],
            kernel_size=2 * 2 ** (j - i) - 1 + _EXTRA_KERNEL[i],
            stride=strides.step(i, j),
            dilation=strides.dilation(i),
            exp_ratio=_EXP_RATIO[i],
            se_ratio=_SE_RATIO[i],
            drop_path_rate=0.0 if j == num_inputs else drop_path,  # no stochastic depth into a new scale
            **block_args,
        )
        for j in range(1, num_outputs)
        for i in range(min(j, num_inputs))
    }
    up = {
        (j, i): nn.Sequential(
            MBConv(
                channels[j],
                channels[i],
                kernel_size=3 + _EXTRA_KERNEL[j],
                exp_ratio=_EXP_RATIO[i],
                se_ratio=_SE_RATIO[i],
                drop_path_rate=drop_path,
                dilation=strides.dilation(j),
                **block_args,
            ),
            _upsample(strides.step(i, j)),
        )
        for i in range(num_outputs - 1)
        for j in range(i + 1, num_outputs)
    }
    ops.append(RevSilo(down, up, num_inputs))
    return ops


def _upsample(factor: int) -> nn.Module:
    return nn.Identity() if factor == 1 else nn.Upsample(scale_factor=factor, mode="bilinear", align_corners=False)


def check_input(x: Tensor, in_chans: int, divisor: int) -> None:
    """Refuse what is no image for the network.

    Raises:
        ValueError: for a size or a number of channels that does not fit.
    """
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(
            f"input of shape {tuple(x.shape)}: expected (N, {in_chans}, H, W); create the model with in_chans=C "
            "for C channels"
        )
    height, width = x.shape[-2:]
    if height % divisor or width % divisor:
        fitting = [max(divisor, round(side / divisor) * divisor) for side in (height, width)]
        raise ValueError(
            f"input size {height}x{width}: height and width must be divisible by {divisor}; "
            f"resize or pad to, say, {fitting[0]}x{fitting[1]}"
        )
