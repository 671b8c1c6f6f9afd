"""``ReversibleOp``: the contract between an op and the engine, and ``Step``, which evaluates branches in backward."""

import copy
from collections.abc import Callable, Hashable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .call import call
from .grid import add_rounded, resolve_grid_bits, round_to_grid, sub_rounded_
from .hooks import has_backward_hooks, hooks_silent, post_backward, pre_backward, seen_again
from .replay import BranchRecord, FrozenRunner, Replayer, activated, active, replaying, tree

Tensors = tuple[Tensor, ...]
Grads = tuple[Tensor | None, ...]


class ReversibleOp(nn.Module):
    """A map from a tuple of tensors to a tuple of tensors that can be undone.

    A new op defines ``forward`` and ``inverse`` and calls its branches through ``self.branch(key, module, x)``; values
    added to the stream go through ``self.quantize`` so that exact mode works. ``rewind`` may be overridden to evaluate
    each branch once in the backward pass; the default evaluates it twice.

    Args:
        exact: round branch outputs to a fixed grid in training, so that the inverse is exact to the bit: True for the
            default grid, an integer k for ``2^-k``, False for plain addition.

    Example:
        >>> class Shift(ReversibleOp):
        ...     def forward(self, x):
        ...         return (x + 1,)
        ...     def inverse(self, y):
        ...         return (y - 1,)
        >>> Shift().inverse(*Shift()(torch.zeros(2)))
        (tensor([0., 0.]),)
    """

    def __init__(self, exact: bool | int = False) -> None:
        super().__init__()
        self.grid_bits = resolve_grid_bits(exact)

    def forward(self, *xs: Tensor) -> Tensors:
        """Outputs from inputs: plain differentiable code."""
        raise NotImplementedError(f"{type(self).__name__} needs a forward(*xs)")

    def inverse(self, *ys: Tensor) -> Tensors:
        """Inputs from outputs."""
        raise NotImplementedError(f"{type(self).__name__} needs an inverse(*ys)")

    def num_outputs_of(self, num_inputs: int) -> int:
        """How many tensors come out when so many go in: as many, unless an op says otherwise."""
        return num_inputs

    def rewind(self, step: "Step", ys: Tensors, grad_ys: Grads) -> tuple[Tensors, Grads]:
        """From outputs and their gradients to inputs and theirs; parameter gradients gather in ``step``.

        Gradients of ``ys`` may be None (output not used); gradients of inputs too (nothing to pass on). Overriding ops
        visit their branches in the reverse order of ``forward``: then gradients add up in autograd's own order and
        equal those of stored activations to the bit. They own ``ys`` and ``grad_ys`` and may change them in place; what
        they return must share no memory.
        """
        step.shared["exclusive"] = False  # an inverse may return views: the next op gets copies
        with torch.no_grad(), hooks_silent(ops_of(self)), activated(runner=Replayer(step.records)):
            xs = self.inverse(*ys)
        inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in xs]
        modules = tree(self)
        with (
            torch.enable_grad(),
            _without_hooks(modules),
            hooks_silent(ops_of(self)),
            activated(runner=Replayer(step.records)),
        ):
            outputs = [_Output(y) for y in self.forward(*inputs)]
            in_use = step.in_use(modules)
        return xs, step.pull(outputs, grad_ys, inputs, *in_use)

    def branch(self, key: Hashable, module: Callable[..., Tensor], *xs: Tensor) -> Tensor:
        """Run a branch under the engine's eyes; ``key`` names it uniquely within the op."""
        if active.runner is not None:
            return active.runner.run((id(self), key), module, *xs)
        if self.training and torch.is_grad_enabled():
            # One consumer of x per branch: its gradients are summed within the branch first, as `Step.evaluate` does.
            return call(module, *(x.view_as(x) for x in xs))
        return module(*xs)

    def evaluate(
        self, step: "Step", key: Hashable, module: nn.Module, *xs: Tensor, **options: bool
    ) -> tuple[Tensor, Callable[[Tensor | None], Grads]]:
        """Within ``rewind``: compute the branch called ``key`` again, ready for its gradient; see ``Step.evaluate``."""
        return step.evaluate((id(self), key), module, *xs, **options)

    def keep(self, key: Hashable, value: Callable[[], Any]) -> None:
        """In ``forward``: side information, small against activations, that ``inverse`` needs beside the outputs.

        Args:
            key: its name within the op.
            value: makes it; called only where it is kept, in the forward pass of a step.
        """
        if active.runner is not None and active.runner.keeps:
            active.runner.keep((id(self), key), value())

    def kept(self, key: Hashable) -> Any:
        """In ``inverse``: what ``forward`` kept under this name; None outside of a backward pass."""
        return None if active.runner is None else active.runner.kept((id(self), key))

    @property
    def rounds(self) -> bool:
        """Whether exact mode acts now: in training only."""
        return self.grid_bits is not None and (self.training or active.in_stack)

    def quantize(self, value: Tensor, like: Tensor) -> Tensor:
        """What is added to the stream ``like``: ``value``, rounded to the grid where exact mode acts."""
        if not self.rounds or self.grid_bits is None:
            return value
        return round_to_grid(value.to(like.dtype), self.grid_bits)

    def plus(self, x: Tensor, value: Tensor) -> Tensor:
        """The stream ``x`` with ``value`` added to it, rounded first where exact mode acts."""
        if not self.rounds or self.grid_bits is None:
            return x + value
        return add_rounded(x, value, self.grid_bits)

    def minus(self, y: Tensor, value: Tensor) -> Tensor:
        """What ``plus`` made of, undone: ``y`` without ``value``."""
        return y - self.quantize(value, y)

    def subtract(self, y: Tensor, value: Tensor, owned: bool = False) -> None:
        """``minus`` in place, within ``rewind``; a ``value`` that is ``owned`` may be overwritten."""
        if not self.rounds or self.grid_bits is None:
            y.sub_(value)
        else:
            sub_rounded_(y, value, self.grid_bits, owned)

    def extra_repr(self) -> str:
        return "" if self.grid_bits is None else f"exact={self.grid_bits}"

    @contextmanager
    def undoing(self) -> Any:
        """For ``inverse``: running statistics stay as they are unless the engine already sees to that."""
        with activated(runner=active.runner or FrozenRunner()):
            yield


