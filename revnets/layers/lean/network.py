"""``lean``: any network that keeps less for its backward pass, by the recorder of ``keeping``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ...reversible.replay import active, tree
from ..registry import LayerConfig, register_layer
from ..trace import meta_twin
from .keeper import Keeper
from .keeping import Recorder
from .norm_act import uses_lean_layers
from .reading import AVAILABLE, Reader, Writes
from .share import SHARE, Plan, choose


@dataclass(frozen=True)
class LeanConfig(LayerConfig):
    """Options of ``lean``.

    Args:
        share: of the bytes that plain training keeps. What costs most to compute again stays up to this share; with 0,
            as little stays as possible.

    Raises:
        ValueError: for a share outside [0, 1).
    """

    share: float = SHARE

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"share={self.share}: expected a number from 0 (which keeps the least) to below 1 (plain)")


@register_layer("lean", config=LeanConfig, network=True, whole=True, keeps_weights=True)
def lean(job: Any, config: LeanConfig) -> nn.Module:
    """Any network as it is, which in training computes norms, activations and sums again instead of keeping them."""
    from ..convert import Converted, Skipped

    model: nn.Module = job.model
    if isinstance(model, (DistributedDataParallel, DataParallel, torch.jit.ScriptModule, _compiled_class())):
        raise ValueError(f"lean: {type(model).__name__} wraps or replaces the network: convert it before")
    parts = dict(_parts(model, set(job.names)))
    forecasts = forecast(model, job.input_size, tuple(parts), share=config.share)
    for name, part in parts.items():
        found = forecasts.get(name)
        reason = _reason_to_keep(part, found)
        if reason is None:
            make_lean(part, None if found is None else found.plan)
            job.report.converted.append(Converted(name, "lean", "" if found is None else str(found)))
        else:
            job.report.skipped.append(Skipped(name, reason))
    return model


def _compiled_class() -> type:
    kind: type = torch._dynamo.eval_frame.OptimizedModule
    return kind


def _parts(model: nn.Module, names: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """The model, or the largest parts of it all of whose layers are among the names."""
    layers = {name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    left_out = layers - names
    above: tuple[str, ...] = ()
    for name, module in model.named_modules():
        inside = f"{name}." if name else ""
        if above and name.startswith(above):
            continue
        if not any(other.startswith(inside) for other in left_out) and (not name or module._modules):
            above = (*above, inside)
            yield name, module


def _reason_to_keep(module: nn.Module, found: Kept | None) -> str | None:
    if is_lean(module):
        return "it is lean already"
    if not module._modules:
        return "a layer by itself keeps its input, and nothing else"
    if "forward" in vars(module):
        return "its forward was replaced on the object: convert it before"
    if found is not None and found.lean >= found.plain:
        return "nothing that it keeps is cheap to compute again from the rest"
    return None


AS_MUCH = 1.01
"""Of the bytes that the recorder keeps: what recipes from the graph may keep in its place."""


# --- what it saves ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """Bytes per image that a training pass keeps for its backward pass, with torch's own means and lean.

    Attributes:
        plain: with torch's own means.
        lean: with a lean network.
        plan: what it keeps although it could be computed again.
    """

    plain: float
    lean: float
    plan: Plan | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        share = self.lean / self.plain if self.plain else 1.0
        lean, plain = f"{self.lean / 1e6:.2f}", f"{self.plain / 1e6:.2f}"
        return f"keeps {lean} MB per image for the backward pass, plain {plain} ({share:.2f})"


def kept_per_image(
    model: nn.Module, input_size: tuple[int, ...], batch_size: int = 2, share: float = SHARE
) -> Kept | None:
    """What a training pass would keep, found on tensors without memory; None where it cannot be told.

    Args:
        model: on any device, in any mode; it is left as it is.
        input_size: of one example.
        batch_size: of the pass that is tried.
        share: see ``LeanConfig``.

    Example:
        >>> kept_per_image(nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 8)), (512,))
        Kept(plain=6144.0, lean=4096.0)
    """
    return forecast(model, input_size, ("",), batch_size, share).get("")


def forecast(
    model: nn.Module, input_size: tuple[int, ...], names: Sequence[str], batch_size: int = 2, share: float = SHARE
) -> dict[str, Kept]:
    """What parts of a model would keep (see ``kept_per_image``): those that can be told.

    Args:
        model: on any device, in any mode; it is left as it is.
        input_size: of one example.
        names: of the parts; ``""`` is the model.
        batch_size: of the pass that is tried.
        share: see ``LeanConfig``.
    """
    try:
        twin = meta_twin(model)
        twin.train()
        dtype = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.float32)
        x = torch.empty(batch_size, *input_size, device="meta", dtype=dtype)
        calls = {"": (twin, (x,), {})} if tuple(names) == ("",) else _calls(twin, names, x)
    except Exception:  # whatever a model may raise: this is a forecast only
        return {}
    found = {}
    for name, (part, args, kwargs) in calls.items():
        with suppress(Exception):
            found[name] = _forecast(part, args, kwargs, batch_size, share)
    return found


def _forecast(part: nn.Module, args: Any, kwargs: Any, batch_size: int, share: float) -> Kept:
    def trial(kind: Callable[..., Keeper], plan: Plan | None = None) -> Keeper:
        with torch.enable_grad(), kind(part, plan, to_the_end=True).active() as keeper:
            _plain(part)(part, *args, **kwargs)
        return keeper

    def tried(kind: Callable[..., Keeper]) -> tuple[Plan, Keeper]:
        least = trial(kind)
        plan = choose(least.candidates, share * least.asked - least.kept, batch_size)
        return plan, (trial(kind, plan) if plan.spared else least)

    plan, best = tried(_recorder)
    if AVAILABLE:
        with Writes() as writes:
            reading, read = tried(_reader)
        if read.kept <= max(best.kept, share * read.asked) and not writes.hidden:
            plan, best = replace(plan, reading=reading), read
    return Kept(best.asked / batch_size, best.kept / batch_size, plan)


def reads(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a training pass that drops all it can may read its recipes from autograd's graph, which takes less time.

    It may where the graph shows as much as the operators do, found on tensors without memory.

    Args:
        module: without memory, in training.
        args: of its call, without memory.
        kwargs: likewise.
    """
    if not AVAILABLE or not _seen(module).as_tried:
        return False

    def kept(kind: Callable[..., Keeper]) -> int:
        with torch.enable_grad(), kind(module, None, to_the_end=True).active() as keeper:
            module(*args, **kwargs)
        return keeper.kept

    with suppress(Exception), Writes() as writes:  # whatever a model may raise: then every operator is looked at
        least = kept(_recorder)
        return kept(_reader) <= AS_MUCH * least and not writes.hidden
    return False


