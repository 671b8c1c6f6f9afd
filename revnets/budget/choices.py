"""How the blocks of a network keep what their backward pass needs: stored, lean, checkpointed, offloaded."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..layers.lean.keeper import paused
from ..layers.lean.network import call_lean, is_lean, put_plan
from ..layers.lean.share import Plan as LeanPlan
from ..profiling.compiled import backend_of
from ..profiling.fake import ProfileError
from ..reversible import MODES, set_mode
from ..reversible.mode import recompute

CHOICES = ("store", "lean", "checkpoint", "offload")
"""``store``: autograd keeps what it needs. ``lean``: what is cheap to compute again is not kept (see ``layers.lean``).
``checkpoint``: the inputs are kept, all else is computed again. ``offload``: what autograd needs waits in the CPU's
memory, for networks on accelerators. Same function, gradients and running statistics in all of them.

``compile:SHARE`` (such as ``compile:0.5``) is one more: torch's compiler makes the kernels, and decides what to keep
within its ``activation_memory_budget``; numbers are rounded elsewhere, and random ones are others.
"""

_COMPILED = re.compile(r"compile:([0-9]+(?:\.[0-9]+)?)")
_SLICE = re.compile(r"(?P<module>.*)\[(?P<first>\d+):(?P<stop>\d+)\]", re.DOTALL)


class BudgetError(ProfileError):
    """A network that no plan can be made for, or that a plan is not for; the message is one sentence."""


@dataclass
class How:
    """What a module does in training passes.

    Attributes:
        choice: of the module as a whole (see ``CHOICES``), or None.
        slices: of an ``nn.Sequential``: its children from, and up to, that are checkpointed as one.
    """

    choice: str | None = None
    slices: tuple[tuple[int, int], ...] = ()


def apply_choices(model: nn.Module, choices: Mapping[str, str], mode: str | None = None, reads: bool = False) -> None:
    """Let the blocks of a network do as chosen, in place; all are checked before the first is changed.

    Args:
        model: not wrapped, not compiled, without choices.
        choices: by the name of a module, or of a run of a Sequential's children, such as ``layer1[0:2]``, which can be
            checkpointed only; ``""`` is the network itself.
        mode: of its reversible parts, if it has any.
        reads: whether lean blocks read their recipes from autograd's graph (see ``layers.lean.network.reads``).

    Raises:
        BudgetError: for a network that lacks such a block, or cannot be changed.
    """
    check_changeable(model)
    found: dict[nn.Module, How] = {}
    for name, choice in choices.items():
        check_choice(name, choice)
        module, run = find_block(model, name)
        how = found.setdefault(module, How())
        if run is None:
            how.choice = choice
        elif choice == "checkpoint":
            how.slices = tuple(sorted((*how.slices, run)))
        else:
            raise BudgetError(f"block {name!r}: a run of blocks can be checkpointed as one, and nothing else")
    if mode is not None:
        set_mode(model, mode)
    for module, how in found.items():
        kind: Any = type(module)
        module.__class__ = _planned_class(kind)
        module.__dict__["_budget"] = how
        put_plan(module, LeanPlan(reading=LeanPlan()) if reads and how.choice == "lean" else None)


def check_choice(name: str, choice: str) -> None:
    """Refuse what is no choice for a block.

    Raises:
        BudgetError: for an unknown one.
    """
    if choice not in CHOICES and share_of(choice) is None:
        known = ", ".join((*CHOICES, "compile:SHARE with a share from 0 to 1"))
        raise BudgetError(f"block {name!r}: unknown choice {choice!r}, expected one of {known}")


def share_of(choice: str | None) -> float | None:
    """The share that torch's compiler may keep, of a choice that is its; None of others.

    Example:
        >>> share_of("compile:0.5"), share_of("lean"), share_of("compile:2")
        (0.5, None, None)
    """
    match = _COMPILED.fullmatch(choice or "")
    return float(match[1]) if match and float(match[1]) <= 1 else None


def remove_choices(model: nn.Module) -> bool:
    """Make the blocks of a network plain again, in place; whether there was a choice."""
    planned = [module for module in model.modules() if is_planned(module)]
    for module in planned:
        module.__class__ = vars(type(module))["_unplanned_class"]
        module.__dict__.pop("_budget", None)
        put_plan(module, None)
    return bool(planned)


def is_planned(module: nn.Module) -> bool:
    """Whether a choice was made for this very module."""
    return "_unplanned_class" in vars(type(module))


def modes_of(model: nn.Module) -> list[str]:
    """The memory modes of its reversible or recomputed parts, in order; none for most networks."""
    return [vars(m)["mode"] for m in model.modules() if vars(m).get("mode") in MODES]


def put_modes(model: nn.Module, modes: list[str]) -> None:
    """Undo ``set_mode``: the modes that ``modes_of`` found."""
    parts = [m for m in model.modules() if vars(m).get("mode") in MODES]
    for part, mode in zip(parts, modes, strict=True):
        vars(part)["mode"] = mode


def find_block(model: nn.Module, name: str) -> tuple[nn.Module, tuple[int, int] | None]:
    """The module of a name, and which run of its children is meant, if one is.

    Raises:
        BudgetError: where there is no such block.
    """
    match = _SLICE.fullmatch(name)
    path = match["module"] if match else name
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise BudgetError(
            f"{type(model).__name__} has no block {path!r}: the plan is for another network, make one for this"
        ) from None
    if match is None:
        return module, None
    first, stop = int(match["first"]), int(match["stop"])
    if not is_chain(module) or not first < stop <= len(module._modules):
        raise BudgetError(f"{type(model).__name__} has no blocks {name!r} in a row: the plan is for another network")
    return module, (first, stop)


def is_chain(module: nn.Module) -> bool:
    """Whether a module does no more than to call its children in a row."""
    kind = vars(type(module)).get("_unplanned_class", type(module))
    return isinstance(module, nn.Sequential) and kind.forward is nn.Sequential.forward


def can_be_planned(module: nn.Module) -> bool:
    """Whether a choice can be made for a module: its forward is that of its class."""
    return "forward" not in vars(module) and not isinstance(module, torch.jit.ScriptModule)


def check_changeable(model: nn.Module) -> None:
    """Refuse what is no plain network any more.

    Raises:
        BudgetError: for a wrapped, compiled or lean one.
    """
    kind = type(model).__name__
    if isinstance(model, (DistributedDataParallel, DataParallel)):
        raise BudgetError(f"{kind} wraps the network: fit model.module before it is wrapped")
    for name, module in model.named_modules():
        place = f"its part {name!r}" if name else "it"
        if isinstance(module, torch._dynamo.eval_frame.OptimizedModule) or _is_compiled(module):
            raise BudgetError(f"{kind}: {place} is compiled: fit the network before torch.compile")
        if isinstance(module, torch.jit.ScriptModule):
            raise BudgetError(
                f"{kind}: {place} is a TorchScript module, whose memory cannot be planned: fit the source"
            )
        if is_lean(module):
            raise BudgetError(f"{kind}: {place} is lean already: fit the network as it was, lean is one of the choices")
        if getattr(module, "grad_checkpointing", False) is True:
            raise BudgetError(
                f"{kind}: {place} is checkpointed by its own means: call set_grad_checkpointing(False), "
                "checkpoints are among the choices"
            )


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None


# --- how it is done --------------------------------------------------------------------------------------------------


@functools.cache
def _planned_class(kind: Any) -> Any:
    """The class with a forward that does as its instance's ``_budget`` says."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        how = vars(self).get("_budget")
        if how is None or not self.training or not torch.is_grad_enabled():
            return kind.forward(self, *args, **kwargs)
        run = _run_slices if how.slices else kind.forward
        return _WAYS.get(how.choice, _compiled)(self, run, args, kwargs)

    body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    body |= {"forward": forward, "_unplanned_class": kind}
    if kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__:
        body["__reduce_ex__"] = _reduce
    return type(kind.__name__, (kind,), body)


