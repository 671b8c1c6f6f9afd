"""``lean``: any network that keeps less for its backward pass, by the recorder of ``keeping``."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ...reversible.replay import active, tree
from ..registry import LayerConfig, register_layer
from ..trace import meta_twin
from .keeping import Recorder
from .norm_act import uses_lean_layers


@register_layer("lean", network=True, whole=True, keeps_weights=True)
def lean(job: Any, config: LayerConfig) -> nn.Module:
    """Any network as it is, which in training computes norms, activations and sums again instead of keeping them."""
    from ..convert import Converted, Skipped

    model: nn.Module = job.model
    if isinstance(model, (DistributedDataParallel, DataParallel, torch.jit.ScriptModule, _compiled_class())):
        raise ValueError(f"lean: {type(model).__name__} wraps or replaces the network: convert it before")
    found = kept_per_image(model, job.input_size)
    for name, part in _parts(model, set(job.names)):
        reason = _reason_to_keep(part, found)
        if reason is None:
            make_lean(part)
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


# --- what it saves ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """Bytes per image that a training pass keeps for its backward pass, with torch's own means and lean."""

    plain: float
    lean: float

    def __str__(self) -> str:
        share = self.lean / self.plain if self.plain else 1.0
        lean, plain = f"{self.lean / 1e6:.2f}", f"{self.plain / 1e6:.2f}"
        return f"keeps {lean} MB per image for the backward pass, plain {plain} ({share:.2f})"


def kept_per_image(model: nn.Module, input_size: tuple[int, ...], batch_size: int = 2) -> Kept | None:
    """What a training pass would keep, found on tensors without memory; None where it cannot be told.

    Args:
        model: on any device, in any mode; it is left as it is.
        input_size: of one example.
        batch_size: of the pass that is tried.

    Example:
        >>> kept_per_image(nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 8)), (512,))
        Kept(plain=6144.0, lean=4096.0)
    """
    try:
        twin = meta_twin(model)
        twin.train()
        dtype = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.float32)
        x = torch.empty(batch_size, *input_size, device="meta", dtype=dtype)
        with torch.enable_grad(), Recorder(_tensors_of(twin)).active() as recorder:
            _plain(twin)(twin, x)
    except Exception:  # whatever a model may raise: this is a forecast only
        return None
    return Kept(recorder.asked / batch_size, recorder.kept / batch_size)


# --- how it is done --------------------------------------------------------------------------------------------------


def make_lean(module: nn.Module) -> nn.Module:
    """Let ``module(...)`` keep less in training, in place; its class becomes a subclass that differs in ``forward``.

    Example:
        >>> net = make_lean(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3)))
        >>> is_lean(net), isinstance(net, nn.Sequential), list(net.state_dict())[:2]
        (True, True, ['0.weight', '0.bias'])
    """
    if not is_lean(module):
        kind: Any = type(module)
        module.__class__ = _lean_class(kind)
    return module


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
    with Recorder(_tensors_of(module)).active():
        return forward(module, *args, **kwargs)


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


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Its parameters and buffers."""
    for part in tree(module):
        for tensors in (part._parameters, part._buffers):
            yield from (tensor for tensor in tensors.values() if tensor is not None)
