"""Module hooks: once per step where they look on, in both passes where they are part of the function."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

from revnets.reversible import MODES, AdditiveCoupling, ReversibleError, ReversibleOp, RevSequential, every_pass
from tests.helpers import assert_same_step, training_step
from tests.reversible.graphs import build, cubic

ENGINE = ("reversible", "checkpoint")
Seen = list[tuple[Any, ...]]


def network() -> RevSequential:
    return build([1, 2, 2], ["mbconv", "dropout", "batch_norm"], exact=True)


def image() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def first(net: nn.Module, kind: type[nn.Module]) -> Any:
    return next(module for module in net.modules() if isinstance(module, kind))


def values(tree: Any) -> list[Tensor | None]:
    return [None if x is None else x.detach().clone() for x in (tree if isinstance(tree, tuple) else (tree,))]


def assert_seen(got: Seen, expected: Seen) -> None:
    assert [what for *what, _ in got] == [what for *what, _ in expected]
    for (*what, tensors), (*_, others) in zip(got, expected, strict=True):
        for tensor, other in zip(tensors, others, strict=True):
            assert (tensor is None) is (other is None), what
            assert tensor is None or tensor.equal(other), what


def watch(net: nn.Module) -> Seen:
    """Forward hooks of both kinds on every module."""
    seen: Seen = []
    for name, module in net.named_modules():
        module.register_forward_pre_hook(lambda m, xs, name=name: seen.append((name, "before", values(xs))))
        module.register_forward_hook(lambda m, xs, y, name=name: seen.append((name, "after", values(y))))
    return seen


def watch_backward(net: nn.Module) -> Seen:
    """Backward hooks of both kinds on every module; what they keep is looked at when the step is over."""
    seen: Seen = []
    for name, module in net.named_modules():
        module.register_full_backward_pre_hook(lambda m, gy, name=name: seen.append((name, "before", list(gy))))
        module.register_full_backward_hook(lambda m, gx, gy, name=name: seen.append((name, "after", [*gx, *gy])))
    return seen


# --- hooks that look on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ENGINE)
def test_hooks_that_look_on_see_the_forward_pass_of_store(mode: str) -> None:
    nets = [network(), network()]
    seen = [watch(net) for net in nets]
    steps = [training_step(net, (image(),), cubic, m) for net, m in zip(nets, (mode, "store"), strict=True)]
    assert_same_step(*steps, 0)
    assert_seen(*seen)


@pytest.mark.parametrize("mode", ENGINE)
def test_hooks_for_all_modules_fire_once(mode: str) -> None:
    counts = []
    for each in (mode, "store"):
        net, calls = network(), []
        handles = [
            torch_module.register_module_forward_pre_hook(lambda m, xs, calls=calls: calls.append(m)),
            torch_module.register_module_forward_hook(lambda m, xs, y, calls=calls: calls.append(m)),
        ]
        try:
            step = training_step(net, (image(),), cubic, each)
        finally:
            for handle in handles:
                handle.remove()
        names = {module: name for name, module in net.named_modules()}
        counts.append(([names[module] for module in calls], step))
    assert counts[0][0] == counts[1][0]
    assert any("bn" in name for name in counts[0][0])  # called, not fused
    assert_same_step(counts[0][1], counts[1][1], 0)


@pytest.mark.parametrize("mode", ENGINE)
def test_backward_hooks_see_the_gradients_of_store_once(mode: str) -> None:
    nets = [build([1, 2, 2], ["batch_norm", "dropout"], exact=True) for _ in range(2)]  # torch allows no in-place act
    seen = [watch_backward(net) for net in nets]
    steps = [training_step(net, (image(),), cubic, m) for net, m in zip(nets, (mode, "store"), strict=True)]
    assert_same_step(*steps, 0)
    by_name = [sorted(one, key=lambda entry: entry[:2]) for one in seen]  # branches may pass in another order
    assert_seen(*by_name)


@pytest.mark.parametrize("mode", ENGINE)
@pytest.mark.parametrize("kind", [nn.Conv2d, AdditiveCoupling, RevSequential])
def test_gradients_that_backward_hooks_change_are_those_of_store(mode: str, kind: type[nn.Module]) -> None:
    steps = []
    for each in (mode, "store"):
        net = network()
        module = first(net, kind)
        module.register_full_backward_pre_hook(lambda m, gy: tuple(2 * g for g in gy))
        module.register_full_backward_hook(lambda m, gx, gy: tuple(None if g is None else g + 1e-3 for g in gx))
        steps.append(training_step(net, (image(),), cubic, each))
    assert_same_step(*steps, 0)


@pytest.mark.parametrize("mode", MODES)
def test_hooks_may_go_between_forward_and_backward(mode: str) -> None:
    """With them gone, a layer that was called must not be fused in the recomputation."""
    net, other = network(), network()
    net.mode = other.mode = mode
    handles = [m.register_forward_hook(lambda *_: None) for m in net.modules()]
    watch(other)
    torch.manual_seed(0)
    loss = cubic(net(image()))
    for handle in handles:
        handle.remove()
    loss.backward()
    training_step(other, (image(),), cubic)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert p.grad is not None
        assert p.grad.equal(q.grad)


def test_a_hook_may_remove_itself_or_add_another() -> None:
    net, seen = network(), []
    conv = first(net, nn.Conv2d)

    def once(module: nn.Module, *_: Any) -> None:
        handle.remove()
        module.register_forward_hook(lambda *_: seen.append("added"))
        seen.append("first")

    handle = conv.register_forward_hook(once)
    for _ in range(2):
        training_step(net, (image(),), cubic, "reversible")
    assert seen == ["first", "added"]


@pytest.mark.parametrize("mode", ENGINE)
def test_a_loss_made_by_a_hook_is_kept_apart_from_what_is_recomputed(mode: str) -> None:
    """A checkpoint counts the tensors that are saved: those that a hook saves must not shift them."""
    steps = []
    for each in (mode, "store"):
        net, extra = network(), []
        first(net, nn.BatchNorm2d).register_forward_hook(lambda m, xs, y, extra=extra: extra.append(y.exp().mean()))
        steps.append(training_step(net, (image(),), lambda ys, extra=extra: cubic(ys) + extra.pop().detach(), each))
    assert_same_step(*steps, 0)
    if mode == "checkpoint":
        steps = []
        for each in (mode, "store"):
            net, extra = network(), []
            first(net, nn.BatchNorm2d).register_forward_hook(lambda m, xs, y, extra=extra: extra.append(y.exp().mean()))
            steps.append(training_step(net, (image(),), lambda ys, extra=extra: cubic(ys) + extra.pop(), each))
        assert_same_step(*steps, 0)


# --- hooks that are part of the function -----------------------------------------------------------------------------


def _returns(net: nn.Module) -> None:
    first(net, nn.Conv2d).register_forward_hook(lambda m, xs, y: 1.5 * y)


def _returns_before(net: nn.Module) -> None:
    first(net, nn.Conv2d).register_forward_pre_hook(lambda m, xs: (1.5 * xs[0],))


def _returns_with_kwargs(net: nn.Module) -> None:
    conv = first(net, nn.Conv2d)
    conv.register_forward_pre_hook(lambda m, xs, kwargs: ((1.5 * xs[0],), kwargs), with_kwargs=True)
    conv.register_forward_hook(lambda m, xs, kwargs, y: y.square(), with_kwargs=True)


def _in_place(net: nn.Module) -> None:
    first(net, nn.Conv2d).register_forward_hook(_doubled_in_place)


def _doubled_in_place(module: nn.Module, xs: Any, y: Any) -> None:
    (y[0] if isinstance(y, tuple) else y).mul_(2)


def _noise(net: nn.Module) -> None:
    first(net, nn.Conv2d).register_forward_hook(lambda m, xs, y: y + torch.randn_like(y))


def _draws_and_looks_on(net: nn.Module) -> None:
    """Random numbers drawn in front of dropout shift those that it gets."""
    dropouts = [m for m in net.modules() if isinstance(m, nn.Dropout)]
    for dropout in dropouts:
        dropout.register_forward_pre_hook(lambda m, xs: torch.rand(3) is None or None)


def _at_times(net: nn.Module) -> None:
    conv = first(net, nn.BatchNorm2d)
    calls = iter([None, 2.0, None, 3.0])
    conv.register_forward_hook(lambda m, xs, y: None if (factor := next(calls)) is None else factor * y)


def _low_rank(net: nn.Module) -> None:
    """LoRA by hooks, as some clients do it: parameters of its own in the module."""
    conv = first(net, nn.Conv2d)
    conv.lora = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding, bias=False)
    conv.register_forward_hook(lambda m, xs, y: y + m.lora(xs[0]))


def _pruned(net: nn.Module) -> None:
    prune.random_unstructured(first(net, nn.Conv2d), "weight", 0.5)
    prune.l1_unstructured(first(net, nn.Conv2d), "weight", 0.5)


def _weight_norm(net: nn.Module) -> None:
    torch.nn.utils.weight_norm(first(net, nn.Conv2d))


def _new_weight_norm(net: nn.Module) -> None:
    parametrizations.weight_norm(first(net, nn.Conv2d))


def _spectral_norm(net: nn.Module) -> None:
    torch.nn.utils.spectral_norm(first(net, nn.Conv2d))


def _new_spectral_norm(net: nn.Module) -> None:
    parametrizations.spectral_norm(first(net, nn.Conv2d))


def _quantised(net: nn.Module) -> None:
    """An observer, which follows a range by buffers, in front of rounding."""
    conv = first(net, nn.Conv2d)
    fake = torch.ao.quantization.FakeQuantize(torch.ao.quantization.MovingAverageMinMaxObserver, dtype=torch.quint8)
    nn.utils.parametrize.register_parametrization(conv, "weight", fake)


PARTS = (
    *(_returns, _returns_before, _returns_with_kwargs, _in_place, _noise, _draws_and_looks_on, _at_times, _low_rank),
    *(_pruned, _weight_norm, _new_weight_norm, _spectral_norm, _new_spectral_norm, _quantised),
)


@pytest.mark.filterwarnings("ignore:.*(weight_norm|torch.ao|observer).*")
@pytest.mark.parametrize("mode", ENGINE)
@pytest.mark.parametrize("add", PARTS)
def test_what_is_part_of_the_function_is_so_in_both_passes(add: Callable[[nn.Module], None], mode: str) -> None:
    results = []
    for each in (mode, "store"):
        net = network()
        torch.manual_seed(1)
        add(net)
        results.append([training_step(net, (image(),), cubic, each) for _ in range(2)])  # state moves on once per step
    for got, expected in zip(*results, strict=True):
        assert_same_step(got, expected, 0)


def test_a_part_of_the_function_must_stay_until_backward() -> None:
    net = network()
    handle = first(net, nn.Conv2d).register_forward_hook(lambda m, xs, y: 2 * y)
    loss = cubic(net(image()))
    handle.remove()
    with pytest.raises(ReversibleError, match="hook on Conv2d that changes what it computes was removed"):
        loss.backward()


def test_hooks_that_ask_for_every_pass_get_it_and_see_gradients() -> None:
    net, seen, grads = network(), [], []

    def look(module: nn.Module, xs: Any, y: Tensor) -> None:
        seen.append(y.detach())
        if y.requires_grad:
            y.register_hook(grads.append)

    first(net, nn.Conv2d).register_forward_hook(every_pass(look))
    step = training_step(net, (image(),), cubic, "reversible")
    assert_same_step(step, training_step(network(), (image(),), cubic, "store"), 0)
    assert len(seen) == 2
    assert seen[0].equal(seen[1])
    assert len(grads) == 1


def test_a_hook_for_every_pass_may_come_and_go() -> None:
    """What follows a step, phase by phase, as `revnets profile` does."""
    net, seen = network(), []
    conv = first(net, nn.Conv2d)
    with conv.register_forward_hook(every_pass(lambda *_: seen.append("forward"), keeps=False)):
        loss = cubic(net(image()))
    with conv.register_forward_hook(every_pass(lambda *_: seen.append("again"), keeps=False)):
        loss.backward()
    assert seen == ["forward", "again"]


def test_operations_are_counted_in_reversible_mode() -> None:
    """torch's counter puts hooks on the gradients of what every module is given."""
    counts = []
    for mode in ("reversible", "checkpoint"):
        net = network()
        net.mode = mode
        with FlopCounterMode(display=False) as counter:
            cubic(net(image())).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == pytest.approx(counts[1], rel=0.01)  # a checkpoint stops before a branch's last operations


