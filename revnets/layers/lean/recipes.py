"""Which operators are cheap enough to run twice, and how each is run again without what it did besides its value."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...reversible.replay import is_fake

aten = torch.ops.aten

Again = Callable[..., Tensor]
"""Computes an operator's first result again, from the same arguments."""

MOVES = {
    "_to_copy",
    "cat",
    "channel_shuffle",
    "clone",
    "constant_pad_nd",
    "flip",
    "pixel_shuffle",
    "pixel_unshuffle",
    "reflection_pad2d",
    "repeat",
    "replication_pad2d",
    "roll",
    "stack",
    "upsample_nearest2d",
    "_upsample_nearest_exact2d",
}
"""Copies of elements to other places, precisions or layouts."""

ELEMENTWISE = {"gelu_", "hardswish", "hardswish_", "log_sigmoid_forward", "where"}
"""Elementwise operators that torch does not tag so; it tags all others."""

CONSTANT = {"fill", "fill_", "zero", "zero_", "ones_like", "zeros_like", "full_like", "empty_like"}
"""What depends on no tensor's values is memory to be written to, perhaps by kernels that torch does not know of."""

NORMS = {"native_layer_norm", "native_group_norm", "_fused_rms_norm", "batch_norm_elemt", "_softmax", "_log_softmax"}
"""Run again as they are; their statistics are part of it."""

BATCH_NORMS = {
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_batch_norm_with_update",
    "cudnn_batch_norm",
    "miopen_batch_norm",
}
"""Batch norms: in training they move running statistics, and their results are value, mean and 1 / deviation."""

VIEWS_WITHOUT_ALIAS = {"_unsafe_view", "_reshape_alias"}

WEIGHTS = {
    **dict.fromkeys(("gelu", "mish", "erf", "_softmax", "_log_softmax"), 3.0),
    **dict.fromkeys(("silu", "sigmoid", "tanh", "elu", "exp", "log", "softplus", "log_sigmoid_forward", "pow"), 2.0),
    **dict.fromkeys(("native_layer_norm", "native_group_norm", "_fused_rms_norm"), 1.5),
    **dict.fromkeys(("relu", "relu_", "add_", "mul_", "threshold"), 0.5),
}
"""How many times as long as a copy operators take per byte of their result; all others take one.

In place no new memory is touched; norms of rows read them twice; exponential functions are arithmetic. Measured on one
core of an AMD EPYC, in float32: a batch norm's second half and a copy 10 GB/s, SiLU 4, Hardswish 13, ReLU in place 25.
"""


def name_of(func: Any) -> str:
    """An operator's name without namespace and overload.

    Example:
        >>> name_of(torch.ops.aten.add_.Tensor)
        'add_'
    """
    return str(func._schema.name).removeprefix("aten::")


def weight(func: Any) -> float:
    """How many times as long as a copy an operator takes per byte of its result.

    Example:
        >>> weight(torch.ops.aten.silu_.default), weight(torch.ops.aten.add.Tensor)
        (2.0, 1.0)
    """
    name = name_of(func)
    return WEIGHTS.get(name, WEIGHTS.get(name.removesuffix("_"), 1.0))


