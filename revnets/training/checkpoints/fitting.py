"""Whether the state of an optimizer, of masks, and of each process fits what a run has, before any of it is loaded.

``torch.optim.Optimizer.load_state_dict`` compares the sizes of groups only: a state of other shapes, or without its
``step``, fails at the first update of the weights, or is quietly wrong.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...sparsity import SparsityController
from ..errors import reason
from .held import OPTIMIZER, WITHOUT_STATE
from .schema import FLAG, NOTHING, TEXT, Array, Either, Items, Kind, Number, expected
from .tree import Mismatch, Path

_RATE = Number(0, 1)
_RANGES: dict[str, Kind] = {
    "lr": Number(0),
    "initial_lr": Number(0),
    "lr_scale": Number(0),
    "weight_decay": Number(0),
    "eps": Number(0),
    "betas": _RATE,
    "momentum": _RATE,
    "dampening": Number(0),
    "alpha": Number(0),
}
_SETTINGS = tuple(name for name in _RANGES if name not in ("lr", "initial_lr"))
_SWITCH = Either((FLAG, NOTHING))
_UNKNOWN = Either((NOTHING, FLAG, Number(finite=False)))  # where the run's own is None, as of `foreach`
_STEP = Number(0)
_KERNELS = ("foreach", "fused")  # how the same is computed; a GPU's state may be gone on from on a CPU


def check_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], path: Path = ("optimizer",)) -> None:
    """Refuse a state that an optimizer cannot go on from.

    What it must hold is found out by a step of an optimizer of the same class, with the options of the state, on zeros
    of the shapes of the parameters.

    Args:
        optimizer: Of the run; it stays as it is.
        state: Of a ``state_dict()``.
        path: Where it lies, for messages.

    Raises:
        Mismatch: Naming the first entry that is odd.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(layer.parameters())
        >>> check_optimizer(optimizer, {**optimizer.state_dict(), "state": {0: {"exp_avg": torch.zeros(1, 2)}}})
        Traceback (most recent call last):
        revnets.training.checkpoints.tree.Mismatch: optimizer.state[0].step is missing, a number of at least 0 was expected
    """  # noqa: E501
    OPTIMIZER.check(state, path)
    groups, own = state["param_groups"], optimizer.param_groups
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in own]:
        raise Mismatch((*path, "param_groups"), "are not of the sizes of this optimizer's")
    for index, (group, like) in enumerate(zip(groups, own, strict=True)):
        options = {name: value for name, value in like.items() if name != "params"}
        check_alike(group, options, (*path, "param_groups", index))
        _check_switches(group, options, (*path, "param_groups", index))
    ids = [number for group in groups for number in group["params"]]
    if len(set(ids)) != len(ids):
        raise Mismatch((*path, "param_groups"), "name a parameter twice, each of them once was expected")
    if stray := [key for key in state["state"] if key not in set(ids)]:
        raise Mismatch((*path, "state", stray[0]), "is of a parameter that is in no group, one of those was expected")
    _check_whole(state, ids, path)
    needed = _needed(optimizer, groups, path)
    parameters = [(place, p) for place, group in enumerate(own) for p in group["params"]]
    for number, (place, parameter) in zip(ids, parameters, strict=True):
        if number in state["state"]:
            entry, like = state["state"][number], needed.get(_signature(place, parameter), {})
            _check_entry(entry, like, parameter, (*path, "state", number))


def _check_whole(state: Mapping[str, Any], ids: Sequence[int], path: Path) -> None:
    """Refuse a state that has entries for others than it says; one that says nothing is torch's own, or an older one.

    A parameter without an entry is one that never got a gradient, or one whose entry was lost: only who wrote it knows.
    """
    if WITHOUT_STATE not in state:
        return
    said = set(state[WITHOUT_STATE])
    if lost := [number for number in ids if number not in state["state"] and number not in said]:
        raise Mismatch((*path, "state", lost[0]), "is missing, what a step has left for this parameter was expected")
    if more := [number for number in ids if number in state["state"] and number in said]:
        raise Mismatch((*path, "state", more[0]), f"is there, and {WITHOUT_STATE} says that it is not")


def complete(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an optimizer to be saved, which says which parameters it has nothing of; see ``check_optimizer``.

    Example:
        >>> used, unused = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.AdamW([used, unused])
        >>> used.square().sum().backward()
        >>> optimizer.step()
        >>> complete(optimizer.state_dict())["without_state"]
        [1]
    """
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    return {**state, WITHOUT_STATE: [number for number in numbers if number not in state["state"]]}


