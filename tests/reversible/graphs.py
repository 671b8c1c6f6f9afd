"""Random reversible graphs: depth, number of scales, kinds of branches."""

from collections.abc import Callable
from itertools import pairwise

import torch
from hypothesis import strategies as st
from timm.layers import DropPath
from torch import Tensor, nn

from revnets.layers import MBConv
from revnets.reversible import AdditiveCoupling, Parallel, ReversibleOp, RevSequential, RevSilo, SpaceToDepth

CHANNELS = (4, 6, 8)
Branch = Callable[[int, int, int], nn.Module]


def _conv(c_in: int, c_out: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1), nn.Tanh())


def _batch_norm(c_in: int, c_out: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())


def _dropout(c_in: int, c_out: int, stride: int) -> nn.Module:
    return nn.Sequential(_batch_norm(c_in, c_out, stride), nn.Dropout(0.3), nn.Conv2d(c_out, c_out, 1))


def _drop_path(c_in: int, c_out: int, stride: int) -> nn.Module:
    return nn.Sequential(_batch_norm(c_in, c_out, stride), DropPath(0.4))


def _mbconv(c_in: int, c_out: int, stride: int) -> nn.Module:
    return MBConv(c_in, c_out, 3, stride, exp_ratio=2, se_ratio=0.5, drop_path_rate=0.3)


def _mbconv_plain(c_in: int, c_out: int, stride: int) -> nn.Module:
    return MBConv(c_in, c_out, 5, stride, exp_ratio=1, se_ratio=0.0)


BRANCHES: dict[str, Branch] = {
    f.__name__.strip("_"): f for f in (_conv, _batch_norm, _dropout, _drop_path, _mbconv, _mbconv_plain)
}


def build(stages: list[int], kinds: list[str], exact: bool | int = False, seed: int = 0) -> RevSequential:
    """A chain on 3-channel images: per entry n of ``stages`` a coupling per scale, then a silo from n scales.

    ``kinds`` are used in turn for the branches.
    """
    torch.manual_seed(seed)
    count = iter(range(10_000))

    def branch(c_in: int, c_out: int, stride: int = 1) -> nn.Module:
        return BRANCHES[kinds[next(count) % len(kinds)]](c_in, c_out, stride)

    ops: list[ReversibleOp] = [SpaceToDepth(3, 1, CHANNELS[0])]
    for inputs, outputs in pairwise(stages):
        ops.append(
            Parallel([AdditiveCoupling(branch(c // 2, c // 2), branch(c // 2, c // 2)) for c in CHANNELS[:inputs]])
        )
        down = {
            (i, j): branch(CHANNELS[i], CHANNELS[j], 2 ** (j - i))
            for j in range(1, outputs)
            for i in range(min(j, inputs))
        }
        up = {
            (j, i): nn.Sequential(branch(CHANNELS[j], CHANNELS[i]), nn.Upsample(scale_factor=2 ** (j - i)))
            for i in range(outputs)
            for j in range(i + 1, outputs)
        }
        if outputs > 1:
            ops.append(RevSilo(down, up, inputs))
    return RevSequential(ops, exact=exact)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[int], list[str], int]:
    """(stages, kinds, seed) for ``build``: scales grow by at most one per stage."""
    stages = [1]
    for _ in range(draw(st.integers(1, 4))):
        stages.append(min(len(CHANNELS), stages[-1] + draw(st.integers(0, 1))))
    kinds = draw(st.lists(st.sampled_from(sorted(BRANCHES)), min_size=1, max_size=4))
    return stages, kinds, draw(st.integers(0, 2**16))


def cubic(ys: tuple[Tensor, ...]) -> Tensor:
    """A loss in which every output matters, with gradients that depend on it."""
    return sum((y.to(torch.promote_types(y.dtype, torch.float32)) ** 3).mean() for y in ys)  # type: ignore[return-value]