def writes(func: Any) -> tuple[int | str, ...]:
    """Places (or names) of the arguments that an operator writes to.

    Example:
        >>> writes(torch.ops.aten.add_.Tensor), writes(torch.ops.aten.add.out), writes(torch.ops.aten.add.Tensor)
        ((0,), ('out',), ())
    """
    return tuple(
        argument.name if argument.kwarg_only else place
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def is_view(func: Any) -> bool:
    """Whether the results are views of the first argument."""
    arguments = func._schema.arguments
    if not arguments or not func._schema.name.startswith("aten::"):
        return False
    alias = arguments[0].alias_info
    return (alias is not None and not alias.is_write) or name_of(func) in VIEWS_WITHOUT_ALIAS


def cheap(func: Any) -> Again | None:
    """How an operator's value is computed again; None where it draws, is no elementwise work, or is not known.

    Example:
        >>> x = torch.tensor([-1.0, 2.0])
        >>> cheap(torch.ops.aten.relu_.default)(x), x
        (tensor([0., 2.]), tensor([-1.,  2.]))
        >>> cheap(torch.ops.aten.mm.default) is None
        True
    """
    name = name_of(func)
    if (
        not func._schema.name.startswith("aten::")
        or name.startswith("_foreach")
        or torch.Tag.nondeterministic_seeded in func.tags
    ):
        return None
    if name in NORMS or name in BATCH_NORMS:  # in training, a batch norm is run again by ``batch_norm``
        return lambda *args, **kwargs: _first(func(*args, **kwargs))
    if name in CONSTANT or not (torch.Tag.pointwise in func.tags or name in ELEMENTWISE or name in MOVES):
        return None
    if not writes(func):
        return lambda *args, **kwargs: _first(func(*args, **kwargs))
    return _out_of_place(func, name)


def _out_of_place(func: Any, name: str) -> Again | None:
    """The operator that returns what this one writes into its first argument."""
    if writes(func) != (0,) or not name.endswith("_"):
        return None
    again = getattr(getattr(aten, name[:-1], None), func._overloadname, None)
    if again is None or len(again._schema.arguments) < len(func._schema.arguments):
        return None

    def compute(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = again(x, *args, **kwargs)
        return y if y.dtype == x.dtype else y.to(x.dtype)

    return compute


def in_place(func: Any) -> Any:
    """The operator that writes into its first argument what ``func`` returns; ``func`` itself, if it is such a one."""
    name = name_of(func)
    if name in BATCH_NORMS or name in NORMS or name in MOVES:
        return None
    if writes(func) == (0,):
        return func
    found = getattr(getattr(aten, name + "_", None), func._overloadname, None)
    return found if found is not None and writes(found) == (0,) else None


def is_batch_norm(func: Any) -> bool:
    """Whether this is a batch norm with or without training."""
    return name_of(func) in BATCH_NORMS


def normalises_by_batch(func: Any, args: Sequence[Any]) -> bool:
    """Whether this batch norm takes the statistics of its batch."""
    names = [argument.name for argument in func._schema.arguments]
    return "training" not in names or bool(args[names.index("training")])


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor) -> Tensor:
    """``(x - mean) * invstd * weight + bias``, on a CPU with the bits of torch's kernel for training.

    That kernel multiplies by ``invstd * weight`` and adds ``bias - mean * invstd * weight``. The one for evaluation
    does so, too, with ``1 / sqrt(var + eps)``: which is 1 here, and the weight has the factor already.

    Example:
        >>> x, weight, bias = torch.randn(4, 3, 5, 5), torch.randn(3), torch.randn(3)
        >>> y, mean, invstd = torch.ops.aten.native_batch_norm(x, weight, bias, None, None, True, 0.1, 1e-5)
        >>> torch.equal(y, batch_norm(x, weight, bias, mean, invstd))
        True
    """
    if x.is_cuda and not is_fake(x):
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, 0.0)
    scale = invstd if weight is None else invstd * weight
    if weight is not None and scale.dtype is not weight.dtype:
        scale = scale.to(weight.dtype)
    if mean.dtype is not scale.dtype:
        mean = mean.to(scale.dtype)
    shift = torch.zeros_like(scale) if bias is None else bias
    plain = type(scale) is Tensor and scale.device.type == "cpu"
    ones = _ones(len(scale), scale.dtype) if plain else torch.ones_like(scale)
    return torch.native_batch_norm(x, scale, shift, mean, ones, False, 0.0, 0.0)[0]


def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, eps: Any, shape: Any
) -> Tensor:
    for one in eps:
        y, _, found = aten.native_layer_norm(x, shape, weight, bias, one)
        if _is_same(found, invstd):
            return y
    return _scaled(x, weight, bias, mean, invstd)


