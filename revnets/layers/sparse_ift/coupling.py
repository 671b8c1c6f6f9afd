"""Which dimensions of a network's tensors are the same width: what the rules of ops are told to, one op at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from ..sites import NORMS
from ..trace import Op, Trace, Value
from .widths import Form, Widths, is_number, joined, number


class Coupling:
    """Every dimension of every tensor of a trace in terms of free widths.

    The image's dimensions and the model's outputs are numbers; every dimension of a parameter starts as a free width,
    and every op's rule says which of them agree; ``widen_rules.couple`` puts the two together.

    Args:
        model: the traced one.
        recorded: its trace.
        rule_of: finds the rule of an op.
    """

    def __init__(self, model: nn.Module, recorded: Trace, rule_of: Callable[[Op], Rule]) -> None:
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
            for value, forms in zip(op.outputs, rule_of(op)(self, op), strict=True):
                self.values[value.number] = forms
        for value in recorded.outputs:
            for form in self.forms(value):
                self.widths.fix(form, "it is an output of the model")

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


Rule = Callable[[Coupling, Op], list[list[Form]]]
"""What an op does to widths: notes in the coupling what agrees, and returns the dimensions of what the op gives."""
