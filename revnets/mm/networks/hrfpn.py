"""HRFPN without the concatenation of all levels at the finest resolution."""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from mmdet.models.necks import HRFPN
from torch import Tensor, nn

from ...reversible import recompute
from .registry import register_network


@register_network()
class LeanHRFPN(HRFPN):
    r"""MMDetection's HRFPN (arXiv 1904.04514), the same function of the same weights, with less memory and work.

    HRFPN upsamples all levels to the finest, concatenates and projects them with a 1x1 convolution W. Upsampling acts
    within a channel and W within a pixel, so they commute:

    .. math:: W \, [x_0, \uparrow x_1, \uparrow x_2, \dots] + b = W_0 x_0 + b + \sum_k \uparrow (W_k x_k)

    The right side projects each level at its own resolution, and nothing of ``sum(in_channels)`` channels exists at
    the finest (396 MB at 800x1333 for RevBiFPN-S3, which concatenates 1472 channels).

    Example:
        >>> import torch
        >>> neck = LeanHRFPN([8, 16], 12, num_outs=3)
        >>> [tuple(y.shape) for y in neck([torch.ones(1, 8, 16, 16), torch.ones(1, 16, 8, 8)])]
        [(1, 12, 16, 16), (1, 12, 8, 8), (1, 12, 4, 4)]
    """

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Args: inputs: maps ``(N, C_k, H / 2^k, W / 2^k)``. Returns: ``num_outs`` maps of ``out_channels``."""
        conv = self.reduction_conv.conv
        if type(conv) is not nn.Conv2d:  # another `conv_cfg` need not be linear in its input
            return super().forward(inputs)
        run = recompute if self.with_cp and self.training else _call
        total = run(self._project, *inputs)
        levels = [total, *(self.pooling(total, kernel_size=2**k, stride=2**k) for k in range(1, self.num_outs))]
        return tuple(run(conv, level) for conv, level in zip(self.fpn_convs, levels, strict=True))

    def _project(self, *inputs: Tensor) -> Tensor:
        conv = self.reduction_conv.conv
        weights = conv.weight.split(self.in_channels, dim=1)
        total = F.conv2d(inputs[0], weights[0], conv.bias)
        for k, (x, weight) in enumerate(zip(inputs[1:], weights[1:], strict=True), start=1):
            total = total + F.interpolate(F.conv2d(x, weight), scale_factor=2**k, mode="bilinear")
        return total


def _call(module: Callable[..., Tensor], *xs: Tensor) -> Tensor:
    return module(*xs)