def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, eps: Any, *sizes: int
) -> Tensor:
    for one in eps:
        y, _, found = aten.native_group_norm(x, weight, bias, *sizes, one)
        if _is_same(found, invstd):
            return y
    if weight is None and bias is None:
        return _scaled(x, None, None, mean, invstd)
    ones, (n, channels, _, groups) = [1] * (x.dim() - 2), sizes
    scale, mean = (one.view(n, groups, 1).expand(n, groups, channels // groups).flatten(1) for one in (invstd, mean))
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return (x * scale.view(n, channels, *ones) + shift.view(n, channels, *ones)).to(x.dtype)  # as torch's kernel does


NORMS_OF_ROWS: dict[Any, Again] = {
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
}
"""Norms of rows from their input, weight, bias, statistics, epsilons that they may have and shape, by operator.

With the forward pass's epsilon, they are torch's own to the bit; that it is this one is seen in the statistics.
"""


def _is_same(found: Tensor, expected: Tensor) -> bool:
    return is_fake(found) or found.is_meta or torch.equal(found, expected)


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor) -> Tensor:
    """``(x - mean) * invstd * weight + bias``, of as many rows as there are statistics."""
    rows = x.reshape(mean.numel(), -1)
    y = ((rows - mean.reshape(-1, 1)) * invstd.reshape(-1, 1)).view(x.shape)
    y = y if weight is None else y.mul_(weight)
    return (y if bias is None else y.add_(bias)).to(x.dtype)


@functools.lru_cache(64)
def _ones(n: int, dtype: torch.dtype) -> Tensor:
    return torch.ones(n, dtype=dtype, device="cpu")


class Code(NamedTuple):
    """A shorter form of a result that holds less than its type has room for.

    Attributes:
        result: which one of the operator's.
        fits: whether the arguments (of the operator) allow for it.
        encode: the result, and the operator's arguments, to the short form.
        decode: the short form, and dtype, shape and strides of the result, to that.
        other: another result, from the operator's argument and this result; or None.
    """

    result: int
    fits: Callable[..., bool]
    encode: Callable[..., Tensor]
    decode: Callable[..., Tensor]
    other: Callable[[Tensor, Tensor], Tensor] | None = None


def _pack(mask: Tensor, *_: Any) -> Tensor:
    """Eight of 0 or 1 to a byte, in the order of memory."""
    flat = mask.as_strided((mask.numel(),), (1,)).to(torch.uint8)
    columns = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(8, -1)
    packed = columns[0].clone()
    for bit in range(1, 8):
        packed.bitwise_or_(columns[bit] << bit)
    return packed


def _unpack(packed: Tensor, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    mask = torch.empty_strided(shape, stride, dtype=dtype, device=packed.device)
    columns = torch.stack([(packed >> bit) & 1 for bit in range(8)])
    mask.as_strided((mask.numel(),), (1,)).copy_(columns.view(-1)[: mask.numel()])
    return mask


def is_dense(x: Tensor, *_: Any, **__: Any) -> bool:
    """Whether a tensor has its memory without gaps, and each number of it once."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(x))


def _few_pixels(x: Tensor, *_: Any, **__: Any) -> bool:
    return x.dim() >= 3 and x.shape[-1] * x.shape[-2] < 2**31


def _short_index(index: Tensor, x: Tensor, *_: Any) -> Tensor:
    return index.to(_shortest(x.shape[-1] * x.shape[-2]))


def _shortest(pixels: int) -> torch.dtype:
    return torch.int16 if pixels < 2**15 else torch.int32


def shorter(index: Tensor, pixels: int) -> Tensor | None:
    """Places as they are kept, if all are (on the meta device: should be) numbers of pixels; None if not.

    Example:
        >>> shorter(torch.tensor([0, 5]), 100), shorter(torch.tensor([0, 5]), 4)
        (tensor([0, 5], dtype=torch.int16), None)
    """
    if not 0 < pixels < 2**31 or not index.numel():
        return None
    if not (index.is_meta or is_fake(index)):
        lowest, highest = index.aminmax()
        if lowest < 0 or highest >= pixels:
            return None
    return index.to(_shortest(pixels))


def _long_index(short: Tensor, dtype: torch.dtype, *_: Any) -> Tensor:
    return short.to(dtype)


def picked(x: Tensor, index: Tensor) -> Tensor:
    """The maxima, from their places among the pixels."""
    return x.flatten(-2).gather(-1, index.flatten(-2)).view(index.shape)


CODES = {
    "bernoulli_": Code(0, is_dense, _pack, _unpack),
    "max_pool2d_with_indices": Code(1, _few_pixels, _short_index, _long_index, picked),
}
"""Dropout's noise as bits, and the places of maxima, numbers of pixels, in as few bytes as those take."""


def _first(results: Any) -> Tensor:
    return results if isinstance(results, Tensor) else results[0]
