"""`revnets.reversible(model)` over families of networks: what they compute, their gradients, their checkpoints."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revnets
from revnets.profiling.predict import predict_training_step
from revnets.retrofit import ReversibleStage
from revnets.reversible import MODES
from tests.helpers import assert_same_step, training_step
from tests.retrofit.networks import NETWORKS, loss, made

every_network = pytest.mark.parametrize("name", NETWORKS)
WAYS: dict[str, dict[str, int]] = {
    "one stream": {},
    "two streams": {"streams": 2},
    "no bits": {"streams": 2, "bits": 0},
}


def retrofitted(name: str, drop: float = 0.0, **how: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """A network as it was, the same made reversible, and images."""
    plain, x = made(name, **({"drop_path_rate": drop} if drop else {}))
    return plain, revnets.reversible(copy.deepcopy(plain), input_size=x.shape[1:], **how), x  # type: ignore[operator]


@every_network
def test_evaluation_and_names_are_the_networks_own(name: str) -> None:
    plain, model, x = retrofitted(name)
    assert type(model) is type(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert torch.equal(model.eval()(x), plain.eval()(x))
    assert model.retrofit.converted


@every_network
def test_training_starts_where_the_network_is(name: str) -> None:
    """Within what 8 bits of each update are worth: so near that the first step goes the same way."""
    plain, model, x = retrofitted(name)
    expected, got = training_step(plain, (x,), loss), training_step(model, (x,), loss)
    assert (got.loss - expected.loss).abs() < 0.02 * expected.loss.abs().clamp(min=1)
    ours, theirs = (torch.cat([g.flatten() for g in s.grads.values() if g is not None]) for s in (got, expected))
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.99
    for key, buffer in expected.buffers.items():
        assert torch.allclose(got.buffers[key].float(), buffer.float(), rtol=0.05, atol=0.05), key


@every_network
@pytest.mark.parametrize("way", WAYS)
def test_gradients_equal_stored_activations_to_the_bit(name: str, way: str) -> None:
    """With stochastic depth and running statistics: the same draws, moved once."""
    _, model, x = retrofitted(name, 0.0 if name == "mobilenet" else 0.3, **WAYS[way])
    steps = {mode: training_step(copy.deepcopy(model), (x,), loss, mode=mode) for mode in MODES}
    assert_same_step(steps["reversible"], steps["store"], 0)
    assert_same_step(steps["checkpoint"], steps["store"], 0)


@every_network
def test_under_autocast_too(name: str) -> None:
    _, model, x = retrofitted(name)
    x = x.to(memory_format=torch.channels_last)
    steps = {m: training_step(copy.deepcopy(model), (x,), loss, mode=m, autocast=True) for m in ("store", "reversible")}
    assert_same_step(steps["reversible"], steps["store"], 0)


@every_network
def test_activations_are_rebuilt_to_the_bit(name: str) -> None:
    _, model, x = retrofitted(name)
    blocks = sum(
        len(names)
        for m in model.modules()
        if isinstance(m, ReversibleStage)
        for names, how in m.steps
        if how == "chain"
    )
    report = revnets.check_reversibility(model, x)
    assert report.exact
    assert len(report.ops) == blocks > 0


@every_network
def test_checkpoints_go_both_ways_after_a_step(name: str) -> None:
    plain, model, x = retrofitted(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss(model(x)).backward()
    optimizer.step()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), plain.eval()(x))
    model.load_state_dict(made(name)[0].state_dict())
    assert torch.equal(model(x), made(name)[0].eval()(x))


@pytest.mark.parametrize("way", ["one stream", *(pytest.param(w, marks=pytest.mark.slow) for w in list(WAYS)[1:])])
def test_memory_falls_and_hardly_grows_with_depth(way: str) -> None:
    """What a block more takes is what is kept of it; weights are frozen, whose gradients would stand in the way."""
    x = torch.zeros(32, 3, 64, 64)

    def activations(depth: int, mode: str) -> int:
        model = made("vit", depth=depth)[0].requires_grad_(False)
        model.patch_embed.requires_grad_(True)
        if mode != "plain":
            model = revnets.reversible(model, input_size=(3, 64, 64), **WAYS[way])  # type: ignore[operator]
            revnets.set_mode(model, mode)
        return predict_training_step(model, x).step_bytes

    plain, few, many = activations(8, "plain"), activations(8, "reversible"), activations(16, "reversible")
    assert few < 0.35 * plain
    assert many - few < 0.03 * (activations(16, "plain") - plain)
    assert many < activations(16, "checkpoint") < activations(16, "store")


def test_a_copy_and_a_pickle_are_reversible_too() -> None:
    _, model, x = retrofitted("vit")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    expected = training_step(model, (x,), loss)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        stage = other.blocks
        assert stage.reversible0.ops[0].block is stage[0]
        assert_same_step(training_step(other, (x,), loss), expected, 0)
        assert revnets.check_reversibility(other, x).exact


def test_frozen_blocks_need_not_be_rebuilt_and_keep_no_gradient() -> None:
    plain, model, x = retrofitted("vit")
    for net in (plain, model):
        for p in [*net.patch_embed.parameters(), *net.blocks[:2].parameters(), net.cls_token, net.pos_embed]:
            p.requires_grad_(False)
    steps = {m: training_step(copy.deepcopy(model), (x,), lambda y: loss(y), mode=m) for m in MODES}
    assert_same_step(steps["reversible"], steps["store"], 0)
    loss(revnets.set_mode(model, "reversible")(x)).backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} == {
        n for n, p in plain.named_parameters() if not p.requires_grad
    }


def test_large_activations_name_the_grid_that_holds_them() -> None:
    model, x = made("vit")
    with torch.no_grad():
        model.pos_embed += 700
    with pytest.raises(RuntimeError, match="beyond the range ±512 of the exact grid 2\\^-12: pass exact=11"):
        revnets.reversible(copy.deepcopy(model), input_size=(3, 64, 64))(x)  # type: ignore[operator]
    coarse = revnets.reversible(model, exact=11, input_size=(3, 64, 64))  # type: ignore[operator]
    assert revnets.check_reversibility(coarse, x).exact


def test_branches_compile() -> None:
    _, model, x = retrofitted("vit")
    expected = training_step(copy.deepcopy(model), (x,), loss)
    assert_same_step(training_step(revnets.compile_branches(model, backend="eager"), (x,), loss), expected, 0)


def test_layers_are_converted_within_a_reversible_network() -> None:
    """What takes the place of a layer in a block is run in it."""
    _, model, x = retrofitted("resnet")
    report = revnets.convert(model, "sparse_parallel:0.5", input_size=x.shape[1:])
    assert report.converted
    steps = {m: training_step(copy.deepcopy(model), (x,), loss, mode=m) for m in ("store", "reversible")}
    assert_same_step(steps["reversible"], steps["store"], 0)