# --- hooks on ops ----------------------------------------------------------------------------------------------------


class Plain(ReversibleOp):
    """Without a rewind of its own."""

    def __init__(self) -> None:
        super().__init__(exact=True)
        self.inner = AdditiveCoupling(nn.Linear(4, 4), nn.Linear(4, 4), exact=True)

    def forward(self, *xs: Tensor) -> tuple[Tensor, ...]:
        return self.inner(*xs)

    def inverse(self, *ys: Tensor) -> tuple[Tensor, ...]:
        return self.inner.inverse(*ys)


def test_hooks_of_ops_without_their_own_rewind_fire_once() -> None:
    results = []
    for mode in ("reversible", "store"):
        torch.manual_seed(0)
        net = RevSequential([Plain(), Plain()], exact=True)
        seen, gradients = watch(net), watch_backward(net)
        results.append((training_step(net, (torch.ones(3, 8),), cubic, mode), seen, gradients))
    assert_same_step(results[0][0], results[1][0], 1e-6)
    assert_seen(results[0][1], results[1][1])
    assert sorted(e[:2] for e in results[0][2]) == sorted(e[:2] for e in results[1][2])


@pytest.mark.parametrize("change", [lambda m, xs, ys: (ys[0] + 1,), _doubled_in_place])
def test_a_hook_that_makes_an_op_another_is_refused(change: Callable[..., Any]) -> None:
    net = build([1, 1], ["conv"])
    handle = first(net, AdditiveCoupling).register_forward_hook(change)
    with pytest.raises(ReversibleError, match=r"op 1.*a hook on AdditiveCoupling changes the tensors of the op"):
        net(image())
    handle.remove()
    first(net, AdditiveCoupling).register_forward_hook(lambda m, xs, ys: ys)  # the same tensors
    cubic(net(image())).backward()


def test_nothing_is_left_of_the_watch() -> None:
    net = network()
    hook = copy.copy  # any function
    conv = first(net, nn.Conv2d)
    conv.register_forward_pre_hook(lambda *_: hook(None))
    before = list(conv._forward_pre_hooks.values())
    training_step(net, (image(),), cubic, "reversible")
    assert list(conv._forward_pre_hooks.values()) == before
    conv.register_forward_pre_hook(_stop)
    with pytest.raises(RuntimeError, match="stop"):
        net(image())
    assert list(conv._forward_pre_hooks.values())[:1] == before


def _stop(*_: Any) -> None:
    raise RuntimeError("stop")
