"""Reconstruction check: how far rebuilt activations are from the true ones, op by op."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from .errors import ReversibleError
from .grid import round_to_grid
from .op import ReversibleOp, Tensors
from .replay import (
    Recorder,
    Replayer,
    activated,
    autocast_cache_off,
    frozen_statistics,
    generators_kept,
    tree,
)
from .sequential import RevSequential


@dataclass(frozen=True)
class OpError:
    """Reconstruction error of one op.

    Attributes:
        name: of the op in the model.
        kind: its class.
        local: largest ``|rebuilt input - input|`` when the op is undone from its true outputs.
        accumulated: the same when the whole chain is undone from its end, as training does.
        relative: ``accumulated`` over the largest magnitude of the inputs.
        growth: factor between ``relative`` here and that of the op behind, from which it was undone (at least the
            resolution of the dtype).
    """

    name: str
    kind: str
    local: float
    accumulated: float
    relative: float
    growth: float


@dataclass(frozen=True)
class ReversibilityReport:
    """What ``check_reversibility`` found; ``str`` of it is a table.

    Attributes:
        ops: in the order of the forward pass.
    """

    ops: tuple[OpError, ...]

    @property
    def max_error(self) -> float:
        """Largest accumulated error anywhere; NaN if anything is not finite."""
        errors = [op.accumulated for op in self.ops]
        return float("nan") if any(e != e for e in errors) else max(errors)

    @property
    def exact(self) -> bool:
        """Whether every input was rebuilt to the bit."""
        return self.max_error == 0

    @property
    def grows_at(self) -> OpError | None:
        """The op in whose inverse the relative error grows by the largest factor; None when nothing is lost."""
        return None if self.exact else max(self.ops, key=lambda op: (op.growth != op.growth, op.growth))

    def __str__(self) -> str:
        width = max(len(op.name) + len(op.kind) for op in self.ops) + 3
        lines = [f"{'op':<{width}} {'local':>10} {'accumulated':>12} {'relative':>10} {'growth':>8}"]
        lines += [
            f"{op.name + ' (' + op.kind + ')':<{width}} {op.local:>10.2e} {op.accumulated:>12.2e} "
            f"{op.relative:>10.2e} {op.growth:>8.1e}"
            for op in self.ops
        ]
        worst = self.grows_at
        lines.append("exact to the bit" if worst is None else f"the error grows most in {worst.name} ({worst.kind})")
        return "\n".join(lines)


@torch.no_grad()
def check_reversibility(model: nn.Module, x: Tensor) -> ReversibilityReport:
    """Undo every reversible op of ``model`` on ``x`` and report how well its input is rebuilt.

    Works in any precision, and under the autocast state in which it is called. In training mode it does what training
    does (batch statistics, exact mode); call ``model.train()`` first to know about training. Weights, running
    statistics and generators stay as they are. Keeps every activation of the chain: use a small batch.

    Args:
        model: a network with at least one ``RevSequential``, or one itself.
        x: its input, e.g. ``(N, C, H, W)``.

    Raises:
        ValueError: when the model has no reversible chain.
        ReversibleError: when its chains are not reached by ``model(x)``.

    Example:
        >>> from revnets.reversible import AdditiveCoupling
        >>> net = RevSequential([AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(3)], exact=True)
        >>> check_reversibility(net, torch.rand(5, 4)).exact
        True
    """
    chains = {m: name for name, m in model.named_modules() if isinstance(m, RevSequential)}
    if not chains:
        raise ValueError(f"{type(model).__name__} has no RevSequential, so there is nothing to undo")
    calls: list[tuple[RevSequential, Tensors]] = []
    handles = [
        chain.register_forward_pre_hook(lambda m, xs: calls.append((cast(RevSequential, m), xs))) for chain in chains
    ]
    with generators_kept(x), frozen_statistics(tree(model)), autocast_cache_off():
        try:
            model(x)
        finally:
            for handle in handles:
                handle.remove()
        if not calls:
            raise ReversibleError(f"{type(model).__name__} did not call its reversible chain on this input")
        ops = [error for chain, xs in calls for error in _check_chain(chain, chains[chain], xs)]
    return ReversibilityReport(tuple(ops))


def _check_chain(chain: RevSequential, prefix: str, xs: Tensors) -> list[OpError]:
    with activated(in_stack=chain.training):
        if chain.training and chain.grid_bits is not None:
            xs = tuple(round_to_grid(x, chain.grid_bits) for x in xs)
        trace: list[tuple[str, ReversibleOp, Tensors, Recorder]] = []
        for name, op in chain._named_ops():
            recorder = Recorder()
            with activated(runner=recorder):
                ys = op(*xs)
            trace.append((".".join(filter(None, [prefix, "ops", name])), op, xs, recorder))
            xs = ys
        errors, rebuilt, before = [], xs, 0.0
        for name, op, inputs, recorder in reversed(trace):
            with activated(runner=Replayer(recorder.records)):
                local = _distance(op.inverse(*xs), inputs)
                rebuilt = op.inverse(*rebuilt)
            accumulated = _distance(rebuilt, inputs)
            relative = accumulated / max(*(i.abs().max().item() for i in inputs), 1e-30)
            growth = relative / max(before, torch.finfo(inputs[0].dtype).eps)
            errors.append(OpError(name, type(op).__name__, local, accumulated, relative, growth))
            xs, before = inputs, relative
    return errors[::-1]


def _distance(found: Tensors, expected: Tensors) -> float:
    """Largest difference, NaN included."""
    distances = [(a.double() - b.double()).abs().max().item() for a, b in zip(found, expected, strict=True)]
    return float("nan") if any(d != d for d in distances) else max(distances)