def _calls(twin: nn.Module, names: Sequence[str], x: Tensor) -> dict[str, tuple[nn.Module, Any, Any]]:
    """The parts of a model, and what they are first called with."""
    found: dict[str, tuple[nn.Module, Any, Any]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda part, args, kwargs: found.setdefault(name, (part, args, kwargs)) and None

    handles = [twin.get_submodule(n).register_forward_pre_hook(note(n), with_kwargs=True) for n in names]
    try:
        with torch.enable_grad():
            twin(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


# --- how it is done --------------------------------------------------------------------------------------------------


def make_lean(module: nn.Module, plan: Plan | None = None) -> nn.Module:
    """Let ``module(...)`` keep less in training, in place; its class becomes a subclass that differs in ``forward``.

    Args:
        module: any.
        plan: what stays although it could be computed again, see ``kept_per_image``; by default nothing does.

    Example:
        >>> net = make_lean(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3)))
        >>> is_lean(net), isinstance(net, nn.Sequential), list(net.state_dict())[:2]
        (True, True, ['0.weight', '0.bias'])
    """
    if not is_lean(module):
        kind: Any = type(module)
        module.__class__ = _lean_class(kind)
        vars(module)[_PLAN] = plan
    return module


_PLAN = "_lean_plan"


def put_plan(module: nn.Module, plan: Plan | None) -> None:
    """Have ``call_lean`` train a module by a plan; None takes it away again."""
    if plan is None:
        vars(module).pop(_PLAN, None)
    else:
        vars(module)[_PLAN] = plan


def plan_in(module: nn.Module) -> Plan | None:
    """The plan by which ``call_lean`` trains a module, if it has one."""
    plan: Plan | None = vars(module).get(_PLAN)
    return plan


def is_lean(module: nn.Module) -> bool:
    """Whether this very module was made lean."""
    return "_plain_class" in vars(type(module))


def _plain(module: nn.Module) -> Any:
    return getattr(type(module), "_plain_class", type(module)).forward


@functools.cache
def _lean_class(kind: Any) -> Any:
    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call_lean(self, kind.forward, *args, **kwargs)

    body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    body |= {"forward": forward, "_plain_class": kind}
    if kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__:
        body["__reduce_ex__"] = _reduce
    return type(kind.__name__, (kind,), body)


def call_lean(module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    """``forward(module, ...)``, which keeps less where that is a training pass (see ``saves``)."""
    if not saves(module):
        return forward(module, *args, **kwargs)
    with keeper_of(module).active():
        return forward(module, *args, **kwargs)


def keeper_of(module: nn.Module, to_the_end: bool = False) -> Keeper:
    """What decides in a training pass of a lean module what is kept.

    Args:
        module: with a plan or without.
        to_the_end: count bytes also where the plan has nothing left to do.
    """
    plan, seen = plan_in(module), _seen(module)
    if AVAILABLE and plan is not None and plan.reading is not None and seen.as_tried:
        return Reader(seen.tensors, plan.reading, to_the_end, seen.epsilons)
    return Recorder(seen.tensors, plan, to_the_end)


def _recorder(module: nn.Module, plan: Plan | None, to_the_end: bool) -> Keeper:
    return Recorder(_seen(module).tensors, plan, to_the_end)


def _reader(module: nn.Module, plan: Plan | None, to_the_end: bool) -> Keeper:
    seen = _seen(module)
    return Reader(seen.tensors, plan, to_the_end, seen.epsilons)


@dataclass
class _Seen:
    """What a look at all of a network finds, before each forward pass: one look, it takes a millisecond or two.

    Attributes:
        tensors: parameters and buffers.
        epsilons: of its norms, by their weights, which several may share.
        as_tried: whether autograd's graph shows what it showed in the trial: of all of the network, without autocast,
            and without hooks, which may write unseen.
    """

    tensors: list[Tensor]
    epsilons: dict[int, tuple[float, ...]]
    as_tried: bool


def _seen(module: nn.Module) -> _Seen:
    seen = _Seen([], {}, not torch._C._is_any_autocast_enabled())
    for part in tree(module):
        seen.as_tried &= part.training and not (part._forward_hooks or part._forward_pre_hooks)
        parameters = [p for p in part._parameters.values() if p is not None]
        seen.as_tried &= all(p.requires_grad and (p.is_cpu or p.is_meta) for p in parameters)
        seen.tensors += parameters
        seen.tensors += [buffer for buffer in part._buffers.values() if buffer is not None]
        weight, eps = part._parameters.get("weight"), vars(part).get("eps", getattr(type(part), "eps", None))
        if weight is not None and isinstance(eps, (int, float)):
            seen.epsilons[id(weight)] = (*seen.epsilons.get(id(weight), ()), float(eps))
    return seen


def _reduce(self: Any, protocol: Any) -> Any:
    """Copies and pickles name the plain class: the lean one has no place in a module."""
    reduced: Any = object.__reduce_ex__(self, max(2, int(protocol)))
    _, _, *rest = reduced
    return _revived, (type(self)._plain_class,), *rest


def _revived(kind: Any) -> Any:
    made = _lean_class(kind)
    return made.__new__(made)


def saves(module: nn.Module) -> bool:
    """Whether a call of the module is a training pass that may keep less.

    It is not in evaluation, without gradient, while exported, compiled or transformed (their compilers decide what is
    kept), and where others have a say in what autograd keeps: checkpoints, offloading, a lean network around it.
    """
    return (
        uses_lean_layers()
        and module.training
        and torch.is_grad_enabled()
        and not torch.jit.is_tracing()
        and not active.inside_branch
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        and torch._C._functorch.peek_interpreter_stack() is None
    )
