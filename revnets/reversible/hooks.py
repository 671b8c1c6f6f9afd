"""Module hooks in branches that are computed twice: called once per step, unless they change what is computed.

A forward hook or pre-hook that returns a value, changes a tensor that it was given in place, draws random numbers, or
puts another tensor into its module (as pruning and the older weight norm do) is part of the function: it is called in
the forward pass and again in the recomputation, or gradients would be those of another function. All others only look
on: in the forward pass, where they see what they would see in ``store``, and not again. Backward hooks belong to the
graph, and are called when the gradient passes; see ``ReversibleOp`` for those of ops.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_leaves

from .call import is_compiled
from .errors import ReversibleError

_FORWARD = ("_forward_pre_hooks", "_forward_hooks")
_BACKWARD = ("_backward_pre_hooks", "_backward_hooks")
Key = tuple[int, str, int]  # of a hook: identity of its module (0 for all modules), its kind, its number
State = Callable[[], dict[Any, Tensor]]  # of the generators


class _Watching(threading.local):
    watcher: _Watcher | None = None


_watching = _Watching()


def every_pass(hook: Callable[..., Any], keeps: bool = True) -> Callable[..., Any]:
    """Have a forward hook or pre-hook called in the recomputation, too: in every pass instead of once per step.

    There its tensors are those of the graph through which the gradients pass: ``output.register_hook`` sees them.

    Args:
        hook: to be registered with any module, or with all.
        keeps: whether it may keep tensors that it was given, which are then copies in the recomputation. If not, and
            registered with all modules, it does not make layers call modules that they would fuse.

    Example:
        >>> calls = []
        >>> net = nn.Linear(2, 2)
        >>> handle = net.register_forward_hook(every_pass(lambda module, args, output: calls.append(output.shape)))
        >>> net(torch.ones(1, 2)).shape == calls[0]
        True
    """

    @functools.wraps(hook)
    def called(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs)

    called._every_pass, called._keeps = True, keeps  # type: ignore[attr-defined]
    return called


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches this module, so that it must be called; when it is recomputed, whether somebody did."""
    if isinstance(_watching.watcher, _Again) and id(module) in _watching.watcher.log.seen:
        return id(module) in _watching.watcher.log.hooked
    return _hooked(module) or any(getattr(hook, "_keeps", True) for hooks in _global_hooks() for hook in hooks.values())


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _global_hooks() -> list[dict[int, Any]]:
    return [getattr(torch_module, "_global" + kind) for kind in (*_FORWARD, *_BACKWARD)]


@dataclass
class HookLog:
    """What the hooks on the modules of a branch did in the forward pass.

    Attributes:
        calls: for every hook, whether it was part of the function, call by call.
        seen: identities of the modules that there were.
        hooked: identities of those with hooks.
    """

    calls: dict[Key, list[bool]] = field(default_factory=dict)
    seen: frozenset[int] = frozenset()
    hooked: frozenset[int] = frozenset()

    @property
    def changing(self) -> list[Key]:
        """The hooks that were part of the function."""
        return [key for key, calls in self.calls.items() if any(calls)]


class _Watcher:
    def called(self, hook: _Watched, module: nn.Module, given: tuple[Any, ...]) -> Any:
        """What a hook gives that the module's call has come to."""
        raise NotImplementedError


@dataclass
class _Watched:
    """Stands for a hook while a branch runs."""

    hook: Callable[..., Any]
    key: Key

    @property
    def _keeps(self) -> bool:
        return bool(getattr(self.hook, "_keeps", True))

    @property
    def _every_pass(self) -> bool:
        return bool(getattr(self.hook, "_every_pass", False))

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        watcher = _watching.watcher
        return self.run(module, given) if watcher is None else watcher.called(self, module, given)

    def run(self, module: nn.Module, given: tuple[Any, ...]) -> Any:
        """Call the hook; what autograd saves for it is kept, as a checkpoint counts what is saved in both passes."""
        keep = torch.autograd.graph.saved_tensors_hooks(_same, _same) if torch.is_grad_enabled() else nullcontext()
        with keep:
            return self.hook(module, *given)


