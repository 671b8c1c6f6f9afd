"""What must be the same when a branch is computed a second time: randomness, precision, statistics.

``Recorder`` runs branches in the forward pass and notes, per branch, the generator state it consumed (nothing if it
consumed none) and the small tensors that layers asked to keep with ``once``. ``replaying`` puts all of it back.
"""

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .call import call
from .draws import DrawnAgain, Draws
from .errors import ReversibleError
from .hooks import HookLog, hooks_again, hooks_noted


class _Active(threading.local):
    """What is going on in this thread (the backward pass of an accelerator runs in a thread of its own)."""

    runner: "Runner | None" = None
    record: "BranchRecord | None" = None  # where `once` appends (recording) ...
    playback: "Iterator[Any] | None" = None  # ... or reads (replaying)
    guards: "list[Any] | None" = None  # where exact mode's guards wait to be looked at together
    captured: bool = False  # for a CUDA graph: nothing may ask the device, or a generator, for a value
    in_stack: bool = False  # a RevSequential is training: its ops round, whatever their own train/eval flag

    @property
    def inside_branch(self) -> bool:
        """Whether a branch is being recorded or replayed: what happens inside is that branch's own affair."""
        return self.record is not None or self.playback is not None


active = _Active()


class Runner:
    """How an op's branches are run: plainly, recorded, or replayed. See ``ReversibleOp.branch``."""

    keeps = False
    """Whether what an op hands to ``keep`` is looked at: in the forward pass of a step only."""

    def run(self, key: Hashable, module: Callable[..., Tensor], *xs: Tensor) -> Tensor:
        """Compute ``module(*xs)`` for the branch called ``key``."""
        raise NotImplementedError

    def keep(self, key: Hashable, value: Any) -> None:
        """Note ``value``, without which an op cannot be undone from its outputs."""

    def kept(self, key: Hashable) -> Any:
        """What was noted in the forward pass; None where none is remembered."""
        return None


@contextmanager
def activated(**changes: Any) -> Iterator[None]:
    """Set attributes of ``active`` for a block, and put the former ones back."""
    former = {name: getattr(active, name) for name in changes}
    for name, value in changes.items():
        setattr(active, name, value)
    try:
        yield
    finally:
        for name, value in former.items():
            setattr(active, name, value)


def once(compute: Callable[[], Any], owner: nn.Module | None = None) -> Any:
    """Compute a small value in the forward pass and reuse it when the branch is recomputed.

    For layers with statistics: batch means and variances are computed (and running ones updated) exactly once per
    step, and the recomputation is cheaper than the forward pass. Outside the engine it just calls ``compute``.

    Args:
        compute: returns tensors without gradient, small against activations.
        owner: the norm whose running statistics ``compute`` moves, if any: the engine then need not protect them.

    Example:
        >>> once(lambda: torch.ones(2))
        tensor([1., 1.])
    """
    if active.playback is not None:
        return next(active.playback)
    value = compute()
    if active.record is not None:
        active.record.kept.append(value)
        if owner is not None:
            active.record.owners.add(id(owner))
    return value


def is_recomputed() -> bool:
    """Whether a branch is running of which nothing is kept until it is computed again: it may be that time now."""
    return active.inside_branch


# --- generators ------------------------------------------------------------------------------------------------------

_RngState = dict[torch.device, Tensor]
_CPU = torch.device("cpu")


def _rng_state(devices: frozenset[torch.device]) -> _RngState:
    state = {_CPU: torch.get_rng_state()}
    for device in devices - {_CPU}:
        state[device] = torch.get_device_module(device).get_rng_state(device)
    return state


def _set_rng_state(state: _RngState) -> None:
    for device, value in state.items():
        if device == _CPU:
            torch.set_rng_state(value)
        else:
            torch.get_device_module(device).set_rng_state(value, device)


def _devices(tensors: tuple[Tensor, ...]) -> frozenset[torch.device]:
    """Devices with a generator of their own; fake and meta tensors have none."""
    return frozenset(t.device for t in tensors if t.device.type != "meta" and not is_fake(t))


def is_fake(x: Tensor) -> bool:
    """Whether ``x`` has a shape but no values (``FakeTensorMode``), so that nothing may depend on them."""
    return isinstance(x, torch._subclasses.fake_tensor.FakeTensor)