def ops_of(op: ReversibleOp) -> list[ReversibleOp]:
    """The op and those that it is made of; what is inside of branches is not looked at."""
    found: list[ReversibleOp] = []
    stack: list[nn.Module | None] = [op]
    while stack:
        module = stack.pop()
        if isinstance(module, ReversibleOp):
            found.append(module)
        if isinstance(module, ReversibleOp | nn.ModuleList | nn.ModuleDict):
            stack.extend(module._modules.values())
    return found


def rewound(op: ReversibleOp, step: "Step", ys: Tensors, grad_ys: Grads) -> tuple[Tensors, Grads]:
    """``op.rewind``, and what backward hooks on the op make of the gradients; they may keep what they see."""
    if not has_backward_hooks(op):
        return op.rewind(step, ys, grad_ys)
    outputs = pre_backward(op, _copies(grad_ys))
    xs, grad_xs = op.rewind(step, ys, _copies(outputs))
    wanted = tuple(g if needed else None for g, needed in zip(grad_xs, step.needs_input_grad, strict=True))
    return xs, _copies(post_backward(op, _copies(wanted), outputs))


def _copies(grads: Grads) -> Grads:
    return tuple(None if g is None else g.clone() for g in grads)


class Step:
    """One op's backward pass: evaluates recorded branches with gradient, once each, and gathers parameter gradients.

    Args:
        records: what the forward pass noted about each branch.
        parameters: those that need a gradient, in the order in which the node takes them.
        needs_input_grad: for each input of the op, whether anyone asks for its gradient.
    """

    def __init__(
        self,
        records: dict[Hashable, BranchRecord],
        parameters: Sequence[Tensor],
        needs_input_grad: tuple[bool, ...],
    ) -> None:
        self.records = records
        self.parameters = parameters
        self.needs_input_grad = needs_input_grad
        self.shared = {"exclusive": True}
        self._wanted = {id(p) for p in parameters}
        self._grads: dict[int, Tensor] = {}

    def narrowed(self, index: int) -> "Step":
        """The same step as an inner op sees it that takes only input ``index``."""
        inner = copy.copy(self)
        inner.needs_input_grad = (self.needs_input_grad[index],)
        return inner

    def kept(self, op: ReversibleOp, key: Hashable) -> Any:
        """What the op's ``forward`` kept under this name."""
        return self.records[id(op), key].kept[0]

    def add(self, total: Tensor | None, grad: Tensor | None) -> Tensor | None:
        """Sum of two gradients of which either may be missing; in place on ``total``."""
        if grad is None:
            return total
        return grad.clone() if total is None else total.add_(grad)

    def parameter_grads(self) -> Grads:
        """The gradients gathered so far; None where a parameter took no part."""
        return tuple(self._grads.get(id(p)) for p in self.parameters)

    def evaluate(
        self, key: Hashable, module: nn.Module, *xs: Tensor, needs_grad: bool = True, dense_grad: bool = False
    ) -> tuple[Tensor, Callable[[Tensor | None], Grads]]:
        """Compute a branch again.

        Args:
            key: the name under which ``forward`` called it.
            module: the branch.
            xs: its inputs, equal to the bit to those of the forward pass (or nearly, without exact mode).
            needs_grad: whether gradients of ``xs`` are wanted.
            dense_grad: hand the branch its gradient without gaps in memory, as autograd's sum of two gradients is:
                kernels may round differently on strided input. Not where its last step is an autograd function with
                ``takes_gaps = True``.

        Returns:
            its value, without graph, and a function that takes the value's gradient to the gradients of ``xs``
            (parameter gradients are gathered here) and frees the graph: from then on the value is the caller's to
            change in place.
        """
        modules = tree(module)
        seen_now = seen_again(modules, self.records[key].hooks)  # by hooks
        seen_later = any(map(has_backward_hooks, modules))
        # .data has a version counter of its own: one half of a tensor may be written while the other is in use
        inputs = [(x.clone() if seen_now else x).data.requires_grad_(needs_grad) for x in xs]
        with torch.enable_grad(), _without_hooks(modules), replaying(self.records[key], modules):
            value = call(module, *inputs)
            output = _DenseGrad.apply(value) if dense_grad and _minds_gaps(value) else value
            graph: list[tuple[_Output, Any]] = [(_Output(output), self.in_use(modules))]
            del output
        if value.is_leaf or value._is_view():  # may be an input or a parameter in disguise
            value = value.clone()
        value = value.detach().clone() if seen_now else value.detach()

        def pull(grad: Tensor | None) -> Grads:
            output, in_use = graph.pop()
            grad = grad.clone() if seen_later and grad is not None else grad
            return self.pull([output], [grad], inputs, *in_use)

        return value, pull

    def in_use(self, modules: list[nn.Module]) -> tuple[list[int], list[Tensor]]:
        """Owners (identities of the true parameters) and the tensors that stand for them in the graph being built."""
        found: dict[int, Tensor] = {}
        for _, _, p in _slots(modules):
            owner = id(getattr(p, "_stands_for", p))
            if owner in self._wanted:
                found.setdefault(owner, p)
        return list(found), list(found.values())

    def pull(
        self,
        outputs: Sequence["_Output"],
        grads: Sequence[Tensor | None],
        inputs: Sequence[Tensor],
        owners: Sequence[int],
        parameters: Sequence[Tensor],
    ) -> Grads:
        """Gradients of ``inputs`` through a graph already built; those of ``parameters`` go to their ``owners``."""
        pairs = [
            (y.edge, g.to(y.dtype)) for y, g in zip(outputs, grads, strict=True) if g is not None and y.edge is not None
        ]
        wanted = [x for x in inputs if x.requires_grad]
        if not pairs or not (wanted or parameters):
            return (None,) * len(inputs)
        found = torch.autograd.grad(
            [edge for edge, _ in pairs], [*wanted, *parameters], [g for _, g in pairs], allow_unused=True
        )
        given = {_memory(g) for _, g in pairs}
        for owner, grad in zip(owners, found[len(wanted) :], strict=True):
            if grad is not None:
                former = self._grads.get(owner)
                if former is None and _memory(grad) in given:  # what is only added has the stream's own gradient,
                    grad = grad.clone()  # which is changed in place further on
                self._grads[owner] = grad if former is None else former + grad
        by_input = iter(found)
        return tuple(next(by_input) if x.requires_grad else None for x in inputs)


