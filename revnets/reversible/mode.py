"""The three ways to train the same weights, and recomputation of parts that are not reversible."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .replay import BranchRecord, activated, active, recording, replaying, tree
from .traced import is_traced

MODES = ("reversible", "checkpoint", "store")
"""``reversible``: activations are rebuilt from outputs. ``checkpoint``: torch's own, the input of every op is kept.
``store``: everything is kept. Same loss, gradients, running statistics and generator state after a step in all three.
"""


def check_mode(mode: str) -> str:
    """Return ``mode`` if it is one of ``MODES``.

    Raises:
        ValueError: naming the known modes.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}: expected one of {', '.join(MODES)}")
    return mode


def set_mode(model: nn.Module, mode: str) -> nn.Module:
    """Switch every reversible or recomputed part of ``model`` to ``mode``, now; weights stay as they are.

    Args:
        model: any network with parts that have a ``mode``.
        mode: ``"reversible"``, ``"checkpoint"`` or ``"store"``.

    Raises:
        ValueError: for an unknown mode, or a model without such parts.
    """
    check_mode(mode)
    parts = [m for m in model.modules() if vars(m).get("mode") in MODES]
    if not parts:
        raise ValueError(f"{type(model).__name__} has no reversible part, so mode={mode!r} has no meaning for it")
    for part in parts:
        vars(part)["mode"] = mode
    return model


def recompute(module: Callable[..., Any], *xs: Tensor) -> Any:
    """``module(*xs)``, whose activations are computed again in the backward pass (torch's non-reentrant checkpoint).

    Unlike the bare ``checkpoint``, running statistics are updated once per step and ``once`` values are reused.

    Args:
        module: a module, or a bound method of one.
        xs: its inputs, kept until the backward pass.
    """
    if not torch.is_grad_enabled() or active.inside_branch or _is_drawn_as_a_graph(*xs):
        return module(*xs)
    return _checkpointed(module, *xs)


def _is_drawn_as_a_graph(*xs: Any) -> bool:
    """Whether somebody notes the operations, of which there shall be no second ones."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing() or is_traced(*xs)


@torch.compiler.disable  # dynamo knows no `context_fn` of this kind
def _checkpointed(module: Callable[..., Any], *xs: Tensor) -> Any:
    owner = getattr(module, "__self__", module)
    record = BranchRecord()

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        in_stack = active.in_stack
        return recording(record, tree(owner), *xs), _again(record, owner, in_stack)

    # The generator state is in the record, and only where something drew from it.
    return checkpoint(
        module, *xs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, determinism_check="none"
    )


class _again(AbstractContextManager[None]):
    """Replay of ``record``; may be entered more than once (``retain_graph=True``)."""

    def __init__(self, record: BranchRecord, owner: Any, in_stack: bool) -> None:
        self.record, self.owner, self.in_stack = record, owner, in_stack
        self.entered: list[tuple[AbstractContextManager[None], AbstractContextManager[None]]] = []

    def __enter__(self) -> None:
        pair = (activated(in_stack=self.in_stack), replaying(self.record, tree(self.owner)))
        for context in pair:
            context.__enter__()
        self.entered.append(pair)

    def __exit__(self, *exc: Any) -> None:
        for context in reversed(self.entered.pop()):
            context.__exit__(*exc)