@contextmanager
def _rng_replayed(state: _RngState | None) -> Iterator[None]:
    if state is None:
        yield
        return
    now = _rng_state(frozenset(state))
    _set_rng_state(state)
    try:
        yield
    finally:
        _set_rng_state(now)


@contextmanager
def generators_kept(*xs: Tensor) -> Iterator[None]:
    """Leave the generators of the inputs' devices as they were, whatever the code inside draws."""
    with _rng_replayed(_rng_state(_devices(xs))):
        yield


# --- precision -------------------------------------------------------------------------------------------------------


class Precision:
    """The autocast state at construction, to be entered again in the backward pass.

    The cast cache is off inside: a cached cast made without gradient would cut the recomputed graph from its weights.
    """

    def __init__(self, *device_types: str) -> None:
        self.states = [
            (d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d))
            for d in sorted({"cpu", *device_types})
            if torch.amp.is_autocast_available(d)
        ]

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Enter the remembered state."""
        with ExitStack() as stack:
            for device_type, enabled, dtype in self.states:
                if enabled or torch.is_autocast_enabled(device_type):
                    stack.enter_context(torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield


@contextmanager
def autocast_cache_off() -> Iterator[None]:
    """Keep casts made without gradient out of autocast's cache, where a later differentiable use would find them."""
    former = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(former)


# --- statistics ------------------------------------------------------------------------------------------------------


def tree(module: Any) -> list[nn.Module]:
    """The module and all modules in it; quicker than ``module.modules()``, and empty for a plain function."""
    found: dict[int, nn.Module] = {}
    stack: list[nn.Module | None] = [module] if isinstance(module, nn.Module) else []
    while stack:
        current = stack.pop()
        if current is not None and id(current) not in found:
            found[id(current)] = current
            stack.extend(current._modules.values())
            lent = vars(current).get("lent")
            if lent is not None:
                stack.append(lent.module)
    return list(found.values())