class _Output:
    """Where a tensor stands in its graph, without the tensor, whose memory may go."""

    def __init__(self, y: Tensor) -> None:
        self.dtype = y.dtype
        self.edge = torch.autograd.graph.get_gradient_edge(y) if y.requires_grad else None


def _memory(x: Tensor) -> int | None:
    """Which memory a tensor lies in; None for sparse ones."""
    return x.untyped_storage()._cdata if x.layout == torch.strided else None


def _minds_gaps(value: Tensor) -> bool:
    """Whether the function that made a value wants its gradient without gaps."""
    function = getattr(value.grad_fn, "_forward_cls", None)
    return value.requires_grad and not getattr(function, "takes_gaps", False)


class _DenseGrad(torch.autograd.Function):
    """Identity; the copy of a gradient with gaps is autograd's own, which frees it as soon as it is used."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad if torch.ops.aten.is_non_overlapping_and_dense(grad) else grad.clone()


def _slots(modules: list[nn.Module]) -> list[tuple[dict[str, Any], str, Tensor]]:
    return [(m._parameters, name, p) for m in modules for name, p in m._parameters.items() if p is not None]


@contextmanager
def _without_hooks(modules: list[nn.Module]) -> Any:
    """Let aliases stand in for parameters with hooks, which must fire once per step, on the whole gradient."""
    hooked = [(slots, name, p) for slots, name, p in _slots(modules) if p._backward_hooks]
    aliases: dict[int, nn.Parameter] = {}
    for slots, name, p in hooked:
        if id(p) not in aliases:
            alias = nn.Parameter(p.detach(), requires_grad=p.requires_grad)
            alias._stands_for = p  # type: ignore[attr-defined]
            aliases[id(p)] = alias
        slots[name] = aliases[id(p)]
    try:
        yield
    finally:
        for slots, name, p in hooked:
            slots[name] = p
