"""Layers of bytes as operators of torch, ``torch.ops.revnets.int8_*``: exported programs hold them.

Each is a call of the kernel, or where that cannot be had the same numbers by ``byte_reference``. ``LAYERS`` says of
each how its arguments make a call, so that ``revnets.deploy`` can put many of them into one plan.

The numbers that a ``Finish`` has besides its scale are one list: zero_in, zero, low, high, residual_zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import byte_reference
from .build import Geometry, kernel_problem, warn_of_dense_path
from .byte_blocks import decompress_bytes, fours
from .byte_calls import (
    ByteConvCall,
    ByteDepthwiseCall,
    ByteLinearCall,
    ByteMapCall,
    ByteMaxPoolCall,
    ByteMeanCall,
    ByteScaleCall,
    Finish,
    FromBytesCall,
    ToBytesCall,
)
from .compressed import SCHEMAS, check_devices

Arguments = Mapping[str, Any]


class Layer(NamedTuple):
    """An operator.

    Attributes:
        operands: its arguments that layers before it compute; the others are constants.
        call: of its arguments but those.
        plain: its output, by torch.
        shape: of its output.
    """

    operands: tuple[str, ...]
    call: Callable[[Arguments], Any]
    plain: Callable[[Arguments], Tensor]
    shape: Callable[[Arguments], Sequence[Any]]


def _finish(a: Arguments) -> Finish:
    _, zero, low, high, residual_zero = a["numbers"]
    scale = a["scale"]
    if not isinstance(scale, Tensor):
        scale = torch.tensor([scale], dtype=torch.float32, device="cpu")
    more = (a.get("table"), a.get("residual_scale", 0.0), residual_zero, a.get("to_float", False))
    return Finish(scale, zero, low, high, *more)


def _geometry(a: Arguments) -> Geometry:
    outputs = a["scale"].shape[0] if "scale" in a else 1
    inputs = a.get("in_channels", outputs)
    groups = outputs if "weight" in a else 1
    size = a["weight"].shape[2:] if "weight" in a else a["kernel_size"]
    height, width = size
    stride, padding, dilation = (
        (int(p[0]), int(p[-1])) for p in (a["stride"], a["padding"], a.get("dilation", [1, 1]))
    )
    return Geometry(inputs, outputs, (int(height), int(width)), stride, padding, dilation, groups)


def _conv_call(a: Arguments) -> ByteConvCall:
    return ByteConvCall(_geometry(a), a["values"], a["columns"], a["rows"], a["bias"], a["numbers"][0], _finish(a))


def _conv_plain(a: Arguments) -> Tensor:
    g = _geometry(a)
    weight = decompress_bytes(a["values"], a["columns"], a["rows"], g.in_channels, g.kernel_size)
    weight = weight[: g.out_channels, : g.in_channels]
    return byte_reference.conv(a["x"], weight, a["bias"], g, a["numbers"][0], _finish(a), a["residual"])


def _conv_shape(a: Arguments) -> Sequence[Any]:
    g, x = _geometry(a), a["x"]
    size = g.output_size(x.shape[2], x.shape[3])
    if a.get("to_float"):
        return (x.shape[0], g.out_channels, *size)
    return (x.shape[0], fours(g.out_channels) // 4, *size, 4)


def _depthwise_plain(a: Arguments) -> Tensor:
    return byte_reference.conv(a["x"], a["weight"], a["bias"], _geometry(a), a["numbers"][0], _finish(a), a["residual"])


def _linear_shape(a: Arguments) -> Sequence[Any]:
    n, outputs = a["x"].shape[0], a["weight"].shape[0]
    return (n, outputs, 1, 1) if a["to_float"] else (n, fours(outputs) // 4, 1, 1, 4)


def _pool_shape(a: Arguments) -> Sequence[Any]:
    x = a["x"]
    return (*x.shape[:2], *_geometry(a).output_size(x.shape[2], x.shape[3]), 4)


_SIGNATURES = {
    "int8_conv2d": "Tensor x, Tensor values, Tensor columns, Tensor rows, Tensor? bias, Tensor scale, "
    "Tensor? residual, Tensor? table, int in_channels, int[2] kernel_size, int[2] stride, int[2] padding, "
    "int[2] dilation, int[] numbers, float residual_scale, bool to_float",
    "int8_depthwise_conv2d": "Tensor x, Tensor weight, Tensor? bias, Tensor scale, Tensor? residual, Tensor? table, "
    "int[2] stride, int[2] padding, int[2] dilation, int[] numbers, float residual_scale",
    "int8_linear": "Tensor x, Tensor weight, Tensor? bias, Tensor scale, Tensor? residual, Tensor? table, "
    "int[] numbers, float residual_scale, bool to_float",
    "int8_mean": "Tensor x, Tensor? table, float scale, int[] numbers",
    "int8_add": "Tensor x, Tensor? residual, Tensor? table, float scale, int[] numbers, float residual_scale",
    "int8_mul": "Tensor x, Tensor gates, Tensor? table, float scale, int[] numbers",
    "int8_max_pool2d": "Tensor x, int[2] kernel_size, int[2] stride, int[2] padding",
    "int8_quantize": "Tensor x, float scale, int zero",
    "int8_dequantize": "Tensor x, int channels, float scale, int zero",
}


def _same(a: Arguments) -> Sequence[Any]:
    return a["x"].shape


_BOTH = ("x", "residual")
_LAYERS = {
    "int8_conv2d": Layer(_BOTH, _conv_call, _conv_plain, _conv_shape),
    "int8_depthwise_conv2d": Layer(
        _BOTH,
        lambda a: ByteDepthwiseCall(_geometry(a), a["weight"], a["bias"], a["numbers"][0], _finish(a)),
        _depthwise_plain,
        _conv_shape,
    ),
    "int8_linear": Layer(
        _BOTH,
        lambda a: ByteLinearCall(a["weight"], a["bias"], a["numbers"][0], _finish(a)),
        lambda a: byte_reference.linear(a["x"], a["weight"], a["bias"], a["numbers"][0], _finish(a), a["residual"]),
        _linear_shape,
    ),
    "int8_mean": Layer(
        ("x",),
        lambda a: ByteMeanCall(a["numbers"][0], _finish(a)),
        lambda a: byte_reference.mean(a["x"], a["numbers"][0], _finish(a)),
        lambda a: (*a["x"].shape[:2], 1, 1, 4),
    ),
    "int8_add": Layer(
        _BOTH,
        lambda a: ByteMapCall(a["numbers"][0], _finish(a)),
        lambda a: byte_reference.add(a["x"], a["numbers"][0], _finish(a), a["residual"]),
        _same,
    ),
    "int8_mul": Layer(
        ("x", "gates"),
        lambda a: ByteScaleCall(a["numbers"][0], _finish(a)),
        lambda a: byte_reference.scale(a["x"], a["gates"], a["numbers"][0], _finish(a)),
        _same,
    ),
    "int8_max_pool2d": Layer(
        ("x",),
        lambda a: ByteMaxPoolCall(_geometry(a)),
        lambda a: byte_reference.max_pool(a["x"], _geometry(a)),
        _pool_shape,
    ),
    "int8_quantize": Layer(
        ("x",),
        lambda a: ToBytesCall(a["scale"], a["zero"]),
        lambda a: byte_reference.to_bytes(a["x"], a["scale"], a["zero"]),
        lambda a: (a["x"].shape[0], fours(a["x"].shape[1]) // 4, *a["x"].shape[2:], 4),
    ),
    "int8_dequantize": Layer(
        ("x",),
        lambda a: FromBytesCall(a["channels"], a["scale"], a["zero"]),
        lambda a: byte_reference.from_bytes(a["x"], a["channels"], a["scale"], a["zero"]),
        lambda a: (a["x"].shape[0], a["channels"], *a["x"].shape[2:4]),
    ),
}

for _name, _signature in _SIGNATURES.items():
    SCHEMAS.define(f"{_name}({_signature}) -> Tensor")


def arguments_of(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of an operator's call by name."""
    names = [declared.name for declared in operator._schema.arguments]
    return {**dict.fromkeys(names), **dict(zip(names, args, strict=False)), **kwargs}


def _register(name: str, layer: Layer) -> Any:
    operator = getattr(torch.ops.revnets, name).default

    def run(*args: Any, **kwargs: Any) -> Tensor:
        a = arguments_of(operator, args, kwargs)
        if kernel_problem() is None:
            return layer.call(a)(*[a[operand] for operand in layer.operands])
        warn_of_dense_path()
        return layer.plain(a)

    def fake(*args: Any, **kwargs: Any) -> Tensor:
        a = arguments_of(operator, args, kwargs)
        check_devices(a["x"], *(value for value in a.values() if isinstance(value, Tensor)))
        floats = a.get("to_float") or name == "int8_dequantize"
        return a["x"].new_empty(layer.shape(a), dtype=torch.float32 if floats else torch.uint8)

    SCHEMAS.impl(name, run, "CPU")
    torch.library.register_fake(f"revnets::{name}", fake, lib=SCHEMAS)
    return operator


LAYERS: Mapping[Any, Layer] = {_register(name, layer): layer for name, layer in _LAYERS.items()}
"""By the operator."""
