"""Whether stored tensors can be loaded into a model without becoming other numbers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_SCALED = {getattr(torch, name) for name in dir(torch) if name.startswith("float8") or name.startswith("float4")}


def unfit(own: Mapping[str, Tensor], weights: Mapping[str, Any]) -> str:
    """The first tensor that a model's could only take as other numbers, in words; nothing where all are fit.

    ``load_state_dict`` copies whatever can be cast: complex numbers lose a part, integers of a quantised network are
    taken for weights without their scale, and NaN goes on until something fails. Wider and narrower floats are fit
    (float64, bfloat16, float16), as long as no number overflows. Names and shapes are the caller's to compare: only
    names of both are looked at.

    Args:
        own: The model's state dict.
        weights: What is to be loaded.

    Example:
        >>> unfit({"a": torch.zeros(2)}, {"a": torch.zeros(2, dtype=torch.int8)})
        "'a' holds int8, the model's float32: a quantised network's numbers are no weights without their scale"
        >>> unfit({"a": torch.zeros(2)}, {"a": torch.zeros(2, dtype=torch.float64)})
        ''
    """
    for name, mine in own.items():
        if name in weights and (problem := _unfit(mine, weights[name])):
            return f"'{name}' {problem}"
    return ""


def odd(weights: Mapping[str, Any]) -> str:
    """As ``unfit``, where the model is not known: the first tensor that no network's weights can be.

    Example:
        >>> odd({"conv.weight": torch.zeros(1, dtype=torch.complex64), "bn.num_batches_tracked": torch.tensor(3)})
        "'conv.weight' holds complex64, the model's float32: a part of each number would be lost"
    """
    tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        weight = name.rpartition(".")[2] in ("weight", "bias") or value.is_complex() or value.is_floating_point()
        like = torch.zeros((), dtype=value.dtype if value.is_floating_point() else torch.float32)
        if (weight or _is_special(value)) and (problem := _unfit(like, value)):
            return f"'{name}' {problem}"
    return ""


def _is_special(value: Tensor) -> bool:
    return value.layout != torch.strided or bool(getattr(value, "is_quantized", False))


def _unfit(mine: Tensor, value: Any) -> str:
    """What is wrong with one tensor, as the rest of a sentence that begins with its name."""
    if not isinstance(value, Tensor):
        return f"is {type(value).__name__}, a tensor was expected"
    kind, wanted = str(value.dtype).removeprefix("torch."), str(mine.dtype).removeprefix("torch.")
    if _is_special(value):
        how = "quantised" if value.layout == torch.strided else str(value.layout).removeprefix("torch.")
        return f"is a {how} tensor, the model's is dense: save it as dense {wanted}"
    if value.is_meta:
        return "holds no numbers (it is on the meta device)"
    if mine.is_meta or value.numel() == 0:
        return ""
    if value.is_complex() and not mine.is_complex():
        return f"holds {kind}, the model's {wanted}: a part of each number would be lost"
    if mine.is_floating_point() and value.dtype != mine.dtype:
        if not value.is_floating_point() or value.dtype in _SCALED:
            return (
                f"holds {kind}, the model's {wanted}: a quantised network's numbers are no weights without their scale"
            )
    elif value.dtype != mine.dtype and not _same_numbers(value, mine.dtype):
        return f"holds {kind}, the model's {wanted}: numbers would be changed"
    return _not_finite(mine, value)


def _same_numbers(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether a cast keeps every number."""
    if value.is_floating_point() and not bool(value.isfinite().all()):
        return False
    return bool((value.to(dtype).to(value.dtype) == value).all())


def _not_finite(mine: Tensor, value: Tensor) -> str:
    if not (mine.is_floating_point() or mine.is_complex()) or mine.dtype in _SCALED:
        return ""
    bad = int((~value.to(mine.dtype).isfinite()).sum())
    if not bad or bool((~mine.isfinite()).any()):  # some networks keep a mask of -inf among their buffers
        return ""
    return f"holds {bad} numbers that are NaN or infinite as {str(mine.dtype).removeprefix('torch.')}"
