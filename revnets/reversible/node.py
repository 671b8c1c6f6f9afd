"""The autograd node of one op, and the tape that hands rebuilt activations from node to node."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .errors import ReversibleError
from .grid import check_range, grid_limit, max_abs
from .hooks import no_hook_changes
from .op import Grads, ReversibleOp, Step, Tensors, ops_of, rewound
from .replay import BranchRecord, Precision, Recorder, activated, active, is_fake, parameters_of


class Tape:
    """What the nodes of one forward call share: in the backward pass, the newest rebuilt activation and no other.

    Between two nodes nobody else can see an activation or its gradient, so both travel on the tape, where the next
    node may take them over and work in place; along the autograd edge goes a stand-in without memory.

    Args:
        length: number of nodes.
        device_types: of the inputs, for autocast.
    """

    def __init__(self, length: int, device_types: tuple[str, ...]) -> None:
        self.length = length
        self.precision = Precision(*device_types)
        self._content: tuple[int, Tensors, Grads, bool] | None = None
        self._zero: Tensor | None = None

    def put(self, owner: int, values: Tensors, grads: Grads, exclusive: bool) -> None:
        """Leave what the node after ``owner`` rebuilt: the outputs of ``owner`` and their gradients.

        Args:
            owner: index of the node that they are for.
            values: its outputs.
            grads: their gradients.
            exclusive: whether the next node may change them in place.
        """
        self._content = (owner, values, grads, exclusive)

    def stand_ins(self, xs: Tensors) -> list[Tensor]:
        """Of the shapes that autograd expects of gradients of ``xs``, in the memory of one number."""
        if self._zero is None or self._zero.dtype != xs[0].dtype:
            self._zero = xs[0].new_zeros(())
        return [self._zero.expand(x.shape) for x in xs]

    def take(self, owner: int, name: str) -> tuple[Tensors, Grads]:
        """What was left for node ``owner``, to be changed in place; the tape keeps no reference.

        Raises:
            ReversibleError: when it was consumed already.
        """
        if self._content is None or self._content[0] != owner:
            raise ReversibleError(
                f"{name}: backward pass through a consumed tape: its activations were rebuilt and used once already; "
                'run the forward pass again, or use set_mode("store")'
            )
        _, values, grads, exclusive = self._content
        self._content = None
        if exclusive:
            return values, grads
        # one by one: each original is freed, if nobody else holds it, before the next is copied
        left: list[Any] = [*values, *grads]
        count = len(values)
        del values, grads
        for index, tensor in enumerate(left):
            left[index] = None if tensor is None else tensor.clone()
            del tensor
        return tuple(left[:count]), tuple(left[count:])


class Handover(torch.autograd.Function):
    """The end of a chain: keeps its outputs, the only activations kept, and puts them on the tape in backward."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, name: str, *ys: Tensor) -> Tensors:
        ctx.tape, ctx.name = tape, name
        outputs = tuple(y.data for y in ys)
        ctx.save_for_backward(*outputs)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise ReversibleError(
                f"{ctx.name}: second derivatives (create_graph=True) do not exist through rebuilt activations; "
                'use set_mode("store")'
            )
        ys = _saved_outputs(ctx)
        ctx.tape.put(ctx.tape.length - 1, ys, grads, exclusive=False)
        return (None, None, *ctx.tape.stand_ins(ys))


