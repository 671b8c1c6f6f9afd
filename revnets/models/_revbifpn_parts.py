"""The parts of RevBiFPN: stem, stages of the reversible body, neck, head."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

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


class Neck(nn.Module):
    """One MBConv per scale from the body's channels to the neck's; recomputed in the backward pass unless stored."""

    def __init__(self, in_chs: Sequence[int], out_chs: Sequence[int], mode: str, **block_args: Any) -> None:
        super().__init__()
        self.mode = mode
        self.blocks = nn.ModuleList(
            MBConv(
                in_chs[k],
                out_chs[k],
                kernel_size=_NECK_KERNEL,
                exp_ratio=_NECK_EXP_RATIO[k],
                se_ratio=_NECK_SE_RATIO[k],
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

    def __init__(self, in_chs: Sequence[int], out_chs: int, mode: str, **block_args: Any) -> None:
        super().__init__()
        self.mode = mode
        self.blocks = nn.ModuleList(
            MBConv(
                in_chs[k],
                in_chs[k + 1],
                kernel_size=_NECK_KERNEL,
                stride=2,
                exp_ratio=_NECK_EXP_RATIO[k],
                se_ratio=_NECK_SE_RATIO[k],
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


def run_end(end: "Neck | Head", part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Run a part of an end, which is not reversible: recomputed in training's backward pass unless all is stored."""
    return recompute(part, x) if end.training and end.mode != "store" else part(x)


def make_stem(in_chans: int, out_chans: int, stride: int, **dd: Any) -> tuple[nn.Module | None, SpaceToDepth | None]:
    """The reversible stem, or a strided convolution where the image has more channels than fit."""
    repeated = out_chans // stride**2
    if in_chans <= repeated and repeated * stride**2 == out_chans:
        return None, SpaceToDepth(in_chans, stride, repeated)
    return nn.Conv2d(in_chans, out_chans, stride, stride, **dd), None


def make_stage(
    channels: Sequence[int], num_inputs: int, num_outputs: int, drop_path: float, block_args: dict[str, Any]
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
                **block_args,
            )
            couplings.append(AdditiveCoupling(block(first, second), block(second, first)))
        ops.append(Parallel(couplings))
    down = {
        (i, j): MBConv(
            channels[i],
            channels[j],
            kernel_size=2 * 2 ** (j - i) - 1 + _EXTRA_KERNEL[i],
            stride=2 ** (j - i),
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
                **block_args,
            ),
            nn.Upsample(scale_factor=2 ** (j - i), mode="bilinear", align_corners=False),
        )
        for i in range(num_outputs - 1)
        for j in range(i + 1, num_outputs)
    }
    ops.append(RevSilo(down, up, num_inputs))
    return ops