def differences(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], more: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Settings of a run that going on from a state would replace by those of the state, without a word.

    Args:
        optimizer: Of the run, with groups as those of the state; see ``check_optimizer``.
        state: Of a ``state_dict()``.
        more: Further settings to compare, besides weight decay, betas and the like; learning rates are schedules'.

    Returns:
        By name, the state's value and the run's, of the first group where they differ.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> old, new = (torch.optim.SGD(layer.parameters(), 0.1, momentum) for momentum in (0.8, 0.9))
        >>> differences(new, old.state_dict())
        {'momentum': (0.8, 0.9)}
    """
    found: dict[str, tuple[Any, Any]] = {}
    for group, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        for name in (*_SETTINGS, *more):
            if name in group and name in own and _plain(group[name]) != _plain(own[name]):
                found.setdefault(name, (_plain(group[name]), _plain(own[name])))
    return found


def _plain(value: Any) -> Any:
    value = value.tolist() if isinstance(value, Tensor) else value
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def apart(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an optimizer, whose tensors share no memory: updates in place would change two at once.

    Example:
        >>> shared = torch.zeros(2)
        >>> apart({"state": {0: {"a": shared, "b": shared}}})["state"][0]["b"] is shared
        False
    """
    taken: set[int] = set()

    def own(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        memory = value.untyped_storage()
        alone = memory.nbytes() == value.numel() * value.element_size() and memory.data_ptr() not in taken
        taken.add(memory.data_ptr())
        return value if alone else value.clone()

    entries = state["state"].items()
    return {**state, "state": {key: {name: own(value) for name, value in entry.items()} for key, entry in entries}}


def check_sparsity(
    controller: SparsityController, state: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path = ("sparsity",)
) -> None:
    """Refuse a state of masks that a controller cannot go on from.

    Args:
        controller: Of the run.
        state: Of its ``state_dict()``, see ``held.SPARSITY``.
        weights: Of the same checkpoint, with the masks; names are the model's.
        path: Where it lies, for messages.

    Raises:
        Mismatch: An entry is odd.
        ValueError: The layers, the masks or the schedule are others.
    """
    layers, changes = len(controller.layers), len(state["history"]["step"])
    for name in ("exchanged", "changed", "active"):
        shape = tuple(state["history"][name].shape)
        if changes and shape != (changes, layers):
            raise Mismatch((*path, "history", name), f"has shape {shape}, ({changes}, {layers}) was expected")
    Array(shape=tuple(torch.Generator().get_state().shape)).check(state["generator"], (*path, "generator"))
    controller.check_state_dict(state, weights)


def check_buffers(model: nn.Module, values: Mapping[str, Tensor], path: Path) -> None:
    """Refuse running statistics of other shapes than a model's, or of other kinds of numbers.

    Args:
        model: Not wrapped; names that it lacks are passed over.
        values: By name.
        path: Where they lie, for messages.

    Raises:
        Mismatch: Naming the first that is odd.
    """
    for name, buffer in model.named_buffers():
        if name in values:
            _like(buffer, "weights").check(values[name], (*path, name))


def check_finite(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Refuse parameters that are not finite: a training would only leave out updates from there.

    Args:
        model: Not wrapped.
        weights: Names as the model's.
        path: Where they lie, for messages.

    Raises:
        Mismatch: Naming the first.
    """
    for name, _ in model.named_parameters():
        if name in weights:
            Array(finite="all").check(weights[name], (*path, name))


def check_alike(state: Mapping[str, Any], own: Mapping[str, Any], path: Path) -> None:
    """Refuse plain values of other types than one's own: of a group of parameters, of a schedule.

    Args:
        state: By name; names that are not one's own are passed over.
        own: What it is to replace.
        path: Where it lies, for messages.

    Raises:
        Mismatch: Naming the first that is odd.

    Example:
        >>> check_alike({"lr": "fast"}, {"lr": 0.1}, ("groups", 0))
        Traceback (most recent call last):
        revnets.training.checkpoints.tree.Mismatch: groups[0].lr is 'fast', a number of at least 0 was expected
    """
    for name, value in own.items():
        if name in state:
            _option(name, value).check(state[name], (*path, name))


def _check_switches(group: Mapping[str, Any], own: Mapping[str, Any], path: Path) -> None:
    """Refuse switches that are not as in this run: torch takes those of the state, such as ``maximize``, unasked."""
    for name, value in own.items():
        given = group.get(name, value)
        if name in _KERNELS:
            _SWITCH.check(given, (*path, name))
        elif isinstance(value, bool) and bool(given) is not value:
            raise expected((*path, name), given, f"{value}, as in this run,")


def _option(name: str, own: Any) -> Kind:
    """What an option of a group may be, as the run's own is."""
    number = _RANGES.get(name, Number(finite=False))
    if isinstance(own, bool):
        return _SWITCH
    if name == "eps" and isinstance(own, (int, float)) and own > 0:  # 0 divides by 0 where a gradient is 0
        return Number(0, above=True)
    if isinstance(own, (int, float)):
        return number if name in _RANGES else Either((number, NOTHING, FLAG))
    if isinstance(own, Tensor) and own.numel() == 1:
        return Either((number, Array(shape=tuple(own.shape), finite="all")))
    if isinstance(own, (list, tuple)) and all(isinstance(each, (int, float)) for each in own):
        return Items(number, len(own))
    if isinstance(own, (list, tuple)) and all(isinstance(each, str) for each in own):
        return Items(TEXT)
    return TEXT if isinstance(own, str) else _UNKNOWN if own is None else Kind()


def _signature(place: int, parameter: Tensor) -> tuple[Any, ...]:
    return place, tuple(parameter.shape), parameter.dtype


def _needed(
    optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]], path: Path
) -> dict[tuple[Any, ...], dict[str, Any]]:
    """What the state of each kind of parameter holds after a step; nothing where that cannot be tried."""
    own = optimizer.param_groups
    options = [{**theirs, "params": mine["params"]} for mine, theirs in zip(own, groups, strict=True)]
    try:
        return _tried(optimizer, options)
    except Exception as error:  # of any optimizer
        try:
            _tried(optimizer, own)
        except Exception:  # it wants more than gradients, or another device
            return {}
        words = f"are options that {type(optimizer).__name__} does not work with ({reason(error)})"
        raise Mismatch((*path, "param_groups"), words) from error


