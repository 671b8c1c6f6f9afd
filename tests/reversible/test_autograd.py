"""The engine behaves as any module does under autograd, and says so clearly where it cannot."""

import copy
import gc
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from revnets.reversible import MODES, AdditiveCoupling, ReversibleError, RevSequential, set_mode
from tests.helpers import assert_same_step, training_step
from tests.reversible.graphs import build, cubic

KINDS = ["batch_norm", "mbconv_plain", "conv"]


@pytest.fixture
def net() -> RevSequential:
    return build([1, 2, 3], KINDS, exact=True)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def stored(net: RevSequential) -> RevSequential:
    other = copy.deepcopy(net)
    set_mode(other, "store")
    return other


def grads(net: nn.Module) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


def assert_equal(first: list[torch.Tensor | None], second: list[torch.Tensor | None]) -> None:
    for a, b in zip(first, second, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]


def test_autograd_grad(net: RevSequential, x: torch.Tensor) -> None:
    expected = torch.autograd.grad(cubic((other := stored(net))(x)), list(other.parameters()))
    assert_equal(list(torch.autograd.grad(cubic(net(x)), list(net.parameters()))), list(expected))
    assert all(p.grad is None for p in net.parameters())
    some = list(net.ops[2].parameters())  # type: ignore[union-attr]
    others = list(other.ops[2].parameters())  # type: ignore[union-attr]
    assert_equal(list(torch.autograd.grad(cubic(net(x)), some)), list(torch.autograd.grad(cubic(other(x)), others)))


def test_parameter_hooks_fire_once_on_the_whole_gradient(net: RevSequential, x: torch.Tensor) -> None:
    expected = training_step(stored(net), (x,), cubic).grads
    calls: list[str] = []
    accumulated: list[str] = []

    def double(name: str, grad: torch.Tensor) -> torch.Tensor:
        calls.append(name)
        return grad * 2

    for name, p in net.named_parameters():
        p.register_hook(lambda g, name=name: double(name, g))
        p.register_post_accumulate_grad_hook(lambda p, name=name: accumulated.append(name))
    got = training_step(net, (x,), cubic).grads
    assert sorted(calls) == sorted(accumulated) == sorted(expected)
    for name, grad in got.items():
        assert torch.equal(grad, expected[name] * 2), name  # type: ignore[operator, arg-type]
    assert all(isinstance(p, nn.Parameter) and not hasattr(p, "_stands_for") for p in net.parameters())


def test_module_hooks_see_the_ops(net: RevSequential, x: torch.Tensor) -> None:
    seen: list[str] = []
    for name, op in net.ops.named_children():
        op.register_forward_hook(lambda *_, name=name: seen.append(name))
    cubic(net(x)).backward()
    assert seen == [name for name, _ in net.ops.named_children()]


def test_gradients_accumulate(net: RevSequential, x: torch.Tensor) -> None:
    other = stored(net)
    for scale in (1.0, 0.5, 2.0):
        cubic(net(x * scale)).backward()
        cubic(other(x * scale)).backward()
    assert_equal(grads(net), grads(other))


def test_grad_scaler(net: RevSequential, x: torch.Tensor) -> None:
    other = stored(net)
    for model in (net, other):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = cubic(model(x))
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
    assert_equal(list(net.parameters()), list(other.parameters()))  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", MODES)
def test_two_forwards_then_two_backwards(mode: str, x: torch.Tensor) -> None:
    net = build([1, 2, 3], ["dropout", "drop_path", "mbconv"], exact=True)
    results = []
    for together in (True, False):
        model = copy.deepcopy(net)
        set_mode(model, mode)
        torch.manual_seed(0)
        if together:
            first, second = cubic(model(x)), cubic(model(-x))
            first.backward()
            second.backward()
        else:
            cubic(model(x)).backward()
            cubic(model(-x)).backward()
        results.append(grads(model))
    assert_equal(*results)


