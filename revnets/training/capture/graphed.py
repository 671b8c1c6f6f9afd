"""A part of a network as pairs of CUDA graphs, one for its forward and one for its backward pass, per input shape.

For networks whose training step cannot be captured whole, such as detectors, whose heads depend on values.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...reversible.errors import ReversibleError
from ...reversible.mode import MODES
from ...reversible.node import RangeGuard, captured, check_versions
from ...reversible.replay import autocast_cache_off, is_fake, tree
from ..options.values import COUNT
from ..processes import several
from ..untouched import untouched
from .cuda_graph import CudaGraph, record

_Levels = dict[int, tuple[int, ...]]  # outputs that get a gradient, and its strides
WARM_UP = 2  # passes before a capture, in which kernels are chosen and compiled
STALE = 500  # training passes without a replay, after which a pair makes room for another one
_ALIGNED = 64  # numbers at whose multiples gradients begin

REPLAYED, FIRST = "replayed", "the first of its shape"
HOOKED, WATCHED, OPEN, WITH_GRADIENT, MORE = (
    "hooks on its modules would not be called by a graph",
    "somebody watches its operators",
    "it was called again before the backward pass of the call before",
    "its input needs a gradient",
    "there are more shapes than graphs",
)


class GraphedPart:
    """Training passes of ``module`` on one tensor, replayed from CUDA graphs; other passes run as ever.

    A shape's first pass is an ordinary one; the second one is captured, forward and backward, and replayed from then
    on, with the losses, gradients, statistics and random numbers of ordinary passes. All graphs share their memory.
    Weights and statistics that are moved are followed (everything is captured again), and so are parts that are
    frozen or thawed, set to eval mode or to another memory mode, and autocast: each such state counts as a shape of
    its own. Whatever a graph cannot hold runs eagerly: ``counts`` says how often and why, ``say`` is told once.

    Args:
        module: takes a tensor and gives tensors.
        limit: graphs of each pass; further shapes run eagerly, unless one was not replayed for ``STALE`` passes.
        say: takes one sentence.

    Attributes:
        counts: of training passes, by what was done.

    Raises:
        ValueError: for a limit that is none; when called in one of several processes.

    Example:
        >>> part = GraphedPart(nn.Linear(2, 2))
        >>> part(torch.ones(1, 2))[0].shape  # no graphs on a CPU: as ever
        torch.Size([1, 2])
    """

    def __init__(self, module: nn.Module, limit: int = 4, say: Callable[[str], None] = print) -> None:
        COUNT.check("max_graphs", limit)
        self.module, self.limit, self.say = module, limit, say
        self.counts: Counter[str] = Counter()
        self._pairs: dict[Any, _Pair] = {}
        self._levels: dict[Any, _Levels] = {}  # by state, as seen in an ordinary pass
        self._addresses: list[int] = []
        self._open: Callable[[], _Call | None] = lambda: None

    def __reduce__(self) -> Any:
        return type(self), (self.module, self.limit, self.say)  # a copy has other weights, and no graphs yet

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """The module's outputs.

        Raises:
            RangeError: of exact mode, when ordinary passes raise it.
            CaptureError: for a module that no graph can hold.
        """
        if not self.module.training or not torch.is_grad_enabled() or is_fake(x) or not CudaGraph.exists(x.device):
            return self._eagerly(x)
        return self._train(x)

    @torch.compiler.disable
    def _train(self, x: Tensor) -> tuple[Tensor, ...]:
        if several():
            raise ValueError("cuda_graph: several processes were not tried with captured passes: leave it out")
        modules = tree(self.module)
        why = self._obstacle(x, modules)
        if why:
            return self._instead(x, why)
        self._follow(modules)
        state = _state(x, modules)
        pair = self._pairs.get(state)
        if pair is None:
            if len(self._pairs) >= self.limit and not self._make_room():
                return self._instead(x, MORE)
            if not self._levels.get(state):  # or nothing in it is trained
                return self._first(x, state)
            pair = self._pairs[state] = self._capture(x, modules, self._levels[state])
        self.counts[REPLAYED] += 1
        pair.used_at = self.counts.total()
        call = _Call(pair)
        self._open = weakref.ref(call)
        outputs = _Replay.apply(call, x, *pair.parameters)
        for guard in pair.guards:
            guard.arm_replayed(outputs)
        return outputs

    def forget(self) -> None:
        """Drop all graphs: after a change to the module that does not show in weights and modes."""
        self._pairs.clear()
        self._levels.clear()

    # --- ordinary passes --------------------------------------------------------------------------------------------

    def _eagerly(self, x: Tensor) -> tuple[Tensor, ...]:
        return _several(self.module(x))

    def _first(self, x: Tensor, state: Any) -> tuple[Tensor, ...]:
        self.counts[FIRST] += 1
        outputs, used = self._eagerly(x), self._levels.setdefault(state, {})

        def note(index: int, grad: Tensor | None) -> None:
            if grad is not None:
                used[index] = _dense_strides(grad)

        for index, y in enumerate(outputs):
            if y.requires_grad:
                y.register_hook(partial(note, index))
        return outputs

    def _instead(self, x: Tensor, why: str) -> tuple[Tensor, ...]:
        if not self.counts[why]:
            remedy = ""
            if why is MORE:
                shapes = ", ".join(sorted({"x".join(map(str, pair.x.shape)) for pair in self._pairs.values()}))
                remedy = f" ({shapes}): pad images to fewer shapes (pad_size_divisor), or raise max_graphs={self.limit}"
            self.say(f"cuda_graph: {type(self.module).__name__} also runs eagerly, as {why}{remedy}")
        self.counts[why] += 1
        return self._eagerly(x)

    def _obstacle(self, x: Tensor, modules: Sequence[nn.Module]) -> str:
        """Why a pass cannot be replayed, or nothing."""
        if x.requires_grad:
            return WITH_GRADIENT
        call = self._open()
        if call is not None and not call.closed:
            return OPEN
        if torch._C._len_torch_dispatch_stack():
            return WATCHED
        hooked = torch.nn.modules.module._has_any_global_hook() or any(
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules
        )
        return HOOKED if hooked else ""

    def _make_room(self) -> bool:
        """Forgets the pair that was not replayed for longest, if nobody seems to need it any more."""
        state, pair = min(self._pairs.items(), key=lambda item: item[1].used_at)
        if self.counts.total() - pair.used_at < STALE:
            return False
        del self._pairs[state], self._levels[state]
        return True

    # --- captures ---------------------------------------------------------------------------------------------------

    def _follow(self, modules: Sequence[nn.Module]) -> None:
        """Forget the graphs if weights or statistics lie elsewhere now."""
        slots = [slot for m in modules for slot in (m._parameters, m._buffers)]
        addresses = [t.data_ptr() for slot in slots for t in slot.values() if t is not None]
        if addresses != self._addresses:
            self.forget()
            self._addresses = addresses

    def _capture(self, x: Tensor, modules: Sequence[nn.Module], levels: _Levels) -> _Pair:
        other = next(iter(self._pairs.values()), None)
        pair = _Pair(self.module, modules, x, levels, None if other is None else other.forward)
        with untouched(self.module, None, x):
            pair.forward.warm_up(pair.warm_up)
        former = (p.gradients for p in self._pairs.values())
        pair.gradients = next((g for g in former if g.fits(pair.gradients)), pair.gradients)
        pair.capture()
        return pair


def _dense_strides(x: Tensor) -> tuple[int, ...]:
    """Those of a tensor without gaps that is laid out like ``x``."""
    return torch.empty_like(x, device="meta").stride()


def _several(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _state(x: Tensor, modules: Sequence[nn.Module]) -> Any:
    """All that a graph takes for granted, but addresses."""
    kind = x.device.type
    return (
        (x.shape, x.stride(), x.dtype, x.device),
        (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
        bytes(m.training for m in modules),
        bytes(p.requires_grad for m in modules for p in m._parameters.values() if p is not None),
        tuple(mode for m in modules if (mode := vars(m).get("mode")) in MODES),
    )


class _Call:
    """One forward pass by replay, until its backward pass or its end."""

    def __init__(self, pair: _Pair) -> None:
        self.pair, self.closed = pair, False
        self.versions = [p._version for p in pair.parameters]


class _Pair:
    """A forward and a backward pass on tensors that stay in place.

    The passes are captured with leaves of their own that share the weights' memory: autograd ties a leaf to the stream
    on which it was first used, and to hooks of others.
    """

    def __init__(
        self,
        module: nn.Module,
        modules: Sequence[nn.Module],
        x: Tensor,
        levels: _Levels,
        beside: CudaGraph | None,
    ) -> None:
        self.module, self.modules, self.levels = module, modules, levels
        self.x = x.detach().clone()
        found = {id(p): p for m in modules for p in m._parameters.values() if p is not None and p.requires_grad}
        self.parameters = list(found.values())
        self.leaves = [_leaf(p) for p in self.parameters]
        self.forward = CudaGraph(x.device, beside)
        self.backward = CudaGraph(x.device, self.forward)
        self.guards: list[RangeGuard] = []
        self.outputs: tuple[Tensor, ...] = ()
        self.output_grads: list[Tensor] = []
        self.trained: list[bool] = []
        self.used_at = 0
        self.gradients: _Gradients

    def warm_up(self) -> None:
        """Both passes, to have kernels chosen and to see which gradients there are."""
        for _ in range(WARM_UP):
            self._forward()
            outputs = [(self.outputs[level], strides) for level, strides in self.levels.items()]
            self.output_grads = [
                torch.empty_strided(y.shape, strides, dtype=y.dtype, device=y.device).zero_() for y, strides in outputs
            ]
            grads = self._backward()
        self.gradients = _Gradients(self.parameters, [g is not None for g in grads])
        self.outputs = ()

    def capture(self) -> None:
        """Into the graphs."""
        what = type(self.module).__name__
        record(self.forward, self._forward, f"the forward pass of {what}", "it")
        record(self.backward, lambda: self.gradients.take(self._backward()), f"the backward pass of {what}", "it")
        self.trained = [y.requires_grad for y in self.outputs]
        self.outputs = tuple(y.detach() for y in self.outputs)

    def _forward(self) -> None:
        with self._own_leaves(), autocast_cache_off(), torch.enable_grad(), captured() as self.guards:
            self.outputs = _several(self.module(self.x))

    def _backward(self) -> tuple[Tensor | None, ...]:
        outputs = [self.outputs[level] for level in self.levels]
        with self._own_leaves(), autocast_cache_off(), torch.autocast(self.x.device.type, enabled=False):
            return torch.autograd.grad(outputs, self.leaves, self.output_grads, allow_unused=True)

    @contextmanager
    def _own_leaves(self) -> Iterator[None]:
        leaves = {id(p): leaf for p, leaf in zip(self.parameters, self.leaves, strict=True)}
        former = [(m, m._parameters) for m in self.modules if m._parameters]
        for module, own in former:
            vars(module)["_parameters"] = {name: leaves.get(id(p), p) for name, p in own.items()}
        try:
            yield
        finally:
            for module, own in former:
                vars(module)["_parameters"] = own


def _leaf(parameter: Tensor) -> nn.Parameter:
    leaf = nn.Parameter(parameter.detach())
    vars(leaf).update(vars(parameter))
    return leaf


class _Gradients:
    """Where backward passes leave the weights' gradients; all that are not captured at once may share it.

    One block per type, so that a copy is one launch: autograd may keep what it is given as a weight's ``grad``.

    Args:
        parameters: the weights.
        there: which of them get a gradient.
    """

    def __init__(self, parameters: Sequence[Tensor], there: Sequence[bool]) -> None:
        self.there = list(there)
        self._places: list[tuple[torch.dtype, Any]] = []
        lengths: Counter[torch.dtype] = Counter()
        for p in (p for p, used in zip(parameters, there, strict=True) if used):
            self._places.append((p.dtype, (p.shape, _dense_strides(p), lengths[p.dtype])))
            lengths[p.dtype] += -(-p.numel() // _ALIGNED) * _ALIGNED
        device = parameters[0].device
        self._blocks = {dtype: torch.zeros(length, dtype=dtype, device=device) for dtype, length in lengths.items()}

    def fits(self, other: _Gradients) -> bool:
        """Whether another one's gradients have the same places."""
        return (self.there, self._places) == (other.there, other._places)

    def take(self, grads: Sequence[Tensor | None]) -> None:
        """Put gradients in their places."""
        torch._foreach_copy_(self._views(self._blocks), [g for g in grads if g is not None])

    def give(self) -> Iterator[Tensor | None]:
        """A copy of each; None for weights without."""
        views = iter(self._views({dtype: block.clone() for dtype, block in self._blocks.items()}))
        return (next(views) if used else None for used in self.there)

    def _views(self, blocks: dict[torch.dtype, Tensor]) -> list[Tensor]:
        return [blocks[dtype].as_strided(*place) for dtype, place in self._places]


class _Replay(torch.autograd.Function):
    """A pair of graphs as one autograd node, whose inputs are the weights; outputs and gradients are the caller's."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        pair = call.pair
        pair.x.copy_(x)
        pair.forward.replay()
        ctx.call = call
        ctx.set_materialize_grads(False)
        outputs = tuple(y.clone() for y in pair.outputs)
        ctx.mark_non_differentiable(*(y for y, own in zip(outputs, pair.trained, strict=True) if not own))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        call, pair = ctx.call, ctx.call.pair
        name = type(pair.module).__name__
        if call.closed:
            raise ReversibleError(
                f"{name}: second backward pass through a replayed graph, which keeps nothing for it: run the forward "
                "pass again, or train without cuda_graph"
            )
        check_versions(name, pair.module, pair.parameters, call.versions)
        if any(grad is not None and level not in pair.levels for level, grad in enumerate(grads)):
            raise ReversibleError(
                f"{name}: there are gradients of outputs that had none when its passes were captured: train without "
                "cuda_graph"
            )
        for level, place in zip(pair.levels, pair.output_grads, strict=True):
            place.zero_() if grads[level] is None else place.copy_(grads[level])
        pair.backward.replay()
        call.closed = True
        return (None, None, *pair.gradients.give())