def _tried(
    optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]]
) -> dict[tuple[Any, ...], dict[str, Any]]:
    base = getattr(optimizer, "_base_optimizer", optimizer)  # timm's Lookahead
    trial: Any = object.__new__(type(base))
    trial.__dict__.update({name: value for name, value in vars(base).items() if name != "step"})  # patched by schedules
    for name in vars(base):
        if name.endswith("_hooks"):
            trial.__dict__[name] = collections.OrderedDict()
    trial.state, trial.param_groups = collections.defaultdict(dict), []
    kinds: dict[tuple[Any, ...], Tensor] = {}
    for place, group in enumerate(groups):
        fresh = {_signature(place, p): p for p in group["params"]}
        for signature, parameter in fresh.items():
            zeros = torch.zeros(parameter.shape, dtype=parameter.dtype, requires_grad=True)
            zeros.grad = torch.zeros_like(zeros)
            kinds[signature] = zeros
        away = any(p.device.type != "cpu" for p in group["params"])  # and zeros are on the CPU
        here = {"capturable": False, "fused": None, "foreach": None} if away else {}
        trial.param_groups.append(
            {**group, **{k: v for k, v in here.items() if k in group}, "params": [kinds[s] for s in fresh]}
        )
    trial.__setstate__({"state": trial.state, "param_groups": trial.param_groups})  # adds what older files lack
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        trial.step()
    return {signature: dict(trial.state.get(zeros, {})) for signature, zeros in kinds.items()}


def _check_entry(entry: Mapping[str, Any], needed: Mapping[str, Any], parameter: Tensor, path: Path) -> None:
    for name, like in needed.items():
        kind = _value(name, like)
        if name not in entry:
            raise Mismatch((*path, name), f"is missing, {kind.words} was expected")
        _check_value(entry[name], kind, name, (*path, name))
    shapes = ((), (1,), tuple(parameter.shape))
    for name, value in entry.items():
        if name in needed:
            continue
        if name == "step":
            _check_value(value, _value(name, 0), name, (*path, name))
        elif isinstance(value, Tensor) and needed and tuple(value.shape) not in shapes:
            raise expected((*path, name), value, f"a tensor of shape {shapes[-1]}")
        elif isinstance(value, Tensor):
            Array(finite="all").check(value, (*path, name))


def _value(name: str, like: Any) -> Kind:
    if isinstance(like, Tensor):
        return _like(like, "all") if like.numel() > 1 or like.dim() else _STEP if name == "step" else Number()
    if isinstance(like, (int, float)) and not isinstance(like, bool):
        return _STEP if name == "step" else Number()
    return Kind()


def _check_value(value: Any, kind: Kind, name: str, path: Path) -> None:
    """One entry; a number may also be a tensor of one, as optimizers of several versions have it."""
    if isinstance(kind, Number) and isinstance(value, Tensor):
        Array(shape=() if value.dim() == 0 else (1,)).check(value, path)
        if value.dtype == torch.bool or value.is_complex():
            raise expected(path, value, kind.words)
        value = value.item()
    kind.check(value, path)
    if isinstance(value, Tensor) and name.endswith("_sq") and value.numel() and bool((value < 0).any()):
        raise Mismatch(path, "holds negative numbers, squares were expected")


def _like(tensor: Tensor, finite: str) -> Array:
    kind = "floating" if tensor.is_floating_point() else "bool" if tensor.dtype == torch.bool else "whole"
    return Array(tuple(tensor.shape), "any" if tensor.is_complex() else kind, finite)
