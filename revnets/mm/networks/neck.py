"""RevSilo as a neck: bidirectional fusion whose memory does not grow with its depth."""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from ...layers import MBConv, norm_act
from ...reversible import ReversibleOp, RevSequential, RevSilo, recompute
from .norms import norm_factory
from .registry import register_network


@register_network()
class RevBiFPNNeck(BaseModule):
    r"""A stack of RevSilos (arXiv 2206.14098) between any backbone and any head, in place of an FPN.

    Each level is projected to ``out_channels``; then every silo fuses all levels downwards and upwards,

    .. math:: u_j = x_j + \sum_{i<j} D_{ij}(x_i), \qquad y_i = u_i + \sum_{j>i} U_{ji}(u_j)

    with MBConv branches. Only the last silo's outputs are kept for the backward pass, whatever ``num_silos`` is.

    Args:
        in_channels: of the backbone's maps, finest first; each has half the resolution of the one before.
        out_channels: of all outputs.
        num_silos: N, depth of the stack.
        num_outs: levels; those beyond the backbone's are made from the coarsest.
        start_level: first level of the backbone that is used.
        add_extra_convs: make further levels with strided 3x3 convolutions of the coarsest output (RetinaNet; what FPN
            calls ``"on_output"``, with its ``relu_before_extra_convs``), not by subsampling.
        exp_ratio: expansion of the MBConvs.
        se_ratio: of their squeeze-and-excite; 0 for none.
        drop_path_rate: stochastic depth of the branches.
        norm_cfg: norms, as everywhere in MMDetection.
        mode: ``"reversible"``, ``"checkpoint"`` or ``"store"``.
        exact: exact mode, see ``RevSequential``.
        init_cfg: only None: convolutions start with Kaiming's initialisation.

    Raises:
        ValueError: for numbers that do not fit together, or maps whose sizes do not halve.

    Example:
        >>> neck = RevBiFPNNeck([8, 16, 32], out_channels=16, num_silos=2, num_outs=4)
        >>> maps = [torch.ones(1, 8 * 2**k, 32 // 2**k, 32 // 2**k) for k in range(3)]
        >>> [tuple(y.shape) for y in neck(maps)]
        [(1, 16, 32, 32), (1, 16, 16, 16), (1, 16, 8, 8), (1, 16, 4, 4)]
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        num_silos: int = 3,
        num_outs: int = 5,
        start_level: int = 0,
        add_extra_convs: bool | str = False,
        exp_ratio: float = 1.0,
        se_ratio: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_cfg: Mapping[str, Any] | None = None,
        mode: str = "reversible",
        exact: bool | int = True,
        init_cfg: None = None,
    ) -> None:
        super().__init__(init_cfg)
        used = list(in_channels)[start_level:]
        _check(used, num_silos, num_outs, add_extra_convs, in_channels)
        if init_cfg is not None:
            raise ValueError(f"init_cfg={init_cfg}: RevBiFPNNeck initialises itself, expected None")
        self.in_channels, self.out_channels = list(in_channels), out_channels
        self.start_level, self.num_levels = start_level, len(used)
        norm_layer = norm_factory(norm_cfg or {"type": "BN"})
        block = partial(
            MBConv, exp_ratio=exp_ratio, se_ratio=se_ratio, drop_path_rate=drop_path_rate, norm_layer=norm_layer
        )
        self.mode = mode
        self.laterals = nn.ModuleList(_Lateral(chs, out_channels, norm_layer) for chs in used)
        silos = [_silo(len(used), out_channels, block) for _ in range(num_silos)]
        self.silos = RevSequential(silos, mode=mode, exact=exact)
        extra = range(num_outs - len(used))
        self.extra = nn.ModuleList(
            nn.Conv2d(out_channels, out_channels, 3, 2, 1) if add_extra_convs else nn.MaxPool2d(1, 2) for _ in extra
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Kaiming normal convolutions (fan-out)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.is_init = True

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Args: inputs: the backbone's maps ``(N, C_k, H / 2^k, W / 2^k)``. Returns: ``num_outs`` maps."""
        inputs = inputs[self.start_level :]
        sizes = [tuple(x.shape[-2:]) for x in inputs]
        if len(sizes) != self.num_levels or any((2 * h, 2 * w) != finer for finer, (h, w) in itertools.pairwise(sizes)):
            raise ValueError(
                f"RevBiFPNNeck got maps of sizes {sizes}: expected {self.num_levels}, each half of the one before; "
                "pad images to a multiple of the coarsest stride (DetDataPreprocessor's pad_size_divisor)"
            )
        train = self.training and self.mode != "store"
        xs = [recompute(m, x) if train else m(x) for m, x in zip(self.laterals, inputs, strict=True)]
        outs = list(self.silos(*xs))
        for module in self.extra:
            outs.append(module(F.relu(outs[-1]) if len(outs) > self.num_levels and _learns(module) else outs[-1]))
        return tuple(outs)


class _Lateral(nn.Module):
    """1x1 convolution and norm: a map of the backbone becomes a stream."""

    def __init__(self, in_chs: int, out_chs: int, norm_layer: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chs, out_chs, 1, bias=False)
        self.norm = norm_layer(out_chs)

    def forward(self, x: Tensor) -> Tensor:
        # autocast must not make the stream half precision
        return norm_act(self.conv(x), self.norm).to(self.conv.weight.dtype)


def _silo(levels: int, channels: int, block: partial[MBConv]) -> ReversibleOp:
    down = {
        (i, j): block(channels, channels, kernel_size=2 ** (j - i + 1) - 1, stride=2 ** (j - i))
        for j in range(1, levels)
        for i in range(j)
    }
    up = {
        (j, i): nn.Sequential(
            block(channels, channels, kernel_size=3), nn.Upsample(scale_factor=2 ** (j - i), mode="bilinear")
        )
        for i in range(levels - 1)
        for j in range(i + 1, levels)
    }
    return RevSilo(down, up, levels)


def _learns(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d)


def _check(
    used: list[int], num_silos: int, num_outs: int, add_extra_convs: bool | str, in_channels: Sequence[int]
) -> None:
    if len(used) < 2:
        raise ValueError(f"in_channels={list(in_channels)} leave {len(used)} levels: fusion needs at least 2")
    if num_silos < 1:
        raise ValueError(f"num_silos={num_silos}: expected at least 1")
    if num_outs < len(used):
        raise ValueError(f"num_outs={num_outs}: expected at least the {len(used)} levels that come in")
    if add_extra_convs not in (False, True, "on_output"):
        raise ValueError(f"add_extra_convs={add_extra_convs!r}: expected False, or 'on_output' for convolutions")
