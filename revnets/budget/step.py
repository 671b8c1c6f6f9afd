"""The training step that is planned: a copy of the network without memory, on which choices are tried."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..layers.lean.network import reads
from ..profiling.fake import ProfileError
from ..profiling.memory import tensors_of
from ..profiling.predict import StepPrediction, predict_training_step, trace_training_step
from ..profiling.target import Setting, training_loss
from ..training.errors import reason, refused, shown
from ..training.options.values import COUNT
from .choices import BudgetError, apply_choices, check_changeable, modes_of, remove_choices
from .watch import Watch

AMP = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16}
"""Names of the types that autocast may go to."""

CPU_RESERVE, THREAD_RESERVE, MOST_RESERVE = 0.006, 0.003, 0.05
OTHER_RESERVE = 0.02
"""Share of a budget that is left for what predictions miss. On a CPU most are right to the byte on one thread and two;
where the optimizer's step is the peak, its temporaries are up to 0.5% more. Each further thread may sum up gradients of
small weights in memory of its own: 2% of a step of MobileNetV3 on eight. On accelerators none has been checked."""

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def reserve(device: torch.device) -> float:
    """Share of a budget that plans leave unused on a device."""
    if device.type != "cpu":
        return OTHER_RESERVE
    return min(CPU_RESERVE + THREAD_RESERVE * (torch.get_num_threads() - 1), MOST_RESERVE)


class Step:
    """One training step of a network, to be traced with different choices; the network is left as it is.

    Args:
        model: neither wrapped nor compiled.
        inputs: what it takes: a tensor (of any device), a tuple or a mapping of them.
        amp_dtype: that it is autocast to, or None.
        optimizer: see ``fit``.
        loss_fn: from its output to a scalar.
        device: to plan for.

    Raises:
        BudgetError: for a network that no plan can be made for.
        ProfileError: for settings that do not exist.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        amp_dtype: torch.dtype | str | None = None,
        optimizer: Any = None,
        loss_fn: Callable[[Any], Tensor] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise BudgetError(f"model={type(model).__name__}: expected an nn.Module")
        check_changeable(model)
        self.title = type(model).__name__
        self.inputs = inputs
        self.amp_dtype = as_amp_dtype(amp_dtype)
        self.optimizer = _maker(optimizer)
        self.loss_fn = loss_fn or training_loss
        self.device = torch.device(device) if device is not None else device_of(model)
        try:
            self.network = _without_memory(model)
        except Exception as error:  # whatever its parts may raise
            raise BudgetError(f"{self.title} cannot be planned, no copy of it can be made: {reason(error)}") from error
        remove_choices(self.network)
        if self.amp_dtype is not None:
            _autocast(self.network, self.device.type, self.amp_dtype)
        self.has_modes = bool(modes_of(self.network))

    def predicted(self, choices: Mapping[str, str], mode: str | None = None, inputs: Any = None) -> StepPrediction:
        """The step with these choices (and mode of the reversible parts), exactly; on other inputs, if there are."""
        with self._explained(), self._applied(choices, mode) as network:
            x = self.inputs if inputs is None else inputs
            return predict_training_step(network, x, self.loss_fn, self.optimizer, self.device)

    def watched(self, choices: Mapping[str, str], mode: str | None = None) -> Watch:
        """The trace of the step with these choices."""
        with self._explained(), self._applied(choices, mode) as network:
            return trace_training_step(network, self.inputs, self.loss_fn, self.optimizer, self.device, Watch)

    @functools.cached_property
    def reads(self) -> bool:
        """Whether lean blocks may read their recipes from autograd's graph."""
        if self.device.type != "cpu" or self.amp_dtype is not None:
            return False
        x = tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), self.inputs)
        args, kwargs = ((), x) if isinstance(x, Mapping) else (x if isinstance(x, (tuple, list)) else (x,), {})
        return reads(self.network, args, kwargs)

    @contextmanager
    def _applied(self, choices: Mapping[str, str], mode: str | None) -> Iterator[nn.Module]:
        """The network with choices, for a while."""
        reads = "lean" in choices.values() and self.reads
        try:
            apply_choices(self.network, choices, mode, reads)
            yield self.network
        finally:
            remove_choices(self.network)

    def _explained(self) -> Any:
        return _Explained(f"{self.title} on {described(self.inputs)}")


