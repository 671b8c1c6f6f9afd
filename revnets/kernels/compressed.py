"""Compressed weights, and the operators of torch that use them: ``torch.ops.revnets.*``.

The operators make exported programs that hold zeros nowhere: ``torch.export.save`` writes them, ``torch.compile`` sees
through them. Where the kernel cannot be had, they compute the same on torch's dense kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .build import Geometry, kernel_problem, warn_of_dense_path
from .calls import ConvCall, check_geometry, check_residual, row_of_each
from .operands import readable

MAX_COLUMNS = 2**15  # of int16
MAX_POSITIONS = 2**31  # of int32 offsets into the padded input


def compress(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The non-zero weights of a layer, output channel after output channel.

    Args:
        weight: ``(C_out, ...)``.

    Returns:
        values (float32), columns (int16: where in the flattened row), rows (int32: ``C_out + 1`` offsets).

    Raises:
        ValueError: for rows of more than 32,768 weights.

    Example:
        >>> values, columns, rows = compress(torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 3.0]]))
        >>> values.tolist(), columns.tolist(), rows.tolist()
        ([2.0, 1.0, 3.0], [1, 0, 2], [0, 1, 1, 3])
    """
    matrix = weight.detach().reshape(weight.shape[0], -1).float()
    if matrix.shape[1] > MAX_COLUMNS:
        raise ValueError(f"a weight of shape {tuple(weight.shape)}: expected at most {MAX_COLUMNS} per output channel")
    kept = matrix != 0
    rows = torch.zeros(matrix.shape[0] + 1, dtype=torch.int32, device=matrix.device)
    rows[1:] = kept.sum(1).cumsum(0)
    return matrix[kept], kept.nonzero()[:, 1].to(torch.int16), rows


def decompress(values: Tensor, columns: Tensor, rows: Tensor, shape: Sequence[int]) -> Tensor:
    """The dense weight again.

    Example:
        >>> weight = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
        >>> torch.equal(decompress(*compress(weight), weight.shape), weight)
        True
    """
    dense = values.new_zeros(tuple(shape)).reshape(shape[0], -1)
    dense[row_of_each(rows, len(values)), columns.long()] = values
    return dense.reshape(tuple(shape))


def density(weight: Tensor) -> float:
    """The share of weights that are not 0.

    Example:
        >>> density(torch.tensor([0.0, 1.0, 2.0, 0.0]))
        0.5
    """
    return int(weight.count_nonzero()) / max(weight.numel(), 1)


