"""What the controller promises at every step, in any training loop."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import swa_utils

from revnets.sparsity import SCHEDULES, MaskUpdate, SparsityController, apply_masks, sparse_layers
from revnets.training.mask_report import draw_picture, rows, write_table
from tests.helpers import guards_work

from .double import MaskedLinear, batch, network, train_step


def parts(
    schedule: str = "rigl", opt: str = "momentum", seed: int = 0, sparsity: float = 0.75, **more: Any
) -> tuple[nn.Sequential, torch.optim.Optimizer, SparsityController]:
    model = network(sparsity, seed)
    optimizer = create_optimizer_v2(model, opt=opt, lr=0.05, weight_decay=0.01)
    more = {"total_steps": 40, "interval": 4, "seed": seed, **more}
    return model, optimizer, SparsityController(model, optimizer, schedule, **more)


def masks(model: nn.Module) -> list[Tensor]:
    return [layer.mask.clone() for layer in sparse_layers(model)]


def assert_masked(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    state = getattr(optimizer, "_base_optimizer", optimizer).state
    for layer in sparse_layers(model):
        tensors = [layer.weight, layer.weight.grad, *state[layer.weight].values()]
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.shape == layer.mask.shape:
                assert not tensor[~layer.mask].any()


@pytest.mark.parametrize("schedule", SCHEDULES)
@settings(max_examples=6, deadline=None)
@given(
    st.sampled_from([0.0, 0.3, 0.75, 0.9]),
    st.sampled_from(["uniform", "er", "erk"]),
    st.floats(0.05, 1),
    st.integers(1, 7),
    st.integers(0, 1000),
)
def test_density_and_counts_at_every_step(
    schedule: str, sparsity: float, distribution: str, fraction: float, interval: int, seed: int
) -> None:
    more = {"distribution": distribution, "drop_fraction": fraction, "interval": interval}
    model, optimizer, controller = parts(schedule, seed=seed, sparsity=sparsity, **more)
    start = [int(m.sum()) for m in masks(model)]
    sizes = [m.numel() for m in masks(model)]
    assert sum(start) == sum(round((1 - sparsity) * n) for n in sizes)
    updates = 0
    for step in range(1, 33):
        before = masks(model)
        train_step(model, optimizer, step)
        weights = [layer.weight.detach().clone() for layer in sparse_layers(model)]
        update = controller.step()
        after = masks(model)
        assert [int(m.sum()) for m in after] == start
        assert_masked(model, optimizer)
        due = schedule != "static" and step % interval == 0 and step < 30
        assert (update is not None) == due
        if update is None:
            assert all(map(torch.equal, before, after))
            continue
        updates += 1
        share = fraction * 0.5 * (1 + math.cos(math.pi * (step / 30)))
        assert update.exchanged == [min(math.floor(share * n), size - n) for n, size in zip(start, sizes, strict=True)]
        for layer, old, new, w, count, changed in zip(
            controller.layers, before, after, weights, update.exchanged, update.changed, strict=True
        ):
            grown = new & ~old
            assert int(grown.sum()) == changed <= count
            again = old & new & (w != 0) & (layer.weight == 0)  # dropped and grown at once
            assert int(again.sum()) <= count - changed
            assert not layer.weight[grown].any()
            assert not optimizer.state[layer.weight]["momentum_buffer"][grown].any()
            kept = old & new & (layer.weight != 0)
            assert torch.equal(layer.weight[kept], w[kept])
    assert len(controller.history) == updates


def test_an_update_in_words() -> None:
    words = str(MaskUpdate(100, 0.3, [3, 5], [2, 4], [10, 20]))
    assert words == "masks after step 100: 6 of 30 active weights are new (20.0%)"


def test_rigl_grows_the_largest_dense_gradients_of_the_last_step() -> None:
    model, optimizer, controller = parts(opt="sgd")
    twin = copy.deepcopy(model)
    for step in range(1, 5):
        twin.load_state_dict(model.state_dict())
        train_step(model, optimizer, step)
        update = controller.step()
    assert update is not None
    dense = nn.Sequential(*(nn.Linear(m.in_features, m.out_features) if hasattr(m, "mask") else m for m in twin))
    dense.load_state_dict({k: v for k, v in twin.state_dict().items() if not k.endswith("mask")})
    x, y = batch(4)
    nn.functional.cross_entropy(dense(x), y).backward()
    for layer, old, count in zip(controller.layers, masks(twin), update.exchanged, strict=True):
        assert count > 0
        grad = dense.get_submodule(layer.name).weight.grad.abs()  # type: ignore[union-attr]
        kept = layer.mask & (layer.weight != 0)
        assert int(kept.sum()) == int(old.sum()) - count
        free = sorted(grad[~kept].tolist(), reverse=True)
        assert torch.equal(grad[layer.mask & ~kept].sort(descending=True).values, torch.tensor(free[:count]))


def test_dense_gradients_are_gathered_in_that_step_only() -> None:
    model, optimizer, controller = parts()
    for step in range(1, 41):
        gathers = step % 4 == 0 and step < 30
        assert all(module.gather_dense_grad == gathers for layer in controller.layers for module in layer.modules)
        train_step(model, optimizer, step)
        assert all((layer.dense_grads != []) == gathers for layer in controller.layers)
        controller.step()
        assert all(layer.dense_grads == [] for layer in controller.layers)


@pytest.mark.parametrize(
    "opt",
    ["sgd", "adamw", "rmsprop", "lion", "adafactor", "lamb", "lookahead_adamw", "muon", "madgrad", "rmsproptf"],
)
def test_any_optimizer_stays_masked(opt: str) -> None:
    model, optimizer, controller = parts(opt=opt, interval=3)
    for step in range(1, 20):
        train_step(model, optimizer, step)
        controller.step()
        assert_masked(model, optimizer)
    assert controller.steps == 19
    leaky = {"sgd": False, "adamw": False, "lion": False, "muon": True, "rmsproptf": True}
    assert controller.state_dict()["leaky"] == leaky.get(opt, controller.state_dict()["leaky"])
    assert all(sum(update.changed) for update in controller.history)


@pytest.mark.parametrize("uses", [2, 3])
def test_tied_weights_grow_by_the_sum_of_their_gradients(uses: int) -> None:
    torch.manual_seed(0)
    layers = [MaskedLinear(8, 8, 0.75) for _ in range(uses)]
    for layer in layers[1:]:
        layer.weight, layer.mask = layers[0].weight, layers[0].mask
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    controller = SparsityController(model, optimizer, "rigl", total_steps=8, interval=2)
    x, weight = torch.randn(16, 8), layers[0].weight
    for _ in range(2):
        before = layers[0].mask.clone()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        value = weight.detach().clone()
        update = controller.step()
    assert update is not None
    assert update.exchanged[0] > 0
    dense = value.clone().requires_grad_()  # the same function without masks: its gradient is that of all uses
    y = x
    for layer in layers:
        y = torch.tanh(nn.functional.linear(y, dense, layer.bias))
    (grad,) = torch.autograd.grad(y.square().mean(), dense)
    kept = before & (weight != 0)
    places = grad.abs().masked_fill(kept, -1.0).flatten().topk(update.exchanged[0]).indices
    assert torch.equal(layers[0].mask.flatten(), kept.flatten().index_fill(0, places, True))


def test_accumulated_batches_count_as_one() -> None:
    whole, accumulated = parts(opt="sgd"), parts(opt="sgd")
    for step in range(1, 9):
        for (model, optimizer, controller), size in ((whole, 16), (accumulated, 4)):
            optimizer.zero_grad()
            x, y = batch(step)
            for xs, ys in zip(x.split(size), y.split(size), strict=True):
                (nn.functional.cross_entropy(model(xs), ys) * len(xs) / len(x)).backward()
            optimizer.step()
            controller.step()
    assert all(map(torch.equal, masks(whole[0]), masks(accumulated[0])))
    assert len(whole[2].history) == 2


def test_steps_that_the_loss_scaler_skips_do_not_count() -> None:
    plain, scaled = parts(), parts()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(1, 13):
        train_step(plain[0], plain[1], step)
        plain[2].step()
        model, optimizer, controller = scaled
        for overflow in (True, False):
            optimizer.zero_grad()
            x, y = batch(step)
            loss = nn.functional.cross_entropy(model(x), y)
            scaler.scale(loss * math.inf if overflow else loss).backward()
            scaler.step(optimizer)
            before = controller.steps
            update = controller.step()
            assert controller.steps == before + (not overflow)
            assert update is None or not overflow
            scaler.update(2.0**10)
    assert len(plain[2].history) == len(scaled[2].history) == 3
    assert all(map(torch.equal, masks(plain[0]), masks(scaled[0])))


def test_a_copy_takes_the_masks_as_they_are() -> None:
    """What was grown as well as what was dropped, whatever masks and weights the copy had."""
    model, copied = network(seed=0), network(seed=1)
    for layer in sparse_layers(copied):
        layer.weight.data.normal_()
        layer.modules[0].mask.logical_not_()  # type: ignore[operator, union-attr]
    apply_masks(copied, like=model)
    for ours, theirs in zip(sparse_layers(model), sparse_layers(copied), strict=True):
        assert torch.equal(ours.mask, theirs.mask)
        assert theirs.weight[theirs.mask].all()
        assert not theirs.weight[~theirs.mask].any()
    own = masks(copied)
    apply_masks(copied)
    assert all(map(torch.equal, own, masks(copied)))


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("kind", ["timm", "torch"])
def test_averaged_model_has_the_newest_mask(kind: str, buffers: bool) -> None:
    model, optimizer, controller = parts(interval=2)
    ema: Any = (
        ModelEmaV3(model, decay=0.9, exclude_buffers=not buffers)
        if kind == "timm"
        else swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=buffers)
    )
    for step in range(1, 12):
        train_step(model, optimizer, step)
        controller.step()
        if kind == "timm":
            ema.update(model, step=step)
        else:
            ema.update_parameters(model)
        apply_masks(ema.module, like=model)
        for ours, theirs in zip(sparse_layers(model), sparse_layers(ema.module), strict=True):
            assert torch.equal(ours.mask, theirs.mask)
            assert not theirs.weight[~theirs.mask].any()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_resumed_run_equals_uninterrupted_run_to_the_bit(schedule: str) -> None:
    whole, first = parts(schedule, "adamw"), parts(schedule, "adamw")
    for step in range(1, 41):
        train_step(whole[0], whole[1], step)
        whole[2].step()
    for step in range(1, 16):  # the next step gathers
        train_step(first[0], first[1], step)
        first[2].step()
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    second = parts(schedule, "adamw", seed=99)
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    for step in range(16, 41):
        train_step(second[0], second[1], step)
        second[2].step()
    ours, theirs = whole[0].state_dict(), second[0].state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert whole[2].history == second[2].history
    moments = [[s["exp_avg_sq"] for s in part[1].state.values()] for part in (whole, second)]
    assert all(map(torch.equal, *moments))
    assert (whole[2].history != []) == (schedule != "static")


def test_checkpoints_that_do_not_match() -> None:
    _, _, controller = parts()
    state = controller.state_dict()
    layer = MaskedLinear(6, 20, 0.75)
    other = SparsityController(nn.Sequential(layer), torch.optim.SGD(layer.parameters()), "rigl", total_steps=40)
    with pytest.raises(ValueError, match=r"sparse layer '2' is in the checkpoint, not in the model"):
        other.load_state_dict(state)
    for loaded in (False, True):  # the model's own masks, or those of the checkpoint
        model, _, controller_of_more = parts(sparsity=0.5)
        if loaded:
            model.load_state_dict(parts()[0].state_dict())
        with pytest.raises(ValueError, match=r"'0' has 30 active weights in the checkpoint, 60 were asked for"):
            controller_of_more.load_state_dict(state)
    model, _, same = parts()
    model.load_state_dict(parts(sparsity=0.5)[0].state_dict())
    with pytest.raises(ValueError, match=r"'0' has 30 active weights in the checkpoint, 60 in the model; load"):
        same.load_state_dict(state)
    state["layers"]["0"] = [7, 7, 30]
    with pytest.raises(ValueError, match=r"'0' has shape \(7, 7\) in the checkpoint, \(20, 6\) in the model"):
        controller.load_state_dict(state)
    with pytest.raises(ValueError, match="trained with 'rigl'"):
        parts("set")[2].load_state_dict(parts()[2].state_dict())


def test_frozen_weights_and_those_of_no_optimizer_keep_their_masks() -> None:
    model = network(sizes=(6, 20, 12, 10, 4))
    model[0].weight.requires_grad_(False)
    held = [p for name, p in model.named_parameters() if name != "2.weight"]
    optimizer = torch.optim.SGD(held, lr=0.1, momentum=0.9)
    controller = SparsityController(model, optimizer, "rigl", total_steps=40, interval=4)
    before, weights = masks(model), [layer.weight.detach().clone() for layer in controller.layers]
    for step in range(1, 9):
        train_step(model, optimizer, step)
        controller.step()
    same = [torch.equal(a, b) for a, b in zip(before, masks(model), strict=True)]
    assert same == [True, True, False]
    assert [torch.equal(w, x.weight) for w, x in zip(weights, controller.layers, strict=True)] == [True, True, False]


@pytest.mark.parametrize("schedule", ["set", "rigl"])
def test_tied_weights_have_one_mask(schedule: str) -> None:
    torch.manual_seed(0)
    first, second = MaskedLinear(6, 6, 0.5), MaskedLinear(6, 6, 0.5)
    second.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), second, nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    controller = SparsityController(model, optimizer, schedule, total_steps=40, interval=4)
    assert len(controller.layers) == 1
    for step in range(1, 13):
        train_step(model, optimizer, step)
        controller.step()
        assert torch.equal(first.mask, second.mask)
        assert int(first.mask.sum()) == 18
    assert sum(update.changed[0] for update in controller.history) > 0


def test_layers_without_a_gradient_keep_their_masks() -> None:
    model, optimizer, controller = parts(interval=1)
    _, y = batch(0)
    nn.functional.cross_entropy(model[2:](torch.ones(16, 20)), y).backward()
    before = masks(model)
    optimizer.step()
    update = controller.step()
    assert update is not None
    assert update.exchanged[0] == 0
    assert torch.equal(before[0], masks(model)[0])
    assert update.exchanged[1] > 0


def test_new_distribution_keeps_the_scale_of_the_weights() -> None:
    model = network(sparsity=0.75, sizes=(64, 128, 256, 4))
    before = [layer.weight.detach()[layer.mask].std() for layer in sparse_layers(model)]
    optimizer = torch.optim.SGD(model.parameters())
    controller = SparsityController(model, optimizer, "static", distribution="erk", sparsity=0.5)
    densities = list(controller.density.values())
    assert densities[0] > densities[1]
    for layer, std in zip(controller.layers, before, strict=True):
        active = layer.weight.detach()[layer.mask]
        assert int((active == 0).sum()) == 0
        assert float(active.std()) == pytest.approx(float(std), rel=0.1)


@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_masks_that_fit_already_stay(distribution: str) -> None:
    model, optimizer, _ = parts(distribution=distribution)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    SparsityController(model, optimizer, "static", distribution=distribution, sparsity=0.75)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_mistakes(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="no sparse layers"):
        SparsityController(nn.Linear(2, 2), torch.optim.SGD([torch.ones(1)]), "static")
    with pytest.raises(ValueError, match="before they start"):
        parts(start=0.8)
    with pytest.raises(ValueError, match="uniform, er, erk"):
        parts(distribution="gaussian")
    with pytest.raises(ValueError, match="sparsity=1"):
        parts(sparsity=0.5)[2]._draw("uniform", 1)
    parts(interval=100)
    assert "no mask changes in 40 steps" in caplog.text


@guards_work
def test_compiled_model_trains_as_the_plain_one() -> None:
    plain, compiled = parts(), parts()
    wrapped = torch.compile(compiled[0], backend="aot_eager")
    controller = SparsityController(wrapped, compiled[1], "rigl", total_steps=40, interval=4)  # type: ignore[arg-type]
    assert [layer.name for layer in controller.layers] == ["0", "2"]
    for step in range(1, 10):
        train_step(plain[0], plain[1], step)
        plain[2].step()
        train_step(wrapped, compiled[1], step)  # type: ignore[arg-type]
        controller.step()
    assert all(map(torch.equal, masks(plain[0]), masks(compiled[0])))
    assert len(controller.history) == 2


def test_table_and_picture(tmp_path: Any) -> None:
    model, optimizer, controller = parts()
    for step in range(1, 13):
        train_step(model, optimizer, step)
        controller.step()
    found = rows(controller)
    assert len(found) == 2 * 4
    assert {row["density"] for row in found} == {0.25}
    assert write_table(controller, tmp_path).read_text().count("\n") == 9
    assert draw_picture(controller, tmp_path, "title").read_bytes().startswith(b"\x89PNG")
    draw_picture(parts("static")[2], tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"sparsity.csv", "sparsity.png"}