class Lent:
    """A module that an op runs as its branch while another module owns it: its weights have that one's names.

    It is looked up at each use: what takes the place of the module there, takes it here.

    Args:
        owner: of the module.
        name: of the module in it.

    Example:
        >>> Lent(nn.Sequential(nn.ReLU()), "0").module
        ReLU()
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.owner = owner
        self.name = name

    @property
    def module(self) -> nn.Module:
        """What the owner has under the name now."""
        module = self.owner._modules[self.name]
        if module is None:
            raise ReversibleError(f"{type(self.owner).__name__} has no {self.name} any more, which an op was lent")
        return module


def parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """All parameters once; quicker than ``module.parameters()``."""
    return list({id(p): p for m in tree(module) for p in m._parameters.values() if p is not None}.values())


@contextmanager
def frozen_statistics(modules: list[nn.Module], owners: set[int] | frozenset[int] = frozenset()) -> Iterator[None]:
    """Stop running statistics (BatchNorm, SyncBatchNorm, InstanceNorm) from being updated a second time.

    Args:
        modules: where to look, see ``tree``.
        owners: identities of norms that see to it themselves, through ``once``.
    """
    norms = [
        m for m in modules if isinstance(m, _NormBase) and m.training and m.track_running_stats and id(m) not in owners
    ]
    buffers = [norm._buffers for norm in norms]
    for norm in norms:  # scratch copies take the update; they are small, one value per channel
        norm._buffers = {name: b if b is None else b.clone() for name, b in norm._buffers.items()}
    try:
        yield
    finally:
        for norm, own in zip(norms, buffers, strict=True):
            norm._buffers = own


def _small_state(modules: list[nn.Module]) -> list[tuple[nn.Module, str, Tensor]]:
    """Buffers that a forward pass may move besides those of norms: spectral norm's vectors, an observer's range."""
    return [
        (m, name, b)
        for m in modules
        if m._buffers and m.training and not isinstance(m, _NormBase)
        for name, b in m._buffers.items()
        if b is not None and b.dim() <= 1 and b.dtype != torch.bool
    ]


@contextmanager
def _former_state(state: list[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    """Start from these buffers again, and leave those of now as they are."""
    own = [(m, m._buffers) for m in dict.fromkeys(m for m, _, _ in state)]
    for module, buffers in own:
        module._buffers = dict(buffers)
    for module, name, former in state:
        module._buffers[name] = former.clone()
    try:
        yield
    finally:
        for module, buffers in own:
            module._buffers = buffers


# --- recording and replaying -----------------------------------------------------------------------------------------


@dataclass
class BranchRecord:
    """What one branch call needs to be repeated to the bit: a few small tensors, no activation."""

    kept: list[Any] = field(default_factory=list)
    owners: set[int] = field(default_factory=set)
    rng: _RngState | None = None
    draws: list[Any] | None = None  # instead of ``rng`` where a CUDA graph is captured
    side: bool = False  # no branch: what an op handed to ``keep``, for autograd to hold and to free
    hooks: HookLog = field(default_factory=HookLog)
    state: list[tuple[nn.Module, str, Tensor]] = field(default_factory=list)  # buffers that it moved, as they were


@contextmanager
def recording(record: BranchRecord, modules: list[nn.Module], *xs: Tensor) -> Iterator[None]:
    """Note in ``record`` what the code inside consumes. Costs microseconds; free of memory where nothing is random."""
    buffers = [(m, name, b, b._version, b.clone()) for m, name, b in _small_state(modules)]
    with activated(runner=None, record=record, playback=None), _consumption(record, modules, xs):
        yield
    record.state = [
        (m, name, former)
        for m, name, b, version, former in buffers
        if m._buffers.get(name) is not b or b._version != version
    ]


@contextmanager
def _consumption(record: BranchRecord, modules: list[nn.Module], xs: tuple[Tensor, ...]) -> Iterator[None]:
    if active.captured:
        record.draws = []
        with Draws(record.draws), hooks_noted(modules, dict) as record.hooks:
            yield
        return
    devices = _devices(xs)
    known = not any(is_fake(x) for x in xs)  # fake tensors draw nothing
    before = _rng_state(devices) if known else {}
    with hooks_noted(modules, (lambda: _rng_state(devices)) if known else dict) as record.hooks:
        yield
    after = _rng_state(devices) if known else {}
    if any(before[d].numpy().tobytes() != after[d].numpy().tobytes() for d in before):  # `equal` would be a launch
        record.rng = before


@contextmanager
def replaying(record: BranchRecord, modules: list[nn.Module]) -> Iterator[None]:
    """Run the code inside with the randomness and the ``once`` values of ``record``, statistics untouched."""
    kept = record.draws
    with (
        _rng_replayed(record.rng) if kept is None else DrawnAgain(kept),
        frozen_statistics(modules, record.owners),
        _former_state(record.state),
        hooks_again(modules, record.hooks),
        activated(runner=None, record=None, playback=iter(record.kept), captured=kept is not None),
    ):
        yield


class Recorder(Runner):
    """Runs branches in the forward pass and keeps one ``BranchRecord`` per branch."""

    keeps = True

    def __init__(self) -> None:
        self.records: dict[Hashable, BranchRecord] = {}

    def run(self, key: Hashable, module: Callable[..., Tensor], *xs: Tensor) -> Tensor:
        if key in self.records:
            raise ReversibleError(
                f"branch {key[-1] if isinstance(key, tuple) else key!r} is run twice in one forward "
                "call of its op: give each call a key of its own, and each place an op of its own"
            )
        record = self.records[key] = BranchRecord()
        with recording(record, tree(module), *xs):
            return call(module, *xs)

    def keep(self, key: Hashable, value: Any) -> None:
        self.records[key] = BranchRecord([value], side=True)


class Replayer(Runner):
    """Repeats recorded branches, with whatever gradient mode is on."""

    def __init__(self, records: dict[Hashable, BranchRecord]) -> None:
        self.records = records

    def run(self, key: Hashable, module: Callable[..., Tensor], *xs: Tensor) -> Tensor:
        with replaying(self.records[key], tree(module)):
            return call(module, *xs)

    def kept(self, key: Hashable) -> Any:
        record = self.records.get(key)
        return None if record is None else record.kept[0]


class FrozenRunner(Runner):
    """Runs branches without touching running statistics: for ``inverse`` outside a backward pass."""

    def run(self, key: Hashable, module: Callable[..., Tensor], *xs: Tensor) -> Tensor:
        with frozen_statistics(tree(module)):
            return call(module, *xs)