def activate(x: Tensor, activation: str) -> Tensor:
    """One of ``ACTIVATIONS`` by torch."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda t: t, "silu": F.silu, "sigmoid": torch.sigmoid}
    functions |= {"relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid}
    return functions[activation](x)


SCHEMAS = torch.library.Library("revnets", "DEF")
SCHEMAS.define(
    "sparse_conv2d(Tensor x, Tensor values, Tensor columns, Tensor rows, Tensor? bias, Tensor? residual, "
    "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups, str activation) -> Tensor"
)
SCHEMAS.define(
    "depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[2] stride, int[2] padding, "
    "str activation) -> Tensor"
)
SCHEMAS.define("sparse_linear(Tensor x, Tensor values, Tensor columns, Tensor rows, Tensor? bias) -> Tensor")


def conv_geometry(
    x: Tensor,
    rows: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Geometry:
    """The geometry of an operator's arguments.

    Raises:
        ValueError: they are none of a convolution.
    """
    if x.dim() != 4:
        raise ValueError(f"input of shape {tuple(x.shape)}: expected (N, C, H, W)")
    channels = (int(x.shape[1]), _outputs(rows))
    geometry = Geometry(*channels, _pair(kernel_size), _pair(stride), _pair(padding), _pair(dilation), groups)
    check_geometry(geometry)
    return geometry


def _outputs(rows: Tensor) -> int:
    if rows.dim() != 1 or not len(rows):
        raise ValueError(f"rows of shape {tuple(rows.shape)}: expected one number per output channel, and one more")
    return int(rows.shape[0]) - 1


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return int(values[0]), int(values[-1])


def _sparse_conv2d(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> Tensor:
    geometry = conv_geometry(x, rows, kernel_size, stride, padding, dilation, groups)
    if kernel_problem() is None:
        return ConvCall(geometry, values, columns, rows, bias, activation, once=True)(x, residual)
    warn_of_dense_path()
    shape = (geometry.out_channels, geometry.in_channels // groups, *geometry.kernel_size)
    return _dense(x, decompress(values, columns, rows, shape), bias, residual, geometry, activation)


def _depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    activation: str,
) -> Tensor:
    geometry = depthwise_geometry(weight, stride, padding)
    if kernel_problem() is None:
        return ConvCall(geometry, weight, None, None, bias, activation)(x, residual)
    warn_of_dense_path()
    return _dense(x, weight, bias, residual, geometry, activation)


def depthwise_geometry(weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Geometry:
    """The geometry of a depthwise operator's arguments.

    Raises:
        ValueError: they are none.
    """
    if weight.dim() != 4 or weight.shape[1] != 1:
        raise ValueError(f"weight of shape {tuple(weight.shape)}: expected (C, 1, height, width)")
    channels, _, height, width = weight.shape
    geometry = Geometry(channels, channels, (height, width), _pair(stride), _pair(padding), groups=channels)
    check_geometry(geometry)
    return geometry


def _dense(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, geometry: Geometry, activation: str
) -> Tensor:
    y = F.conv2d(x, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    if residual is not None:
        check_residual(residual.shape, y.shape)
        y = y + residual
    return activate(y, activation).contiguous()


def _sparse_linear(x: Tensor, values: Tensor, columns: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    if not x.dim():
        raise ValueError("input of no dimension: expected (..., features)")
    features, outputs = x.shape[-1], _outputs(rows)
    if kernel_problem() is None:
        layer = ConvCall(Geometry(features, outputs), values, columns, rows, bias, once=True)
        number = math.prod(x.shape[:-1])
        flat = readable("input", x).reshape(number, features)
        if not number:
            return flat.new_empty(*x.shape[:-1], outputs)
        y = layer(flat.t().contiguous().reshape(1, features, number, 1))  # what it mixes are channels, the rest pixels
        return y.reshape(outputs, -1).t().contiguous().reshape(*x.shape[:-1], outputs)
    warn_of_dense_path()
    return F.linear(x, decompress(values, columns, rows, (outputs, features)), bias)


def check_devices(x: Tensor, *weights: Tensor | None, residual: Tensor | None = None) -> None:
    """One weight on meta is enough for torch to ask for a shape alone: numbers made up on the CPU would be believed."""
    for name, other in (*(("weights", each) for each in weights), ("residual", residual)):
        if other is not None and x.device.type != "meta" and other.device != x.device:
            raise ValueError(f"{name} on {other.device} for an input on {x.device}: expected one device")


def _fake_sparse_conv2d(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> Tensor:
    check_devices(x, values, columns, rows, bias, residual=residual)
    geometry = conv_geometry(x, rows, kernel_size, stride, padding, dilation, groups)
    return x.new_empty((x.shape[0], geometry.out_channels, *geometry.output_size(x.shape[2], x.shape[3])))


def _fake_depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    activation: str,
) -> Tensor:
    check_devices(x, weight, bias, residual=residual)
    geometry = depthwise_geometry(weight, stride, padding)
    return x.new_empty((x.shape[0], x.shape[1], *geometry.output_size(x.shape[2], x.shape[3])))


def _fake_sparse_linear(x: Tensor, values: Tensor, columns: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    check_devices(x, values, columns, rows, bias)
    return x.new_empty((*x.shape[:-1], _outputs(rows)))


SCHEMAS.impl("sparse_conv2d", _sparse_conv2d, "CPU")
SCHEMAS.impl("depthwise_conv2d", _depthwise_conv2d, "CPU")
SCHEMAS.impl("sparse_linear", _sparse_linear, "CPU")
torch.library.register_fake("revnets::sparse_conv2d", _fake_sparse_conv2d, lib=SCHEMAS)
torch.library.register_fake("revnets::depthwise_conv2d", _fake_depthwise_conv2d, lib=SCHEMAS)
torch.library.register_fake("revnets::sparse_linear", _fake_sparse_linear, lib=SCHEMAS)
