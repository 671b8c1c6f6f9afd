"""A wider version of any network: which widths depend on which is derived from a trace, and checked by another one."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..sites import NORMS
from ..trace import Op, Trace, TraceError, Value, trace
from .widen_rules import POOLS, RULES, SAME, attention, pointwise, pool
from .widths import Form, Widths, is_number, joined, number


class WidenError(ValueError):
    """The network cannot be widened; the message says where and why."""


class Coupling:
    """Every dimension of every tensor of a trace in terms of free widths.

    The image's dimensions and the model's outputs are numbers; every dimension of a parameter starts as a free width,
    and every op says which of them agree (``widen_rules``). An op without a rule fixes what it touches.

    Args:
        model: the traced one.
        recorded: its trace.
    """

    def __init__(self, model: nn.Module, recorded: Trace) -> None:
        self.modules = dict(model.named_modules())
        self.trace = recorded
        self.widths = Widths()
        self.parameters: dict[str, list[Form]] = {}
        self.attributes: dict[tuple[str, str], Form] = {}
        self.scales: dict[tuple[str, str], Form] = {}
        self.values: dict[int, list[Form]] = {}
        for value in recorded.inputs:
            self.values[value.number] = [number(n) for n in value.shape]
        for self._index, op in enumerate(recorded.ops):
            for value, forms in zip(op.outputs, self._couple(op), strict=True):
                self.values[value.number] = forms
        for value in recorded.outputs:
            for form in self.forms(value):
                self.widths.fix(form, "it is an output of the model")

    def _couple(self, op: Op) -> list[list[Form]]:
        if not op.inputs:
            return self.numbers(op.outputs)
        if op.name in RULES:
            return RULES[op.name](self, op)
        if "scaled_dot_product" in op.name:
            return attention(self, op)
        if op.name.startswith(POOLS):
            return pool(self, op)
        if torch.Tag.pointwise in op.func.tags or op.name in SAME:
            return pointwise(self, op)
        return self.unknown(op)

    def unknown(self, op: Op) -> list[list[Form]]:
        """For an op of which nothing is known: what it reads and makes stays as it is."""
        for value in op.inputs:
            for form in self.forms(value):
                self.fix(form, f"op {op.name} has no rule", op)
        return self.numbers(op.outputs)

    def forms(self, value: Value) -> list[Form]:
        """The dimensions of a value."""
        if value.number not in self.values:
            if value.parameter is None:
                self.values[value.number] = [number(n) for n in value.shape]
            else:
                forms = [self.widths.new(n) for n in value.shape]
                self.values[value.number] = self.parameters[value.parameter] = forms
        return self.values[value.number]

    def numbers(self, values: list[Value]) -> list[list[Form]]:
        """Dimensions that do not change."""
        return [[number(n) for n in value.shape] for value in values]

    def place(self, op: Op) -> str:
        """Where an op runs, in words."""
        return f"op {op.name} of {op.module or 'the model'}"

    def module(self, op: Op) -> nn.Module:
        """The innermost module around an op."""
        return self.modules[op.module]

    def unify(self, a: Form, b: Form, op: Op) -> None:
        """Two dimensions agree at this op."""
        self.widths.unify(a, b, self.place(op))

    def fix(self, form: Form, why: str, op: Op) -> None:
        """A dimension stays as it is because of this op."""
        self.widths.fix(form, f"{why} ({self.place(op)})")

    def joined(self, forms: list[Form]) -> Form:
        """Concatenated dimensions."""
        return joined([self.widths.resolved(form) for form in forms])

    def padded(self, form: Form, size: int, op: Op) -> Form:
        """A dimension that grows by a number."""
        self.fix(form, "channels are padded", op)
        return number(size)

    def broadcast(self, inputs: list[list[Form]], shape: tuple[int, ...], op: Op) -> list[Form]:
        """Dimensions of an elementwise result: those of inputs that are not 1 agree."""
        out: list[Form] = []
        for back in range(len(shape), 0, -1):
            present = [forms[-back] for forms in inputs if len(forms) >= back]
            present = [form for form in present if self.widths.now(form) == shape[-back]]
            for other in present[1:]:
                self.unify(present[0], other, op)
            out.append(present[0] if present else number(shape[-back]))
        return out

    def note_attributes(self, op: Op, forms: list[Form]) -> None:
        """Integers of a module that say the sizes of a reshape or split change with them: ``num_heads``, ``width``."""
        if isinstance(self.module(op), (nn.Conv2d, nn.Linear, *NORMS)):
            return  # `_follow_shapes` knows them
        for form in forms:
            size = self.widths.now(self.widths.resolved(form))
            if not is_number(self.widths.resolved(form)):
                for name, value in vars(self.module(op)).items():
                    if type(value) is int and value == size and not name.startswith("_"):
                        # whichever size the program means by it, all that could be meant stay equal
                        self.unify(self.attributes.setdefault((op.module, name), form), form, op)

    def note_scale(self, op: Op, form: Form) -> None:
        """Floats of a module that are ``1 / sqrt(d)`` of a product's inner width d change with it (``scale``, ...)."""
        size = self.widths.now(form)
        if size > 1:
            for name, value in vars(self.module(op)).items():
                if type(value) is float and math.isclose(value, size**-0.5):
                    self.scales[op.module, name] = form

    def tie_attention(self, op: Op, merged: Form) -> None:
        """Merged heads stay as wide as the attention's input, where they are now: programs rely on it."""
        call = next(
            (c for c in reversed(self.trace.calls) if c.module == op.module and c.first_op <= self._index), None
        )
        heads = any("head" in name for name in vars(self.module(op)))
        if call is None or not heads or not call.inputs:
            return
        for form in self.forms(call.inputs[0]):
            if self.widths.now(form) == self.widths.now(merged) and not is_number(self.widths.resolved(form)):
                self.unify(form, merged, op)

    # --- use ------------------------------------------------------------------------------------------------------

    def shapes(self, sizes: dict[int, int]) -> dict[str, tuple[int, ...]]:
        """New shapes of the parameters and buffers that change."""
        found = {}
        for name, forms in self.parameters.items():
            shape = tuple(self.widths.size(form, sizes) for form in forms)
            if shape != tuple(self.widths.now(form) for form in forms):
                found[name] = shape
        return found


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
