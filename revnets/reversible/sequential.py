"""``RevSequential``: a chain of ops that keeps nothing between them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from .errors import ReversibleError
from .grid import resolve_grid_bits, round_to_grid
from .mode import check_mode, recompute
from .node import Handover, OpNode, RangeGuard, Tape
from .op import ReversibleOp, Tensors
from .replay import activated, active, autocast_cache_off, parameters_of
from .traced import as_one_node, is_traced


class RevSequential(nn.Module):
    """A chain of reversible ops, trained with activations rebuilt, checkpointed or stored.

    In eval mode, or where nothing needs a gradient, it is plain module code.

    Args:
        ops: applied in order; the outputs of one are the inputs of the next.
        mode: ``"reversible"``, ``"checkpoint"`` or ``"store"``; may be changed at any time.
        exact: round what is added to the stream to a fixed grid (in training), so that rebuilt activations, and
            gradients, equal those of ``"store"`` to the bit; overrides the ops' own setting.

    Raises:
        ValueError: for an unknown mode or grid.

    Example:
        >>> from revnets.reversible import AdditiveCoupling
        >>> block = lambda: AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> net = RevSequential([block(), block()], exact=True)
        >>> net(torch.ones(3, 4))[0].sum().backward()
        >>> net.inverse(*net(torch.ones(3, 4)))[0].equal(torch.ones(3, 4))
        True
    """

    def __init__(self, ops: Sequence[ReversibleOp], mode: str = "reversible", exact: bool | int = False) -> None:
        super().__init__()
        for op in ops:
            if not isinstance(op, ReversibleOp):
                raise TypeError(f"RevSequential takes reversible ops, got {type(op).__name__}: subclass ReversibleOp")
        self.ops = nn.ModuleList(ops)
        self.mode = check_mode(mode)
        self.set_exact(exact)

    def set_exact(self, exact: bool | int) -> None:
        """Choose the grid of the whole chain: True, False, or its k."""
        self.grid_bits = resolve_grid_bits(exact)
        for module in self.modules():
            if isinstance(module, ReversibleOp):
                module.grid_bits = self.grid_bits

    def forward(self, *xs: Tensor) -> Tensors:
        """Apply the ops.

        Args:
            xs: inputs of the first op.

        Returns:
            outputs of the last op.

        Raises:
            RangeError: in exact mode, when a value leaves the grid's range.
        """
        if not self.training or torch.compiler.is_exporting() or torch.jit.is_tracing():
            return self._plain(xs, self._named_ops())
        if is_traced(*xs):
            return as_one_node(self, self.num_outputs(len(xs)), *xs)
        return self._train(xs)

    def num_outputs(self, num_inputs: int) -> int:
        """How many tensors come out of the chain when so many go in."""
        for _, op in self._named_ops():
            num_inputs = op.num_outputs_of(num_inputs)
        return num_inputs

    def inverse(self, *ys: Tensor) -> Tensors:
        """Inputs of the chain from its outputs; running statistics are left alone."""
        with activated(in_stack=self.training):
            for _, op in reversed(self._named_ops()):
                ys = op.inverse(*ys)
        return ys

    @torch.compiler.disable
    def _train(self, xs: Tensors) -> Tensors:
        refuse_replicas(self)
        named_ops = self._named_ops()
        first = self._first_with_gradient(xs, named_ops)
        guard = RangeGuard(self.grid_bits) if self.grid_bits is not None else None
        mode = "store" if active.inside_branch else self.mode
        with activated(in_stack=True), autocast_cache_off():
            if self.grid_bits is not None:
                xs = tuple(round_to_grid(x, self.grid_bits) for x in xs)
            with torch.no_grad():
                xs = self._plain(xs, named_ops[:first], guard)
            if mode == "reversible":
                xs = self._reversible(xs, named_ops[first:], guard)
            elif mode == "checkpoint":
                xs = self._plain(xs, [(name, partial(recompute, op)) for name, op in named_ops[first:]], guard)
            else:
                xs = self._plain(xs, named_ops[first:], guard)
        if guard is not None:
            guard.arm(xs)
        return xs

    @staticmethod
    def _reversible(xs: Tensors, named_ops: list[tuple[str, ReversibleOp]], guard: RangeGuard | None) -> Tensors:
        tape = Tape(len(named_ops), tuple({x.device.type for x in xs}))
        for index, (name, op) in enumerate(named_ops):
            parameters = [p for p in parameters_of(op) if p.requires_grad]
            xs = OpNode.apply(op, f"op {name} ({type(op).__name__})", tape, index, len(xs), *xs, *parameters)
            if guard is not None:
                guard.watch(f"op {name} ({type(op).__name__})", xs)
        if named_ops:
            name, op = named_ops[-1]
            xs = Handover.apply(tape, f"op {name} ({type(op).__name__})", *xs)
        return xs

    @staticmethod
    def _plain(
        xs: Tensors, named_ops: Sequence[tuple[str, Callable[..., Tensors]]], guard: RangeGuard | None = None
    ) -> Tensors:
        for name, op in named_ops:
            xs = op(*xs)
            if guard is not None:
                guard.watch(f"op {name}", xs)
        return xs

    def _named_ops(self) -> list[tuple[str, ReversibleOp]]:
        return [(name, cast(ReversibleOp, op)) for name, op in self.ops._modules.items()]  # one op may come twice

    @staticmethod
    def _first_with_gradient(xs: Tensors, named_ops: list[tuple[str, ReversibleOp]]) -> int:
        """Index of the first op that takes part in the backward pass: frozen ones before it need not be rebuilt."""
        if not torch.is_grad_enabled():
            return len(named_ops)
        if any(x.requires_grad for x in xs):
            return 0
        for index, (_, op) in enumerate(named_ops):
            if any(p.requires_grad for p in parameters_of(op)):
                return index
        return len(named_ops)

    def extra_repr(self) -> str:
        return f"mode={self.mode}, exact={self.grid_bits or False}"


def refuse_replicas(module: nn.Module) -> None:
    """Refuse to train a replica.

    Raises:
        ReversibleError: for a module that ``nn.DataParallel`` made.
    """
    if getattr(module, "_is_replica", False):
        raise ReversibleError(
            "nn.DataParallel hides its replicas' parameters from the engine, so they would not train: use "
            "DistributedDataParallel (torchrun)"
        )