def _reduce(self: Any, protocol: Any) -> Any:
    """Copies and pickles name the plain class: the planned one has no place in a module."""
    reduced: Any = object.__reduce_ex__(self, max(2, int(protocol)))
    _, _, *rest = reduced
    return _revived, (type(self)._unplanned_class,), *rest


def _revived(kind: Any) -> Any:
    made = _planned_class(kind)
    return made.__new__(made)


def _plainly(module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
    return forward(module, *args, **kwargs)


def _stored(module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
    with paused():
        return forward(module, *args, **kwargs)


def _lean(module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
    return call_lean(module, forward, *args, **kwargs)


def _checkpointed(module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
    return recompute(_Again(module, forward, args, kwargs), *_tensors(args, kwargs))


def _offloaded(module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
    with paused(), _on_cpu(module):
        return forward(module, *args, **kwargs)


def _compiled(module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
    dynamo: Any = torch._dynamo
    with paused(), dynamo.config.patch(**_COMPILING):
        try:
            return _compiled_forward(forward, share_of(vars(module)["_budget"].choice))(module, *args, **kwargs)
        except dynamo.exc.FailOnRecompileLimitHit as error:
            raise BudgetError(
                f"{type(module).__name__} was compiled {_COMPILING['recompile_limit']} times, for as many sizes of "
                "batch or image: its plan is for one, so keep to it (drop_last=True), or make a plan without compile"
            ) from error


_COMPILING = {
    "recompile_limit": 64,
    "accumulated_recompile_limit": 4096,
    "fail_on_recompile_limit_hit": True,
    "optimize_ddp": False,
}
"""Of dynamo: networks of one class share its limit, beyond which it would run them plain, without a word; and DDP would
have graphs in pieces, of each of which a share is kept."""


@functools.cache
def _compiled_forward(forward: Any, share: float) -> Any:
    return torch.compile(forward, backend=backend_of(share), dynamic=False)


_WAYS: dict[str | None, Any] = {
    None: _plainly,
    "store": _stored,
    "lean": _lean,
    "checkpoint": _checkpointed,
    "offload": _offloaded,
}


def _run_slices(module: nn.Module, x: Any) -> Any:
    """The children of a Sequential, runs of them as one checkpoint."""
    children = list(module._modules.values())
    place = 0
    for first, stop in (*vars(module)["_budget"].slices, (len(children), len(children))):
        for child in children[place:first]:
            x = child(x)  # type: ignore[misc]
        if first < stop:
            run = nn.Sequential(*children[first:stop])  # type: ignore[arg-type]
            x = _checkpointed(run, nn.Sequential.forward, (x,), {})
        place = stop
    return x


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]


class _Again:
    """A call of a module as a function of the tensors among its arguments, which can be repeated.

    Containers are made anew for each call: some modules change lists that they are given.
    """

    def __init__(self, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> None:
        self.__self__ = module  # whose statistics may move once only
        self.forward = forward
        leaves, self.spec = tree_flatten((args, kwargs))
        self.rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def __call__(self, *tensors: Tensor) -> Any:
        leaves = list(self.rest)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        with paused():
            return self.forward(self.__self__, *args, **kwargs)


@contextmanager
def _on_cpu(module: nn.Module) -> Iterator[None]:
    """``save_on_cpu`` for all but the module's parameters and buffers, which stay where they are anyway."""
    own = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    hooks = torch.autograd.graph.save_on_cpu(pin_memory=True)
    pack, unpack = hooks.pack_hook, hooks.unpack_hook

    def kept(tensor: Tensor) -> Any:
        stays = tensor.device.type == "cpu" or tensor.untyped_storage()._cdata in own
        return tensor if stays else pack(tensor)

    def given(packed: Any) -> Tensor:
        found: Tensor = packed if isinstance(packed, Tensor) else unpack(packed)
        return found

    with torch.autograd.graph.saved_tensors_hooks(kept, given):
        yield