class _Explained:
    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, ProfileError) and not isinstance(error, BudgetError):
            raise BudgetError(f"{self.what} cannot be traced, so no plan can be made: {error}") from error


def described(inputs: Any) -> str:
    """Inputs in words."""
    shapes = [tuple(t.shape) for t in tensors_of(inputs)]
    return f"an input of shape {shapes[0]}" if len(shapes) == 1 else f"inputs of shapes {shapes}"


def make_inputs(model: nn.Module, input_size: Sequence[int], batch_size: int) -> Tensor:
    """A batch without memory, in the memory layout of the network's weights.

    Raises:
        BudgetError: for sizes that are none.
    """
    try:
        sizes = [COUNT.check("input_size", size) for size in input_size]
        COUNT.check("batch_size", batch_size)
    except (ValueError, TypeError) as error:
        raise BudgetError(f"input_size={shown(input_size)}, batch_size={shown(batch_size)}: {reason(error)}") from None
    if not sizes:
        raise BudgetError("input_size=(): expected the size of one example, such as (3, 224, 224)")
    x = torch.empty(batch_size, *input_size, device="meta")
    last = any(
        p.ndim == 4 and min(p.shape[1:]) > 1 and p.is_contiguous(memory_format=torch.channels_last)
        for p in model.parameters()
    )
    return x.to(memory_format=torch.channels_last) if last and x.ndim == 4 else x


def layout_of(x: Tensor) -> torch.memory_format:
    """Memory layout of images; contiguous for everything else."""
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def as_amp_dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    """The type that a name stands for.

    Raises:
        BudgetError: for another one.
    """
    if given is None or given in AMP.values():
        return given  # type: ignore[return-value]
    if given not in AMP:
        raise BudgetError(f"unknown amp_dtype {shown(given)}: expected {', '.join(AMP)}, or None")
    return AMP[given]


def device_of(model: nn.Module) -> torch.device:
    """Where a network is; the CPU for one without memory, or without parameters."""
    found = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.device("cpu") if found.type == "meta" else found


def _maker(optimizer: Any) -> MakeOptimizer | None:
    """A function that makes the optimizer for a network."""
    if optimizer is None:
        return None
    if isinstance(optimizer, str):
        return Setting(optimizer=optimizer).make_optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        return functools.partial(_like, optimizer)
    if callable(optimizer):
        found: MakeOptimizer = optimizer
        return found
    raise BudgetError(
        f"optimizer={type(optimizer).__name__}: expected a name of timm's, an optimizer, or what makes one"
    )


def _like(optimizer: torch.optim.Optimizer, network: nn.Module) -> torch.optim.Optimizer:
    """An optimizer of the same kind for another network."""
    kind: Any = type(optimizer)
    known = inspect.signature(kind).parameters
    settings = {name: value for name, value in optimizer.defaults.items() if name in known}
    with refused(f"no second {kind.__name__} can be made", "give its name", kind=BudgetError):
        made: torch.optim.Optimizer = kind([p for p in network.parameters() if p.requires_grad], **settings)
    return made


def _without_memory(model: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        with torch.no_grad():
            twin: Tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
    network = copy.deepcopy(model, memo)
    if not network.training:
        network.train()
    return network


def _autocast(network: nn.Module, device_type: str, dtype: torch.dtype) -> None:
    """Let a network run under autocast, as its training will have it."""
    kind: Any = type(network)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device_type, dtype=dtype):
            return kind.forward(self, *args, **kwargs)

    network.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
