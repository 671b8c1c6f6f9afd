"""The stem of CIFAR's ResNets, for images of 32 pixels."""

from __future__ import annotations

from torch import nn


def small_stem(model: nn.Module, stride: int = 1) -> None:
    """Give a ResNet of timm's a first convolution of 3x3 and no pooling after it, in place.

    Args:
        model: with ``conv1`` and ``maxpool``.
        stride: of the convolution, which is newly initialised.

    Raises:
        ValueError: for another kind of network.

    Example:
        >>> import timm
        >>> net = timm.create_model("resnet18")
        >>> small_stem(net)
        >>> net.conv1, net.maxpool
        (Conv2d(3, 64, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False), Identity())
    """
    stem = getattr(model, "conv1", None)
    first = stem[0] if isinstance(stem, nn.Sequential) else stem
    if not isinstance(first, nn.Conv2d) or not isinstance(getattr(model, "maxpool", None), nn.Module):
        raise ValueError("no ResNet of timm's with conv1 and maxpool")
    conv = nn.Conv2d(first.in_channels, first.out_channels, 3, stride, 1, bias=first.bias is not None)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if isinstance(stem, nn.Sequential):
        stem[0] = conv
    else:
        model.conv1 = conv
    model.maxpool = nn.Identity()
