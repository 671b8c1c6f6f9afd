"""One forward pass of any model, recorded op by op on tensors without memory: who feeds whom, and what it costs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry


class TraceError(ValueError):
    """The model cannot be run on tensors without memory; the message is one sentence."""

    def __init__(self, model: str, shape: tuple[int, ...], reason: str) -> None:
        self.reason = f"{model} on an input of shape {shape}: {reason}"
        super().__init__(f"{model} does not run on an input of shape {shape} ({reason}): give the right input_size")


@dataclass
class Op:
    """One call of an aten op. Values are numbers that name a tensor at a moment: changing in place makes a new one.

    Attributes:
        func: the op.
        args: its arguments, tensors replaced by ``Value``.
        kwargs: likewise.
        outputs: values that it made.
        module: name of the innermost module that was running, "" for the model itself.
        flops: 2 per multiply-add; 0 for what is no product of matrices.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Value]
    module: str
    flops: int

    @property
    def inputs(self) -> list[Value]:
        """Values that it reads."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Value)]

    @property
    def name(self) -> str:
        """Without namespace and overload."""
        return self.func._schema.name.removeprefix("aten::")


@dataclass(frozen=True)
class Value:
    """A tensor at a moment: its number, its shape, and its name if it is a parameter or buffer."""

    number: int
    shape: tuple[int, ...]
    parameter: str | None = None


@dataclass
class Call:
    """One call of a module: values that came in and went out (tensors in nested structures flattened)."""

    module: str
    inputs: list[Value]
    outputs: list[Value] = field(default_factory=list)
    first_op: int = 0
    last_op: int = 0


@dataclass
class Trace:
    """A recorded forward pass.

    Attributes:
        ops: in the order in which they ran.
        calls: of modules, by the order in which they began.
        inputs: of the model.
        outputs: of the model.
    """

    ops: list[Op]
    calls: list[Call]
    inputs: list[Value]
    outputs: list[Value]

    @property
    def flops(self) -> int:
        """Of the whole pass, 2 per multiply-add."""
        return sum(op.flops for op in self.ops)

    def flops_by_module(self) -> dict[str, int]:
        """FLOPs of each module's own ops, those of its children left out."""
        found: dict[str, int] = {}
        for op in self.ops:
            found[op.module] = found.get(op.module, 0) + op.flops
        return found


def trace(model: nn.Module, input_size: Sequence[int], batch_size: int = 1) -> Trace:
    """Run ``model`` once in eval mode on the meta device and record it; the model itself is left as it is.

    Args:
        model: on any device, in any mode.
        input_size: of one example, such as ``(3, 224, 224)``.
        batch_size: of the recorded pass.

    Raises:
        TraceError: when the model does not take such an input, or cannot run without memory.

    Example:
        >>> trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), (4,)).flops
        64
    """
    twin, names = _meta_twin(model)
    x = torch.empty(batch_size, *input_size, device="meta", dtype=_dtype(model))
    recorder = _Recorder(names)
    try:
        with _watched(twin, recorder), torch.no_grad(), recorder:
            outputs = twin(x)
    except Exception as error:  # whatever a model may raise
        reason = (str(error).splitlines() or [type(error).__name__])[0] + recorder.place()
        raise TraceError(type(model).__name__, tuple(x.shape), reason) from error
    return Trace(recorder.ops, recorder.calls, [recorder.value(x)], recorder.values(outputs))


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def meta_twin(model: nn.Module) -> nn.Module:
    """A copy of the model without memory, in eval mode."""
    return _meta_twin(model)[0]


def _meta_twin(model: nn.Module) -> tuple[nn.Module, dict[int, tuple[str, Tensor]]]:
    """A copy without memory, and the names of its parameters and buffers by identity."""
    memo: dict[int, Any] = {}
    names: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        with torch.no_grad():
            twin: Tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        if isinstance(tensor, nn.Parameter):
            twin = nn.Parameter(twin, tensor.requires_grad)
        memo[id(tensor)] = twin
        names[id(twin)] = (name, twin)
    twin_model = copy.deepcopy(model, memo)
    twin_model.eval()  # whose result is None for MMDetection's networks
    return twin_model, names


class _watched:
    """Within this context the recorder knows which module runs."""

    def __init__(self, twin: nn.Module, recorder: _Recorder) -> None:
        self.twin, self.recorder = twin, recorder
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        for name, module in self.twin.named_modules():
            self.handles += [
                module.register_forward_pre_hook(self._before(name), with_kwargs=True),
                module.register_forward_hook(self._after(name)),
            ]

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _before(self, name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: self.recorder.enter(name, (args, kwargs))

    def _after(self, name: str) -> Callable[..., None]:
        return lambda module, args, output: self.recorder.leave(output)


class _Recorder(TorchDispatchMode):
    def __init__(self, names: dict[int, tuple[str, Tensor]]) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.calls: list[Call] = []
        self._names = names
        self._stack: list[Call] = []
        self._numbers: dict[int, int] = {}
        self._alive: list[Tensor] = []  # so that identities stay unique
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        shown_args, shown_kwargs = tree_map_only(Tensor, self.value, (args, kwargs))
        out = _known_result(func, args)
        if out is None:
            out = func(*args, **kwargs)
        written = {id(t) for t in tree_leaves(out) if isinstance(t, Tensor)}
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(given, Tensor):
                written.add(id(given))
                self._number(given)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._number(tensor)
        formula = flop_registry.get(func._overloadpacket)
        flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=out))
        module = self._stack[-1].module if self._stack else ""
        self.ops.append(Op(func, shown_args, shown_kwargs, self.values(out), module, flops))
        return out

    def place(self) -> str:
        """Where the pass is, in words."""
        module = self._stack[-1].module if self._stack else ""
        return f", in {module or 'the model'}" + (f" after op {self.ops[-1].name}" if self.ops else "")

    def _number(self, tensor: Tensor) -> None:
        """Name the tensor anew: its content changed, or it is new."""
        self._count += 1
        if id(tensor) not in self._numbers:
            self._alive.append(tensor)
        self._numbers[id(tensor)] = self._count

    def value(self, tensor: Tensor) -> Value:
        if id(tensor) not in self._numbers:
            self._number(tensor)
        name = self._names[id(tensor)][0] if id(tensor) in self._names else None
        return Value(self._numbers[id(tensor)], tuple(tensor.shape), name)

    def values(self, tensors: Any) -> list[Value]:
        return [self.value(t) for t in _tensors(tensors)]

    def enter(self, name: str, inputs: Any) -> None:
        call = Call(name, self.values(inputs), first_op=len(self.ops))
        self.calls.append(call)
        self._stack.append(call)

    def leave(self, output: Any) -> None:
        call = self._stack.pop()
        call.outputs, call.last_op = self.values(output), len(self.ops)


_ELEMENTWISE = {"relu", "hardswish", "hardsigmoid", "hardtanh", "silu", "gelu", "sigmoid", "mish", "tanh"}


def _known_result(func: Any, args: tuple[Any, ...]) -> Any:
    """The result of frequent ops, by its shape: torch's own meta kernels of these take half of a trace's time."""
    name = func._schema.name.removeprefix("aten::")
    if name.removesuffix("_") in _ELEMENTWISE:
        return args[0] if name.endswith("_") else torch.empty_like(args[0])
    if name == "native_batch_norm":
        return torch.empty_like(args[0]), *(args[0].new_empty(args[0].shape[1]) for _ in range(2))
    return None


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
