"""A wider version of any network: which widths depend on which is derived from a trace, and checked by another one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..sites import NORMS
from ..trace import Trace, TraceError, trace
from .coupling import Coupling


class WidenError(ValueError):
    """The network cannot be widened; the message says where and why."""


def widen(model: nn.Module, coupling: Coupling, factor: float, input_size: tuple[int, ...]) -> tuple[nn.Module, Trace]:
    """A copy of ``model`` with its free widths times ``factor``, newly initialised where shapes changed, and its trace.

    Depthwise groups, heads and channels of norms follow. Parameters that were constant (norms, layer scale, zero
    biases) are so again; others are drawn with the mean and standard deviation they had, smaller for a larger fan-in.

    Args:
        model: any.
        coupling: of it.
        factor: at least 1.
        input_size: of one example.

    Raises:
        WidenError: when the wider network does not do what was derived, op by op; names the op.
    """
    sizes = coupling.widths.sizes(factor)
    wide = copy.deepcopy(model)
    modules = dict(wide.named_modules())
    for name, shape in coupling.shapes(sizes).items():
        owner, _, leaf = name.rpartition(".")
        _resize(modules[owner], leaf, shape)
    for module in modules.values():
        _follow_shapes(module)
    for (name, attribute), form in coupling.attributes.items():
        setattr(modules[name], attribute, coupling.widths.size(form, sizes))
    for (name, attribute), form in coupling.scales.items():
        if coupling.widths.size(form, sizes) != coupling.widths.now(form):
            setattr(modules[name], attribute, coupling.widths.size(form, sizes) ** -0.5)
    _rename_features(wide, coupling, sizes)
    return wide, _checked(wide, coupling, sizes, input_size)


@torch.no_grad()
def _resize(module: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    old: Tensor = getattr(module, name)
    new = torch.empty(shape, dtype=old.dtype, device=old.device)
    if old.device.type != "meta":
        if old.min() == old.max():
            new.fill_(old.flatten()[0])
        elif not old.is_floating_point() or (name in module._buffers and not isinstance(module, NORMS)):
            raise WidenError(f"buffer {name} of {type(module).__name__} has values that depend on the width")
        else:
            std = float(old.std())
            if isinstance(module, (nn.Conv2d, nn.Linear)) and old.dim() > 1:
                std *= (old[0].numel() / new[0].numel()) ** 0.5
            new.normal_(float(old.mean()), std)
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(new, old.requires_grad)
    else:
        module._buffers[name] = new


def _follow_shapes(module: Any) -> None:
    """Attributes of torch's own layers that say the shapes of their parameters."""
    if isinstance(module, nn.Conv2d):
        if module.groups == module.in_channels:
            module.groups = module.groups * module.weight.shape[0] // module.out_channels
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, NORMS):
        like = module.weight if module.weight is not None else getattr(module, "running_mean", None)
        if like is None:
            return
        for name in ("num_features", "num_channels"):
            if hasattr(module, name):
                setattr(module, name, like.shape[0])
        if hasattr(module, "normalized_shape"):
            module.normalized_shape = tuple(like.shape)


FEATURE_ATTRIBUTES = ("num_features", "head_hidden_size", "embed_dim")


def _rename_features(model: Any, coupling: Coupling, sizes: dict[int, int]) -> None:
    """What a timm model says of its widths: ``num_features`` and its like, ``feature_info``."""
    news: dict[int, set[int]] = {}
    for forms in coupling.values.values():
        for form in forms:
            news.setdefault(coupling.widths.now(form), set()).add(coupling.widths.size(form, sizes))
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    features = getattr(classifier, "in_features", None)
    for name in FEATURE_ATTRIBUTES:
        old = getattr(model, name, None)
        if type(old) is int:
            found = news.get(old, {old}) - {old} or {old}
            setattr(model, name, features if features in found else max(found))
    outputs = {call.module: call.outputs[0] for call in coupling.trace.calls if call.outputs}
    for info in getattr(model, "feature_info", None) or []:
        value = outputs.get(info.get("module", "")) if isinstance(info, dict) else None
        if value is not None and info["num_chs"] in value.shape:
            form = coupling.values[value.number][value.shape.index(info["num_chs"])]
            info["num_chs"] = coupling.widths.size(form, sizes)


def _checked(model: nn.Module, coupling: Coupling, sizes: dict[int, int], input_size: tuple[int, ...]) -> Trace:
    """A trace of the wider network, every op of which has the output that was derived."""
    try:
        found = trace(model, input_size)
    except TraceError as error:
        raise WidenError(f"its widths depend on each other in a way that was not found: {error.reason}") from error
    for before, after in zip(coupling.trace.ops, found.ops, strict=False):
        derived = [tuple(coupling.widths.size(f, sizes) for f in coupling.forms(v)) for v in before.outputs]
        if before.name != after.name or derived != [value.shape for value in after.outputs]:
            raise WidenError(
                f"{coupling.place(before)} should give {derived} in the wider network, {after.name} gave "
                f"{[value.shape for value in after.outputs]}: its widths do not only depend on its layers"
            )
    if len(found.ops) != len(coupling.trace.ops):
        raise WidenError("the wider network runs other ops than the one given")
    return found
