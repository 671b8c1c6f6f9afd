"""MBConv: the inverted bottleneck of MobileNetV2 and EfficientNet, as RevBiFPN uses it."""

from collections.abc import Callable
from typing import Any

from timm.layers import DropPath, SEModule
from torch import Tensor, nn

from ..geometry import placed
from .conv import conv
from .norm_act import norm_act
from .norm_act_conv import norm_act_conv


class MBConv(nn.Module):
    """Mobile inverted bottleneck without an identity skip (in a reversible network the coupling is the skip).

    1x1 expansion, depthwise convolution, squeeze-and-excite, 1x1 projection, each convolution followed by batch norm
    (and activation, but for the last), then stochastic depth per sample. Names are timm's.

    Args:
        in_chs: input channels.
        out_chs: output channels.
        kernel_size: of the depthwise convolution; padding is ``(kernel_size - 1) // 2`` times ``dilation``.
        stride: of the depthwise convolution.
        dilation: of the depthwise convolution.
        exp_ratio: expansion; 1 leaves the expansion out.
        se_ratio: hidden channels of squeeze-and-excite relative to ``in_chs``; 0 leaves it out.
        drop_path_rate: probability of dropping the result of a sample.
        act_layer: activation.
        norm_layer: normalisation, given the channels, and device and dtype where they are given here.
        device: of parameters and buffers.
        dtype: likewise.

    Example:
        >>> import torch
        >>> MBConv(16, 24, kernel_size=3, stride=2, exp_ratio=2, se_ratio=0.25)(torch.ones(1, 16, 8, 8)).shape
        torch.Size([1, 24, 4, 4])
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int = 3,
        stride: int = 1,
        exp_ratio: float = 1.0,
        se_ratio: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: type[nn.Module] = nn.Hardswish,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        dilation: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = placed(device, dtype)
        mid_chs = int(in_chs * exp_ratio)
        self.conv_pw: nn.Module | None = None
        self.bn1: nn.Module | None = None
        if exp_ratio != 1:
            self.conv_pw = nn.Conv2d(in_chs, mid_chs, 1, bias=False, **dd)
            self.bn1 = norm_layer(mid_chs, **dd)
            self.act1 = act_layer()
        padding = (kernel_size - 1) // 2 * dilation
        self.conv_dw = nn.Conv2d(
            mid_chs, mid_chs, kernel_size, stride, padding, dilation, groups=mid_chs, bias=False, **dd
        )
        self.bn2 = norm_layer(mid_chs, **dd)
        self.act2 = act_layer()
        self.se: SEModule | None = None
        if se_ratio > 0:
            self.se = SEModule(
                mid_chs,
                rd_channels=max(1, int(in_chs * se_ratio)),
                act_layer=act_layer,
                gate_layer=nn.Hardsigmoid,
                **dd,
            )
        self.conv_pwl = nn.Conv2d(mid_chs, out_chs, 1, bias=False, **dd)
        self.bn3 = norm_layer(out_chs, **dd)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: ``(N, in_chs, H, W)``. Returns: ``(N, out_chs, H / stride, W / stride)``."""
        if self.conv_pw is not None and self.bn1 is not None:
            x = norm_act_conv(conv(x, self.conv_pw), self.bn1, self.act1, None, self.conv_dw)
        else:
            x = conv(x, self.conv_dw)
        x = norm_act_conv(x, self.bn2, self.act2, self.se, self.conv_pwl)
        return self.drop_path(norm_act(x, self.bn3))