class OpNode(torch.autograd.Function):
    """One op as one autograd node: inputs are the op's and its parameters, so autograd sees every gradient."""

    @staticmethod
    def forward(
        ctx: Any, op: ReversibleOp, name: str, tape: Tape, index: int, num_inputs: int, *tensors: Tensor
    ) -> Tensors:
        # detached: views of what needs a gradient, made here, would be neither leaves nor results to those who look
        xs, parameters = tuple(x.detach() for x in tensors[:num_inputs]), tensors[num_inputs:]
        recorder = Recorder()
        with no_hook_changes(ops_of(op), name), activated(runner=recorder):
            ys = op(*xs)
        ctx.op, ctx.name, ctx.tape, ctx.index, ctx.num_inputs = op, name, tape, index, num_inputs
        ctx.records = _put_away(ctx, recorder.records)
        ctx.parameters = parameters
        ctx.versions = [p._version for p in parameters]
        return ys

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        _check_parameters(ctx)
        op, tape = ctx.op, ctx.tape
        ys, grad_ys = tape.take(ctx.index, ctx.name)
        needs_input_grad = ctx.needs_input_grad[5 : 5 + ctx.num_inputs]
        step = Step(_taken_out(ctx), ctx.parameters, needs_input_grad)
        with tape.precision.entered(), activated(in_stack=True, runner=None, record=None, playback=None):
            xs, grad_xs = rewound(op, step, ys, grad_ys)
        if ctx.index > 0:
            tape.put(ctx.index - 1, xs, grad_xs, step.shared["exclusive"])
            stand_ins = zip(tape.stand_ins(xs), needs_input_grad, strict=True)
            grad_xs = tuple(stand_in if needed else None for stand_in, needed in stand_ins)
        return (None, None, None, None, None, *grad_xs, *step.parameter_grads())


Records = dict[Hashable, BranchRecord]


def _put_away(ctx: Any, records: Records) -> Records:
    """Side information goes where autograd frees it as soon as the op is undone; the other records stay."""
    leaves, ctx.side = tree_flatten({key: record.kept for key, record in records.items() if record.side})
    ctx.is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
    ctx.others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    ctx.save_for_backward(*(leaf for leaf in leaves if isinstance(leaf, Tensor)))
    return {key: record for key, record in records.items() if not record.side}


def _taken_out(ctx: Any) -> Records:
    """All records."""
    tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
    side = tree_unflatten([next(tensors if is_tensor else others) for is_tensor in ctx.is_tensor], ctx.side)
    return {**ctx.records, **{key: BranchRecord(kept, side=True) for key, kept in side.items()}}


def _saved_outputs(ctx: Any) -> Tensors:
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace" in str(error):
            raise ReversibleError(
                f"{ctx.name}: its output was changed in place after the forward pass, so its input cannot be rebuilt: "
                "use an operation that is not in place, or clone the output first"
            ) from error
        raise ReversibleError(
            f"{ctx.name}: second backward pass through a consumed tape: run the forward pass again, or pass "
            "retain_graph=True to the first backward"
        ) from error


def _check_parameters(ctx: Any) -> None:
    present = {id(p) for p in parameters_of(ctx.op)}
    if any(id(p) not in present or not p.requires_grad for p in ctx.parameters):
        raise ReversibleError(
            f"{ctx.name}: its parameters were replaced or frozen between forward and backward (functional_call?), so "
            'the recomputed activations would have no gradient for them: use set_mode("store")'
        )
    check_versions(ctx.name, ctx.op, ctx.parameters, ctx.versions)


def check_versions(where: str, module: nn.Module, parameters: Sequence[Tensor], versions: Sequence[int]) -> None:
    """Refuse a backward pass that would recompute activations with other weights.

    Args:
        where: it is, for the error.
        module: whose parameters they are.
        parameters: that were used in the forward pass.
        versions: that they had there.

    Raises:
        ReversibleError: naming the first that was changed in place.
    """
    for parameter, version in zip(parameters, versions, strict=True):
        if parameter._version != version:
            name = next((n for n, p in module.named_parameters() if p is parameter), "a parameter")
            raise ReversibleError(
                f"{where}: parameter {name} was changed in place between forward and backward (an optimizer step?), "
                "so the recomputed activations would differ: call backward before changing weights"
            )