def _same(x: Tensor) -> Tensor:
    return x


class _First(_Watcher):
    """Calls hooks and notes what they did."""

    def __init__(self, log: HookLog, state: State) -> None:
        self.log, self.state = log, state

    def called(self, hook: _Watched, module: nn.Module, given: tuple[Any, ...]) -> Any:
        tensors = [x for x in tree_leaves(given) if isinstance(x, Tensor) and not x.is_inference()]
        versions = [x._version for x in tensors]
        owned, drawn = _tensors_of(module), self.state()
        result = hook.run(module, given)
        changed = (
            result is not None
            or versions != [x._version for x in tensors]
            or (hook.key[1] == "_forward_pre_hooks" and _other_tensors(owned, _tensors_of(module), tensors))
            or not _alike(drawn, self.state())
        )
        self.log.calls.setdefault(hook.key, []).append(changed)
        return result


class _Again(_Watcher):
    """Calls the hooks that were part of the function, in the calls in which they were, and those for every pass."""

    def __init__(self, log: HookLog) -> None:
        self.log = log
        self.rest = {key: iter(calls) for key, calls in log.calls.items()}

    def called(self, hook: _Watched, module: nn.Module, given: tuple[Any, ...]) -> Any:
        part_of_it = next(self.rest.get(hook.key, iter(())), False)
        return hook.run(module, given) if part_of_it or hook._every_pass else None


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """What a call of the module may read: its own tensors, whatever they are kept as."""
    kept = (vars(module), module._parameters, module._buffers)
    return {name: x for some in kept for name, x in some.items() if isinstance(x, Tensor)}


def _other_tensors(before: dict[str, Tensor], after: dict[str, Tensor], given: list[Tensor]) -> bool:
    """Whether a module has other tensors than before, besides those that it was given."""
    known = {x.untyped_storage()._cdata for x in given if x.layout == torch.strided}
    return any(
        before.get(name) is not x and not (x.layout == torch.strided and x.untyped_storage()._cdata in known)
        for name, x in after.items()
    )


def _alike(before: dict[Any, Tensor], after: dict[Any, Tensor]) -> bool:
    return all(before[d].numpy().tobytes() == after[d].numpy().tobytes() for d in before)


# --- around a branch -------------------------------------------------------------------------------------------------


@contextmanager
def hooks_noted(modules: Sequence[nn.Module], state: State) -> Iterator[HookLog]:
    """Within, hooks of these modules are called as ever; gives a log of what they do.

    Args:
        modules: of the branch.
        state: of the generators that it may draw from.
    """
    log = HookLog()
    if modules and not any(map(is_compiled, modules)):  # whose hooks are compiled with them
        log.seen = frozenset(map(id, modules))
        log.hooked = frozenset(id(module) for module in modules if has_hooks(module))
        with _put_in(modules), _watched_by(_First(log, state)):
            yield log
    else:
        yield log


@contextmanager
def hooks_again(modules: Sequence[nn.Module], log: HookLog) -> Iterator[None]:
    """Within, only those hooks are called that were part of the function, according to the log.

    Raises:
        ReversibleError: one of them is gone.
    """
    if not log.seen:
        yield
        return
    with _put_in(modules) as present, _watched_by(_Again(log)):
        for key in log.changing:
            if key not in present:
                owner = next((type(m).__name__ for m in modules if id(m) == key[0]), "all modules")
                raise ReversibleError(
                    f"a hook on {owner} that changes what it computes was removed between forward and backward, so the "
                    "recomputed activations would differ: remove it after backward"
                )
        yield


def seen_again(modules: Sequence[nn.Module], log: HookLog) -> bool:
    """Whether hooks that may keep what they are given are called in the recomputation."""
    present = [*_global_hooks()[:2], *(getattr(m, kind) for m in modules for kind in _FORWARD)]
    return bool(log.changing) or any(
        getattr(hook, "_every_pass", False) and getattr(hook, "_keeps", True)
        for hooks in present
        for hook in hooks.values()
    )