def test_backward_inside_autocast_keeps_the_gradients(net: RevSequential, x: torch.Tensor) -> None:
    other = copy.deepcopy(net)
    for model, inside in ((net, True), (other, False)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = cubic(model(x))
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
    assert_equal(grads(net), grads(other))


@pytest.mark.parametrize("frozen", [1, 3, 5])
def test_frozen_ops(net: RevSequential, x: torch.Tensor, frozen: int) -> None:
    for op in net.ops[:frozen]:
        op.requires_grad_(False)
    other = stored(net)
    outputs = net(x)
    assert all(y.requires_grad == (frozen < len(net.ops)) for y in outputs)
    if frozen < len(net.ops):
        cubic(outputs).backward()
        cubic(other(x)).backward()
    assert_equal(grads(net), grads(other))
    image = x.clone().requires_grad_()  # with a gradient at the input, frozen ops must pass it on
    image_too = x.clone().requires_grad_()
    cubic(net(image)).backward()
    cubic(other(image_too)).backward()
    assert torch.equal(image.grad, image_too.grad)  # type: ignore[arg-type]


def test_one_frozen_parameter(net: RevSequential, x: torch.Tensor) -> None:
    next(net.ops[2].parameters()).requires_grad_(False)  # type: ignore[union-attr]
    other = stored(net)
    assert_same_step(training_step(net, (x,), cubic), training_step(other, (x,), cubic), 0)


def test_no_grad_and_eval_are_plain_code(net: RevSequential, x: torch.Tensor) -> None:
    with torch.no_grad():
        plain = copy.deepcopy(net)(x)
    assert all(torch.equal(a, b) for a, b in zip(plain, net(x), strict=True))
    assert not any(y.requires_grad for y in plain)
    net.eval()
    with torch.inference_mode():
        net(x)
    graph = str(net(x)[0].grad_fn.next_functions)  # type: ignore[union-attr]
    assert "OpNode" not in graph


def test_copies_and_files(net: RevSequential, x: torch.Tensor, tmp_path: Path) -> None:
    expected = training_step(copy.deepcopy(net), (x,), cubic)
    assert_same_step(training_step(pickle.loads(pickle.dumps(net)), (x,), cubic), expected, 0)
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    other = build([1, 2, 3], KINDS, exact=True, seed=1)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert_same_step(training_step(other, (x,), cubic), expected, 0)
    torch.save(net, tmp_path / "model.pt")
    whole = torch.load(tmp_path / "model.pt", weights_only=False)
    assert_same_step(training_step(whole, (x,), cubic), expected, 0)


@pytest.mark.parametrize("used", [0, 1, 2])
def test_unused_outputs(net: RevSequential, x: torch.Tensor, used: int) -> None:
    other = stored(net)
    results = [training_step(model, (x,), lambda ys: ys[used].square().mean()) for model in (net, other)]
    assert_same_step(*results, 0)


def test_nothing_leaks(net: RevSequential, x: torch.Tensor) -> None:
    references = []
    for _ in range(3):
        ys = net(x)
        references += [weakref.ref(y) for y in ys]
        ys[1].sum().backward()
        ys = net(x)  # never used for a backward pass
        references += [weakref.ref(y) for y in ys]
        del ys
    gc.collect()
    assert not any(r() is not None for r in references)


def test_retained_graph_allows_a_second_backward(net: RevSequential, x: torch.Tensor) -> None:
    loss = cubic(net(x))
    loss.backward(retain_graph=True)
    once = grads(net)
    loss.backward()
    assert_equal(grads(net), [None if g is None else g + g for g in once])


# --- clear errors ----------------------------------------------------------------------------------------------------


def test_second_backward(net: RevSequential, x: torch.Tensor) -> None:
    ys = net(x)
    cubic(ys).backward()
    with pytest.raises(ReversibleError, match=r"op 4 \(RevSilo\): second backward.*retain_graph=True"):
        ys[0].sum().backward()


def test_second_derivative(net: RevSequential, x: torch.Tensor) -> None:
    with pytest.raises(ReversibleError, match=r"second derivatives.*set_mode\(\"store\"\)"):
        torch.autograd.grad(cubic(net(x)), list(net.parameters()), create_graph=True)
    other = stored(net).double()
    x = x.double().requires_grad_()
    (grad,) = torch.autograd.grad(cubic(other(x)), x, create_graph=True)
    grad.square().sum().backward()
    assert all(p.grad is not None for p in other.parameters())


def test_output_changed_in_place(net: RevSequential, x: torch.Tensor) -> None:
    ys = net(x)
    loss = ys[1].sum()
    ys[0].add_(1)
    with pytest.raises(ReversibleError, match=r"op 4 \(RevSilo\): its output was changed in place"):
        loss.backward()


def test_parameter_changed_between_forward_and_backward(net: RevSequential, x: torch.Tensor) -> None:
    loss = cubic(net(x))
    with torch.no_grad():
        next(net.ops[3].parameters()).add_(1)  # type: ignore[union-attr]
    with pytest.raises(ReversibleError, match=r"op 3 \(Parallel\): parameter ops\.0\.f\..* was changed in place"):
        loss.backward()


def test_half_precision_stream(net: RevSequential, x: torch.Tensor) -> None:
    with pytest.raises(ReversibleError, match=r"float32 or float64 stream, got bfloat16.*autocast.*exact=False"):
        net.bfloat16()(x.bfloat16())


def test_range_overflow_and_non_finite_values(x: torch.Tensor) -> None:
    net = build([1, 2], ["conv"], exact=True)
    net.ops[1].ops[0].f = nn.Conv2d(2, 2, 1)  # type: ignore[union-attr, index]
    with torch.no_grad():
        net.ops[1].ops[0].f.weight.fill_(3000.0)  # type: ignore[union-attr, index]
    with pytest.raises(
        ReversibleError, match=r"op 1 \(Parallel\).*beyond the range ±512 .*grid 2\^-12: pass exact=\d+"
    ):
        net(x)
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises(ReversibleError, match="holds nan"):
        build([1, 2], ["conv"], exact=True)(x)


def test_unknown_mode_and_grid() -> None:
    with pytest.raises(ValueError, match="unknown mode 'revers': expected one of reversible, checkpoint, store"):
        set_mode(build([1, 2], ["conv"]), "revers")
    with pytest.raises(ValueError, match="Linear has no reversible part"):
        set_mode(nn.Linear(1, 1), "store")
    with pytest.raises(ValueError, match="exact=40"):
        AdditiveCoupling(nn.ReLU(), nn.ReLU(), exact=40)