class RangeGuard:
    """Watches that values stay on the grid of exact mode, without making an accelerator wait.

    On CPU all are checked at the end of the forward pass. Elsewhere the maxima go to pinned memory while the device
    works on, and are checked when the backward pass arrives; within ``range_checks_put_off``, when the caller wants it.
    Within ``captured`` they stay on the device, for the caller to look at.
    """

    def __init__(self, grid_bits: int) -> None:
        self.grid_bits = grid_bits
        self._seen: list[tuple[str, torch.dtype]] = []  # of every map that was watched
        self._parts: list[Tensor] = []  # its largest magnitudes
        self._maxima: Tensor | None = None
        self._host: Tensor | None = None
        self._event: Any = None

    def watch(self, where: str, values: Tensors) -> None:
        """Note the largest magnitudes of the outputs of an op."""
        for dtype in dict.fromkeys(value.dtype for value in values if value.device.type != "meta"):
            alike = [value for value in values if value.dtype == dtype]
            self._seen += [(where, dtype)] * len(alike)
            self._parts.append(max_abs(*alike))

    def arm(self, outputs: Tensors) -> None:
        """Check the maxima (CPU), or have them copied and checked when the backward pass reaches ``outputs``.

        Raises:
            RangeError: naming the op, the value, and the grid that would hold it.
        """
        if not self._seen:
            return
        maxima = self._largest()
        if is_fake(maxima):
            return
        if active.captured:
            self._maxima = maxima
            if active.guards is not None:
                active.guards.append(self)
            return
        self._arm(outputs, maxima)

    def arm_replayed(self, outputs: Tensors) -> None:
        """Have what a replay of a captured forward pass found checked, as ``arm`` does for the pass itself.

        Args:
            outputs: of this replay.

        Raises:
            RangeError: see ``arm``.
        """
        again = RangeGuard(self.grid_bits)
        again._seen, again._parts = list(self._seen), list(self._parts)
        again._arm(outputs, self.maxima)

    def _arm(self, outputs: Tensors, maxima: Tensor) -> None:
        device = maxima.device
        self._host = maxima.to("cpu", non_blocking=True)
        if device.type == "cpu" and active.guards is None:
            return self.settle()
        if device.type != "cpu":
            self._event = torch.get_device_module(device).Event()
            self._event.record()
        for output in outputs:
            if output.requires_grad:
                output.register_hook(self.settle)
        if active.guards is not None:
            active.guards.append(self)

    @property
    def maxima(self) -> Tensor:
        """Of the outputs in the order of the ops, on their device.

        Raises:
            ReversibleError: for a guard that was not armed within ``captured``.
        """
        if self._maxima is None:
            raise ReversibleError("a range guard keeps its maxima on the device within captured() only: arm it there")
        return self._maxima

    @property
    def device(self) -> torch.device:
        """Of what was watched, and is not yet checked."""
        return self._parts[0].device

    def _largest(self) -> Tensor:
        """One number per map that was watched."""
        parts = max(m.shape[1] for m in self._parts)
        together = torch.cat([m.expand(-1, parts) for m in self._parts])  # float32 and float64 do not mix
        return together.amax(1) if parts > 1 else together.flatten()

    def settle(self, _: Any = None) -> None:
        """Raise for the first value out of range, once the copy has arrived.

        Raises:
            RangeError: naming the op, the value, and the grid that would hold it.
        """
        if self._host is None:
            return
        if self._event is not None:
            self._event.synchronize()
        self.check(self._host.tolist())
        self._host, self._seen, self._parts = None, [], []

    def check(self, values: list[float]) -> None:
        """Raise for the first of these largest magnitudes, in the order of the ops, that is out of range.

        Raises:
            RangeError: naming the op, the value, and the grid that would hold it.
        """
        for (where, dtype), value in zip(self._seen, values, strict=True):
            check_range(value, self.grid_bits, dtype, where)

    def kept(self) -> Tensor:
        """Whether all ``maxima`` are in range, as a 0-d tensor on their device."""
        return (self.maxima <= grid_limit(self.grid_bits, self.maxima.dtype)).all()


@contextmanager
def range_checks_put_off() -> Iterator[list[RangeGuard]]:
    """Within, forward passes of exact mode end whatever their values; gives the guards, to be settled after it."""
    guards: list[RangeGuard] = []
    with activated(guards=guards):
        yield guards


@contextmanager
def captured() -> Iterator[list[RangeGuard]]:
    """Within, a training step does nothing that a CUDA graph cannot hold; gives exact mode's guards.

    No guard asks the device for a value, and what branches draw at random is kept instead of a generator's state.
    """
    guards: list[RangeGuard] = []
    with activated(guards=guards, captured=True):
        yield guards