@contextmanager
def hooks_silent(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within, forward hooks on these modules are not called."""
    if not any(module._forward_hooks or module._forward_pre_hooks for module in modules) and not any(
        _global_hooks()[:2]
    ):
        yield
        return
    with _put_in(modules), _watched_by(_Again(HookLog())):
        yield


@contextmanager
def _watched_by(watcher: _Watcher) -> Iterator[None]:
    former, _watching.watcher = _watching.watcher, watcher
    try:
        yield
    finally:
        _watching.watcher = former


@contextmanager
def _put_in(modules: Sequence[nn.Module]) -> Iterator[set[Key]]:
    """Put stand-ins for all forward hooks in; gives the keys of those that there are."""
    put: list[tuple[dict[int, Any], int, _Watched]] = []
    places = [(0, kind, getattr(torch_module, "_global" + kind)) for kind in _FORWARD]
    places += [(id(m), kind, hooks) for m in modules for kind in _FORWARD if (hooks := getattr(m, kind))]
    for owner, kind, hooks in places:
        for number, hook in list(hooks.items()):
            if not isinstance(hook, _Watched):  # by a pass around this one
                hooks[number] = _Watched(hook, (owner, kind, number))
                put.append((hooks, number, hooks[number]))
    try:
        yield {hook.key for _, _, hooks in places for hook in hooks.values()}
    finally:
        for hooks, number, watched in put:
            if hooks.get(number) is watched:  # else it was removed, or has removed itself
                hooks[number] = watched.hook


@contextmanager
def no_hook_changes(ops: Sequence[nn.Module], where: str) -> Iterator[None]:
    """Within, hooks on these ops are called as ever, and refused if they change what the ops take or give.

    Args:
        ops: whose inverse would not undo that.
        where: they are, for the error.
    """
    if not (any(op._forward_hooks or op._forward_pre_hooks for op in ops) or any(_global_hooks()[:2])):
        yield
        return
    with _put_in(ops), _watched_by(_Refusing(where)):
        yield


class _Refusing(_Watcher):
    """Calls hooks, but for those that change something."""

    def __init__(self, where: str) -> None:
        self.where = where

    def called(self, hook: _Watched, module: nn.Module, given: tuple[Any, ...]) -> Any:
        tensors = [x for x in tree_leaves(given) if isinstance(x, Tensor)]
        versions = [x._version for x in tensors]
        result = hook.run(module, given)
        known = set(map(id, tensors))
        if versions != [x._version for x in tensors] or any(
            isinstance(x, Tensor) and id(x) not in known for x in tree_leaves(result)
        ):
            raise ReversibleError(
                f"{self.where}: a hook on {type(module).__name__} changes the tensors of the op, which its inverse "
                'would not undo: put it on a module in a branch of the op, or use set_mode("store")'
            )
        return result


# --- of ops ----------------------------------------------------------------------------------------------------------


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to see, or to change, the gradients that pass the module."""
    return bool(
        module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def pre_backward(module: nn.Module, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of a module's outputs after its backward pre-hooks, which torch would call."""
    hooks = (*torch_module._global_backward_pre_hooks.values(), *module._backward_pre_hooks.values())
    for hook in hooks:
        grads = _taken(hook(module, grads), grads)
    return grads


def post_backward(
    module: nn.Module, inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of a module's inputs after its backward hooks, which torch would call."""
    for hook in (*torch_module._global_backward_hooks.values(), *module._backward_hooks.values()):
        inputs = _taken(hook(module, inputs, outputs), inputs)
    return inputs


def _taken(result: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    if result is None:
        return grads
    taken = result if isinstance(result, tuple) else (result,)
    if len(taken) != len(grads):
        raise ReversibleError(f"a backward hook gave {len(taken)} gradients, expected {len(grads)}, or None")
    return taken
